"""`data build` of whatever `load_media` reads: what is stored is what it reads, and links."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from echovlm_jax.cli import main
from echovlm_jax.data.build import Options, build, validate
from echovlm_jax.data.dataset import open_dataset
from echovlm_jax.data.media import read_medium
from echovlm_jax.data.quarantine import Refused
from echovlm_jax.processing.images import load_media
from tests.data.sources import encoded, pixels, record, write

ALL = Options(validation=0, test=0)
RAMP = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (20, 1))


def _file(path):
    picture = Image.fromarray(pixels(3))
    if path.name == "wide.png":
        Image.fromarray(RAMP >> 4).save(path)
    elif path.suffix == ".mha":
        head = b"ObjectType = Image\nNDims = 3\nDimSize = 20 12 5\nElementType = MET_UCHAR\n"
        data = pixels(2, 12, 100).tobytes()[:1200]
        path.write_bytes(head + b"ElementDataFile = LOCAL\n" + data)
    elif path.suffix in (".gif", ".apng"):
        form = {"format": "PNG"} if path.suffix == ".apng" else {}
        turned = [picture.rotate(180), picture.rotate(90)]
        picture.save(path, save_all=True, append_images=turned, **form)
    elif path.suffix == ".avi":
        pytest.importorskip("tests.processing.test_video").save(
            path, np.stack([pixels(n, 16, 32) for n in range(4)]), "avi", "ffv1", "bgr0"
        )
    else:
        picture.save(path)
    return path


NAMES = ("wide.png", "a.bmp", "a.tif", "a.webp", "a.gif", "a.apng", "a.jp2", "a.mha", "a.avi")


def test_what_is_stored_is_what_generate_reads(tmp_path):
    records = [{**record(n), "image": [name]} for n, name in enumerate(NAMES)]
    sources, images = write(tmp_path, records)
    for name in NAMES:
        _file(images / name)
    checked = validate(sources, images, ALL)
    report = build(sources, images, tmp_path / "out", ALL)
    for found in (checked, report):
        assert (found["kept"], found["rescaled"]) == (len(NAMES), 1)
    dataset = open_dataset(tmp_path / "out", "train")
    for n in range(len(dataset)):
        name = NAMES[int(dataset.record(n).id.rpartition("exam")[2])]
        np.testing.assert_array_equal(dataset.media(n)[0], load_media(images / name))


def test_a_picture_of_16_bits_is_stored_in_8(tmp_path):
    stored = read_medium(_file(tmp_path / "wide.png"), num_frames=16, crop=False)
    assert Image.open(io.BytesIO(stored.images[0])).mode == "L"
    assert stored.notes == ("rescaled",)


def test_an_extra_that_is_missing_is_a_reason_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "a.avi").write_bytes(b"RIFF\0\0\0\0AVI LIST" + bytes(100))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(Refused) as refused:
        read_medium(tmp_path / "a.avi", num_frames=16, crop=False)
    assert refused.value.reason == "extra not installed"
    assert "pip install 'echovlm-jax[video]'" in refused.value.detail


def _cache(tmp_path):
    """A cache of downloads: pictures and the source itself are links to blobs."""
    snapshot = tmp_path / "datasets--x" / "snapshots" / "1234"
    (snapshot / "images").mkdir(parents=True)
    blobs = tmp_path / "datasets--x" / "blobs"
    blobs.mkdir()
    records = []
    for n in range(3):
        (blobs / f"{n:064x}").write_bytes(encoded(n))
        (snapshot / "images" / f"benign ({n}).png").symlink_to(f"../../../blobs/{n:064x}")
        path = [f"images/benign ({n}).png", f".\\images\\benign ({n}).png"][n % 2]
        records.append({**record(n), "image": [path]})
    records[2]["image"] = [str(snapshot / "images" / "benign (2).png")]
    (blobs / "5").write_text(json.dumps(records))
    (snapshot / "breast.json").symlink_to("../../blobs/5")
    return snapshot


def test_a_cache_of_downloads_is_built_from_with_allow_links(tmp_path, capsys):
    snapshot = _cache(tmp_path)
    inputs = [f"--source={snapshot / 'breast.json'}", f"--images={snapshot}", "--workers=1"]
    assert main(["data", "validate", *inputs, "--json"]) == 1
    refused = json.loads(capsys.readouterr().out)
    assert refused["quarantined"] == {"path outside the folder": 3}
    assert all("--allow-links ROOT" in line["detail"] for line in refused["examples"])
    for root in (snapshot.parents[1], tmp_path / "datasets--x" / "blobs"):
        assert main(["data", "validate", *inputs, f"--allow-links={root}", "--json"]) == 0
    out = tmp_path / "out"
    allowed = [f"--allow-links={snapshot.parents[1]}", f"--out={out}"]
    assert main(["data", "build", *inputs, *allowed, "--json"]) == 0
    results = capsys.readouterr().out.splitlines()
    assert json.loads(results[-1])["organs"] == {"breast": 3}  # by the link's name, not the blob's
    assert not any(path.is_symlink() for path in out.iterdir())
    assert main(["data", "validate", *inputs, f"--allow-links={tmp_path / 'none'}"]) == 2
    assert "--allow-links" in capsys.readouterr().err
