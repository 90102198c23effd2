"""Reading a built folder: what was put in comes out, or one line says what is damaged."""

import json
import pickle
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from echovlm_jax.data import build as building
from echovlm_jax.data import folder
from echovlm_jax.data.build import Options, build
from echovlm_jax.data.dataset import open_dataset
from echovlm_jax.data.examples import texts_of
from echovlm_jax.errors import InputError
from echovlm_jax.processing.images import load_media
from echovlm_jax.storage import retry
from tests.data.sources import record, write


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset of 9 exams in 3 shards, and its images' folder."""
    where = tmp_path_factory.mktemp("made")
    organs = ("liver", "breast", "heart")
    sources, images = write(where, [record(n, n % 3 + 1, organ=organs[n % 3]) for n in range(9)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "SHARD_RECORDS", 4)
        build(sources, images, where / "out", Options(validation=0, test=0))
    return where / "out", images


def test_what_went_in_comes_out(made):
    out, images = made
    dataset = open_dataset(out)
    assert len(dataset) == 9 and dataset.organ_names == ("breast", "heart", "liver")
    for n in range(9):
        exam = dataset.record(n)
        assert exam.id == f"liver/exam{n}"
        assert dataset.organ_names[dataset.organs[n]] == exam.organ
        found = dataset.media(n)
        assert [(0, *image.shape[:2]) for image in found] == [m[:3] for m in exam.media]
        for view, image in enumerate(found):
            np.testing.assert_array_equal(image, load_media(images / f"{n}_{view}.png"))
    with pytest.raises(IndexError):
        dataset.record(9)
    texts = list(texts_of(out))
    assert "What is seen?" in texts  # what is asked, and what is answered
    assert any(text.startswith("Finding") for text in texts)


class Refusing:
    """A shard's reader, which so many times says what ArrayRecord's says."""

    def __init__(self, reader, times: int, text: str) -> None:
        self.reader, self.times, self.text, self.asked = reader, times, text, 0

    def read(self, positions):
        self.asked += 1
        if self.asked <= self.times:
            raise RuntimeError(self.text)
        return self.reader.read(positions)


REFUSED = "pread() failed: Input/output error; reading /data/x; at byte 0"


@pytest.fixture
def refusing(made, monkeypatch):
    """A dataset whose reader is `Refusing`, and that; nobody waits."""
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    dataset = open_dataset(made[0])
    right = dataset.media(0)

    def make(times: int, text: str = REFUSED):
        reader = Refusing(dataset._readers[0], times, text)
        dataset._readers[0] = reader
        return dataset, reader, right

    return make


def test_a_read_that_is_refused_for_a_moment_is_made_again(refusing, capsys):
    dataset, reader, right = refusing(2)
    before = retry.counted()
    for found, wanted in zip(dataset.media(0), right, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert reader.asked == 3 and retry.counted() == before + 2
    assert "can't be read (Input/output error); tried again" in capsys.readouterr().err


def test_a_read_that_is_always_refused_is_named(refusing):
    dataset, reader, _ = refusing(100)
    wanted = r"out/echovlm-train.array_record-00000-of-00003: can't be read \(Input/output error,"
    with pytest.raises(InputError, match=wanted + r" tried 7 times"):
        dataset.media(0)
    assert reader.asked == 7


def test_damage_is_not_read_again(refusing):
    dataset, reader, _ = refusing(1, "Corrupted Riegeli/records file: chunk data hash mismatch")
    with pytest.raises(InputError, match="is not what `data build` wrote"):
        dataset.media(0)
    assert reader.asked == 1


def test_it_pickles_small_and_reads_from_threads(made):
    dataset = open_dataset(made[0])
    data = pickle.dumps(dataset)
    assert len(data) < 500
    copy = pickle.loads(data)
    assert copy.fingerprint == dataset.fingerprint
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(lambda n: sum(int(m.sum()) for m in copy.media(n % 9)), range(90)))
    assert sums[:9] * 10 == sums


def test_the_fingerprint_follows_the_content(tmp_path, made):
    sources, images = write(tmp_path, [record(n, n % 3 + 1) for n in range(9)])
    build(sources, images, tmp_path / "other", Options(validation=0, test=0))
    first = open_dataset(tmp_path / "other").fingerprint
    assert first != open_dataset(made[0]).fingerprint
    (images / "0_0.png").write_bytes((images / "1_0.png").read_bytes())
    build(sources, images, tmp_path / "third", Options(validation=0, test=0))
    assert open_dataset(tmp_path / "third").fingerprint != first


def test_no_dataset_and_no_split_are_said(tmp_path, made):
    with pytest.raises(InputError, match="is no dataset"):
        open_dataset(tmp_path)
    with pytest.raises(InputError, match="no split 'test'; it has train"):
        open_dataset(made[0], "test")


def _damage(data: bytes, draw: random.Random) -> bytes:
    changed, kind = bytearray(data), draw.choice(["flip", "cut", "zero", "insert", "append"])
    at = draw.randrange(len(data))
    if kind == "flip":
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del changed[at:]
    elif kind == "zero":
        changed[at : at + 100] = bytes(len(changed[at : at + 100]))
    elif kind == "insert":
        changed[at:at] = draw.randbytes(draw.randint(1, 9))
    else:
        changed += draw.randbytes(draw.randint(1, 70_000))
    return bytes(changed)


def _read_all(out):
    dataset = open_dataset(out)
    exams = [(dataset.record(n), dataset.media(n)) for n in range(len(dataset))]
    return [(exam, [image.tobytes() for image in media]) for exam, media in exams]


def _fuzz_folder(out, where, cases):
    """Damages one file at a time; returns how many cases were noticed."""
    whole, noticed = _read_all(out), 0
    names = [path.name for path in sorted(out.iterdir())]
    names = [n for n in names if n.startswith(("echovlm-train", "train.", folder.MANIFEST))]
    assert len(names) == 6
    copy = where / "copy"
    shutil.copytree(out, copy)
    draw = random.Random(0)
    for n in range(cases):
        path = copy / names[n % len(names)]
        data = path.read_bytes()
        path.write_bytes(_damage(data, draw))
        try:
            # Bytes between an ArrayRecord's blocks may change without meaning: then all is there.
            assert _read_all(copy) == whole
        except InputError as error:
            noticed += 1
            assert str(copy) in str(error) and "\n" not in str(error)
        path.write_bytes(data)
    return noticed


def test_damage_is_noticed_or_harmless(tmp_path, made):
    assert _fuzz_folder(made[0], tmp_path, 60) > 30


@pytest.mark.slow
def test_damage_is_noticed_or_harmless_2000_times(tmp_path, made):
    assert _fuzz_folder(made[0], tmp_path, 2000) > 1000


def test_a_lost_file_is_named(tmp_path, made):
    for name in ("train.index", "train.records.jsonl", "echovlm-train.array_record-00001-of-00003"):
        copy = tmp_path / name
        shutil.copytree(made[0], copy)
        (copy / name).unlink()
        with pytest.raises(InputError, match=name):
            open_dataset(copy)


def test_a_forged_manifest_is_noticed(tmp_path, made):
    copy = tmp_path / "copy"
    shutil.copytree(made[0], copy)
    manifest = json.loads((copy / folder.MANIFEST).read_text())
    manifest["organs"] = ["x", "y", "z"]
    (copy / folder.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="is damaged"):
        open_dataset(copy)
