"""`data build --burned-in`: what is stored has no name in its pixels; what is left out counts."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image

from echovlm_jax.cli import main
from echovlm_jax.data import build as building
from echovlm_jax.data import folder
from echovlm_jax.data.build import Options, build, validate
from echovlm_jax.data.dataset import open_dataset
from echovlm_jax.processing import burned_in
from echovlm_jax.processing.burned_in import Box
from echovlm_jax.processing.dicom import read_loop
from tests.data.sources import record, write
from tests.processing.test_burned_in import NAME, reader, written
from tests.processing.test_dicom import new_dicom, region, save

ALL = Options(validation=0, test=0)
NOTED = ("burned_in", "drawn_outside", "text_found", "text_unchecked", "masked")


@pytest.fixture
def exams(tmp_path):
    """A clean PNG, one with a name, a clean loop, and one with a name outside its region."""
    records = [record(n) for n in range(4)]
    for n in (2, 3):
        records[n]["image"] = [f"{n}.dcm"]
    sources, images = write(tmp_path, records)
    Image.fromarray(np.full((120, 320, 3), 40, np.uint8)).save(images / "0_0.png")
    Image.fromarray(written(NAME)).save(images / "1_0.png")
    for n, text in ((2, ""), (3, NAME)):
        frames = np.stack([written(text)] * 3)
        frames[:, 80:] = np.arange(3)[:, None, None, None] + 90
        regions = [region(1, 0, 80, 319, 119)]
        save(new_dicom(frames, "RGB", SequenceOfUltrasoundRegions=regions), images / f"{n}.dcm")
    return sources, images


@pytest.fixture
def finds(monkeypatch):
    """In place of OCR: it finds the name where something white is."""

    def read(picture):
        name = (picture[10:60] > 250).any()
        result = reader(*[NAME] * bool(name), boxes=[Box(15, 50, 15, 250)])()
        return result(picture)

    monkeypatch.setattr(burned_in, "_reader", lambda: read)
    monkeypatch.setattr(building, "engine", lambda: "a reader 1.0")


def stored(out):
    dataset = open_dataset(str(out), "train")
    return {dataset.record(i).id: dataset.media(i)[0] for i in range(len(dataset))}


def counts(result):
    return tuple(result[name] for name in NOTED)


def test_each_choice(exams, finds, tmp_path, capfd):
    found = {}
    for choice in (None, "report", "mask", "refuse"):
        options = ALL._replace(burned_in=choice)
        found[choice] = build(*exams, tmp_path / f"{choice}", options)
        checked = validate(*exams, options)
        assert counts(checked) == counts(found[choice])
        assert checked["quarantined"] == found[choice]["quarantined"]
    assert counts(found[None]) == (0, 1, None, None, None)
    assert counts(found["report"]) == (0, 1, 2, 0, 0)
    assert counts(found["mask"]) == (0, 1, 1, 0, 2)
    assert found["refuse"]["quarantined"] == {"burned-in text": 2}
    assert found["refuse"]["kept"] == 2 and not any(counts(found["refuse"]))
    original, masked = stored(tmp_path / "None"), stored(tmp_path / "mask")
    assert original.keys() == masked.keys() == stored(tmp_path / "report").keys()
    strokes = written(NAME).max(axis=-1) > 0
    for id, pixels in masked.items():
        named = id in ("liver/exam1", "liver/exam3")
        np.testing.assert_array_equal(pixels[..., 80:, :, :], original[id][..., 80:, :, :])
        assert named != np.array_equal(pixels, original[id])
        if named:
            assert original[id][..., strokes, :].any() and not pixels[..., strokes, :].any()
    named = (tmp_path / "None" / folder.shard_name("train", 0, 1)).read_bytes()
    whole = (exams[1] / "1_0.png").read_bytes()
    assert whole[-2000:-20] in named
    for choice in ("mask", "refuse"):  # the original isn't kept
        files = [path.read_bytes() for path in (tmp_path / choice).iterdir()]
        assert not any(whole[-2000:-20] in data for data in files)
        assert not any(b"KOWALSKI" in data for data in files)
    assert main(["data", "stats", str(tmp_path / "mask"), "--json"]) == 0  # digests agree
    assert "KOWALSKI" not in "".join(capfd.readouterr())


def test_ocr_itself(exams, tmp_path, capfd):
    pytest.importorskip("rapidocr", reason="the extra `ocr` is not installed")
    (source,), images = exams
    source.write_text(json.dumps(json.loads(source.read_text())[1:2]))
    words = ["--source", str(source), "--images", str(images), "--workers", "1", "--json"]
    assert main(["data", "build", *words, "--out", str(tmp_path / "out"), "--burned-in=mask"]) == 0
    printed = capfd.readouterr()
    assert counts(json.loads(printed.out)) == (0, 0, 1, 0, 1)
    (pixels,) = stored(tmp_path / "out").values()
    assert not pixels[written(NAME).max(axis=-1) > 0].any()
    assert "KOWALSKI" not in printed.out + printed.err


def test_another_choice_takes_up_no_part_of_a_killed_build(exams, finds, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    build(*exams, tmp_path / "want", ALL._replace(burned_in="mask"))
    for choice, engine in (("report", "a reader 1.0"), (None, ""), ("mask", "a reader 0.9")):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(building, "_finish", kill)
            patch.setattr(building, "engine", lambda engine=engine: engine)
            build(*exams, tmp_path / "out", ALL._replace(burned_in=choice))
    made = []
    real = building.parts._write
    monkeypatch.setattr(building.parts, "_write", lambda *job: (made.append(1), real(*job)))
    build(*exams, tmp_path / "out", ALL._replace(burned_in="mask"))
    assert made  # not those of another release either
    for name in (path.name for path in (tmp_path / "want").iterdir()):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "want" / name).read_bytes()


def test_what_could_not_be_looked_at(exams, monkeypatch, tmp_path):
    monkeypatch.setattr(burned_in, "_reader", reader(error=ValueError(NAME)))
    monkeypatch.setattr(building, "engine", lambda: "a reader 1.0")
    for choice in ("mask", "refuse"):
        result = validate(*exams, ALL._replace(burned_in=choice))
        assert result["quarantined"] == {"burned-in text": 4}
        assert NAME not in json.dumps(result)
    result = validate(*exams, ALL._replace(burned_in="report"))
    assert result["ok"] and result["text_unchecked"] == 4


def test_without_ocr_it_is_one_line_and_nothing_is_made(exams, tmp_path, monkeypatch, capsys):
    def missing(name):
        raise burned_in.PackageNotFoundError(name)

    monkeypatch.setattr(burned_in, "version", missing)
    (sources, images), before = exams, sorted(tmp_path.iterdir())
    words = ["--source", str(sources[0]), "--images", str(images), "--workers", "1"]
    for command in (["build", "--out", str(tmp_path / "out")], ["validate"]):
        assert main(["data", *command, *words, "--burned-in", "mask"]) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and "echovlm-jax[ocr]" in printed.err
        assert sorted(tmp_path.iterdir()) == before
    assert main(["data", "validate", *words]) == 0  # which needs none


def test_the_header_and_the_regions_of_a_dicom(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (1, 12, 10, 3), np.uint8)
    regions = [region(1, 2, 3, 5, 6), region(2, 4, 5, 7, 9)]
    for said, states in (("YES", True), ("NO", False), ("", False)):
        dataset = new_dicom(
            colour, "RGB", SequenceOfUltrasoundRegions=regions, BurnedInAnnotation=said
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = save(dataset, tmp_path / "a.dcm")
        assert read_loop(path).burned_in is states
    assert read_loop(path).regions == (Box(3, 7, 2, 6), Box(5, 10, 4, 8))
    assert read_loop(path, crop=True).regions == (Box(0, 4, 0, 4), Box(2, 7, 2, 6))
    dataset = new_dicom(
        colour, "RGB", SequenceOfUltrasoundRegions=[*regions, region(1, 0, 0, 99, 99)]
    )
    assert read_loop(save(dataset, tmp_path / "b.dcm")).regions == ()  # unknown, then
