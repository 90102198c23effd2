"""What pictures tell of records that belong together, and what they must never tell."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage, generate_uid

from echovlm_jax.cli import main
from echovlm_jax.data import build as building
from echovlm_jax.data import parts, survey
from echovlm_jax.data.build import Options, build, validate
from echovlm_jax.data.dataset import FolderDataset
from echovlm_jax.data.folder import read_manifest
from echovlm_jax.data.groups import NUMBERS
from echovlm_jax.errors import InputError
from tests.data.sources import encoded, pixels, record, write

SHARES = Options(validation=0.25, test=0.25)
ALL = Options(validation=0, test=0)


def splits_of(out):
    """Of each record its split."""
    found = {}
    for split in read_manifest(out)["splits"]:
        dataset = FolderDataset(out, split)
        found |= {dataset.record(i).id: split for i in range(len(dataset))}
    return found


def pairs_are_together(out, count):
    found = splits_of(out)
    assert len(found) == 2 * count and len(set(found.values())) == 3
    return all(found[f"liver/exam{n}"] == found[f"liver/exam{n + count}"] for n in range(count))


def test_one_picture_under_two_names_is_in_one_split(tmp_path):
    sources, images = write(tmp_path, [record(n) for n in range(24)])
    for n in range(12):
        path, other = images / f"{n}_0.png", images / f"{n + 12}_0.png"
        other.unlink()
        if n % 3 == 0:
            os.symlink(path, other)
        elif n % 3 == 1:  # other bytes, the same pixels
            Image.open(path).save(other, compress_level=0)
        else:
            other.write_bytes(path.read_bytes())
    report = build(sources, images, tmp_path / "out", SHARES)
    assert report["groups"] == {"file": 4, "pixels": 12} and report["largest_group"] == 2
    assert report["ungrouped"] == report["unnamed"] == 24
    assert any("nothing names patients" in line for line in report["warnings"])
    assert pairs_are_together(tmp_path / "out", 12)


def test_conversations_of_one_entry_are_in_one_split(tmp_path):
    """Without a picture too, that would tie them: they may say the same in other words."""

    def turns(text):
        return [{"from": "human", "value": text}, {"from": "gpt", "value": text}]

    entries = [
        {"id": n, "conversations_zh": turns("甲"), "conversations_en": turns("A")}
        for n in range(24)
    ]
    sources, images = write(tmp_path, [])
    sources[0].write_text(json.dumps(entries))
    report = build(sources, images, tmp_path / "out", SHARES)
    assert report["groups"] == {"entry": 24} and report["ungrouped"] == 48
    found = splits_of(tmp_path / "out")
    assert len(set(found.values())) == 3
    for n in range(24):
        assert len({found[f"liver/{n}/conversations_{name}"] for name in ("zh", "en")}) == 1


def test_splits_do_not_hang_on_the_order_of_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "SHARD_RECORDS", 7)
    records = [record(n, patient_id=n % 7) for n in range(20)]
    one, images = write(tmp_path, records, "liver.json")
    other, _ = write(tmp_path, [record(n, patient_id=n % 9) for n in range(9)], "breast.json")
    found = []
    for n, sources in enumerate(([*one, *other], [*other, *one])):
        build(sources, images, tmp_path / str(n), SHARES)
        found.append(splits_of(tmp_path / str(n)))
    assert found[0] == found[1] and len(set(found[0].values())) > 1


def test_pictures_of_one_colour_tie_nothing(tmp_path):
    sources, images = write(tmp_path, [record(n) for n in range(4)])
    for n in range(4):
        Image.new("RGB", (30, 20), (80, 80, 80)).save(images / f"{n}_0.png")
    report = build(sources, images, tmp_path / "out", ALL)
    assert (report["groups"], report["near_duplicates"]) == ({}, 0)


def test_near_duplicates_across_splits_are_counted(tmp_path, capsys):
    sources, images = write(tmp_path, [record(n) for n in range(24)])
    for n in range(12):  # a picture, and a copy as JPEG
        small = Image.fromarray(pixels(n, 6, 8)).resize((160, 120), Image.Resampling.BICUBIC)
        small.save(images / f"{n}_0.png")
        small.save(images / f"{n + 12}_0.png", "JPEG", quality=70)
    words = ["--source", str(sources[0]), "--images", str(images), "--workers", "1"]
    words += ["--out", str(tmp_path / "out"), "--validation", "0.3", "--test", "0.3"]
    assert main(["data", "build", *words]) == 0
    found = splits_of(tmp_path / "out")
    apart = sum(found[f"liver/exam{n}"] != found[f"liver/exam{n + 12}"] for n in range(12))
    printed = capsys.readouterr()
    assert f"near_duplicates: {apart}\n" in printed.out and apart > 1
    assert f"{apart} records of validation or test have a picture that nearly" in printed.err
    assert main(["data", "stats", str(tmp_path / "out")]) == 0
    assert f"near-duplicates across splits: {apart}" in capsys.readouterr().out


def dicom(path, seed, **header):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = (
        UltrasoundImageStorage,
        ExplicitVRLittleEndian,
    )
    meta.MediaStorageSOPInstanceUID = generate_uid()
    image = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    image.SOPClassUID, image.SOPInstanceUID = (
        UltrasoundImageStorage,
        meta.MediaStorageSOPInstanceUID,
    )
    image.Rows, image.Columns, image.SamplesPerPixel = 20, 30, 1
    image.PhotometricInterpretation, image.PixelRepresentation = "MONOCHROME2", 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 8, 8, 7
    image.PixelData = pixels(seed)[..., 0].tobytes()
    for key, value in header.items():
        setattr(image, key, value)
    dcmwrite(path, image, enforce_file_format=True)


def test_dicom_ids_tie_and_are_told_nobody(tmp_path, capsys, monkeypatch):
    """Of 24 records two each share a PatientID, or else a StudyInstanceUID; one names its patient
    itself, by the id that another's file holds."""
    monkeypatch.setattr(building, "_discard", lambda work: None)  # what a kill leaves
    records = [record(n) for n in range(24)]
    records[0]["patient_id"] = "MRN-7770"
    sources, images = write(tmp_path, records)
    for n in range(1, 24):
        keys = {"PatientID": f" MRN-777{n % 12}", "PatientName": "Doe^Jane"}
        if n % 2:
            keys = {"StudyInstanceUID": f"1.2.777.{n % 12}", "PatientName": "Doe^Jane"}
        dicom(images / f"{n}_0.png", n, **keys)
    words = ["--source", str(sources[0]), "--images", str(images), "--workers", "1", "--json"]
    words += ["--out", str(tmp_path / "out"), "--validation", "0.25", "--test", "0.25"]
    assert main(["data", "build", *words]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["groups"] == {"patient_id": 1, "dicom_patient": 6, "dicom_study": 6}
    assert (report["ungrouped"], report["unnamed"]) == (0, 12)
    assert pairs_are_together(tmp_path / "out", 12)
    assert list((tmp_path / "out.partial").glob("look-*"))
    written = {*tmp_path.rglob("*")} - {*images.rglob("*"), *sources}
    texts = [path.read_bytes() for path in written if path.is_file()]
    for data in (*texts, printed.out.encode(), printed.err.encode()):
        assert not any(sign in data for sign in (b"MRN-777", b"1.2.777", b"Doe"))
    # Nor as keys that a list of all ids would lead back: the same ids have others each time.
    keys = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        salt = survey.new_salt()
        found, plan = building._prepare(sources, images, ALL, salt)
        jobs = survey.prepare(folder, found, plan, 100)
        survey.look(str(folder), 0, salt=salt)
        ties = survey.gather(folder, jobs, plan, 24).ties
        named = np.isin(ties["kind"], [NUMBERS["dicom_patient"], NUMBERS["dicom_study"]])
        keys.append(set(ties["key"][named].tolist()))
    assert len(keys[0]) == len(keys[1]) == 12 and not keys[0] & keys[1]


def repainted(images, change):
    """Other pixels, in files of the same size and time."""
    for path in images.iterdir():
        before = path.stat()
        change(path)
        if path.exists():
            assert path.stat().st_size == before.st_size
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flat_png(value):
    out = io.BytesIO()
    Image.fromarray(np.full((20, 30), value, np.uint8) + np.eye(20, 30, dtype=np.uint8)).save(
        out, "PNG", compress_level=0
    )
    return out.getvalue()


class _Killed(BaseException):
    pass


def killed_build(sources, images, out, monkeypatch, after, options=ALL):
    real, made = parts._write, []

    def write_some(work, plan, part):
        if len(made) == after:
            raise _Killed
        made.append(part.number)
        real(work, plan, part)

    monkeypatch.setattr(parts, "_write", write_some)
    with pytest.raises(_Killed):
        build(sources, images, out, options)
    made.clear()
    monkeypatch.setattr(parts, "_write", lambda *job: (made.append(job[2].number), real(*job)))
    return made


def test_a_resumed_build_takes_no_picture_from_before(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "SHARD_RECORDS", 2)
    sources, images = write(tmp_path, [record(n) for n in range(10)])
    for path in images.iterdir():
        path.write_bytes(flat_png(200))
    made = killed_build(sources, images, tmp_path / "out", monkeypatch, after=3)
    repainted(images, lambda path: path.write_bytes(flat_png(1)) if "5_0" not in path.name else 0)
    (images / "1_0.png").unlink()
    report = build(sources, images, tmp_path / "out", ALL)
    assert made == [0, 1, 2, 3, 4] and report["quarantined"] == {"missing image": 1}
    dataset = FolderDataset(tmp_path / "out")
    highest = {dataset.record(i).id: int(dataset.media(i)[0].max()) for i in range(len(dataset))}
    assert highest == {f"liver/exam{n}": 201 if n == 5 else 2 for n in range(10) if n != 1}


def test_only_parts_whose_pictures_changed_are_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "SHARD_RECORDS", 2)
    sources, images = write(tmp_path, [record(n) for n in range(10)])
    made = killed_build(sources, images, tmp_path / "out", monkeypatch, after=4)
    decoded = []
    real = survey.read_medium
    monkeypatch.setattr(
        survey, "read_medium", lambda file, **o: decoded.append(file) or real(file, **o)
    )
    (images / "2_0.png").write_bytes(encoded(99))
    build(sources, images, tmp_path / "out", ALL)
    assert made == [1, 4] and [path.name for path in decoded] == ["2_0.png"]
    build(sources, images, tmp_path / "whole", ALL)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.parametrize("options", [Options(0, 0, num_frames=8), Options(0, 0, crop=True)])
def test_other_options_take_no_part_from_before(tmp_path, monkeypatch, options):
    monkeypatch.setattr(building, "SHARD_RECORDS", 2)
    sources, images = write(tmp_path, [record(n) for n in range(4)])
    made = killed_build(sources, images, tmp_path / "out", monkeypatch, after=1)
    build(sources, images, tmp_path / "out", options)
    assert made == [0, 1]


def test_what_changes_while_it_is_built_is_noticed(tmp_path, monkeypatch):
    sources, images = write(tmp_path, [record(n) for n in range(3)])
    real = parts._write

    def change_first(work, plan, part):
        (images / "1_0.png").write_bytes(encoded(99))
        real(work, plan, part)

    monkeypatch.setattr(parts, "_write", change_first)
    with pytest.raises(InputError, match="images: has changed while the dataset was built"):
        build(sources, images, tmp_path / "out", ALL)
    monkeypatch.setattr(parts, "_write", real)
    finish = building._finish

    def change_source(*words):
        sources[0].write_text(json.dumps([record(0)]))
        return finish(*words)

    monkeypatch.setattr(building, "_finish", change_source)
    with pytest.raises(InputError, match=r"liver\.json: has changed while the dataset was built"):
        build(sources, images, tmp_path / "out", ALL)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(building, "_finish", finish)
    assert build(sources, images, tmp_path / "out", ALL)["records"] == 1


def test_the_pattern_names_patients(tmp_path, capsys):
    records = [record(n, id=f"bus_{n % 12:04}-{'lr'[n // 12]}") for n in range(24)]
    records += [record(24, id="other"), record(25)]
    sources, images = write(tmp_path, records)
    words = ["--source", str(sources[0]), "--images", str(images), "--workers", "1", "--json"]
    words += ["--group-pattern", r"(bus_\d+)"]
    assert main(["data", "validate", *words]) == 0
    words += ["--out", str(tmp_path / "out"), "--validation", "0.25", "--test", "0.25"]
    checked = json.loads(capsys.readouterr().out)
    assert main(["data", "build", *words]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    for found in (report, checked):
        assert (found["groups"], found["ungrouped"]) == ({"pattern": 12}, 2)
    assert "finds no group in 2 of 26 records, the first is 'other'" in printed.err
    splits = splits_of(tmp_path / "out")
    assert all(splits[f"liver/bus_{n:04}-l"] == splits[f"liver/bus_{n:04}-r"] for n in range(12))
    assert len(set(splits.values())) == 3
    for bad in ("(", "bus"):
        assert (
            main(
                [
                    "data",
                    "build",
                    *words[:-6],
                    "--out",
                    str(tmp_path / "no"),
                    "--group-pattern",
                    bad,
                ]
            )
            == 2
        )
        assert "--group-pattern" in capsys.readouterr().err


def test_validate_writes_nothing_and_counts_alike(tmp_path):
    sources, images = write(tmp_path, [record(n, patient_id="p") for n in range(3)])
    checked = validate(sources, images, ALL)
    report = build(sources, images, tmp_path / "out", ALL)
    for key in ("groups", "ungrouped", "unnamed", "largest_group", "near_duplicates", "warnings"):
        assert checked[key] == report[key]
