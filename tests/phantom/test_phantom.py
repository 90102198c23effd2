"""The phantom: the same everywhere, sound in its physics; its texts follow its pictures."""

import dataclasses
import hashlib
import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from echovlm_jax.data.build import build
from echovlm_jax.data.dataset import open_dataset
from echovlm_jax.data.record import ORGANS
from echovlm_jax.errors import InputError
from echovlm_jax.phantom import PhantomDataset, contact_sheet, write_exams
from echovlm_jax.phantom import dataset as dataset_module
from echovlm_jax.phantom.acoustics import Probe, beam_levels, empty_tissue
from echovlm_jax.phantom.exam import DIAGNOSES, PAPER_COUNTS, PROFILES, make_exam
from echovlm_jax.phantom.render import HEADER, RULER, render
from echovlm_jax.phantom.reports import reports
from echovlm_jax.phantom.words import ATTRIBUTES
from echovlm_jax.phantom.words import DIAGNOSES as NAMES
from echovlm_jax.processing.dicom import read_dicom

EVERY = [(organ, diagnosis) for organ in ORGANS for diagnosis in DIAGNOSES[organ]]


def exams_of(organ, diagnosis, count, cine=0.0):
    found = (make_exam(key, organ, cine=cine) for key in range(10**6))
    some = (exam for exam in found if exam.diagnosis == diagnosis)
    return [next(some) for _ in range(count)]


def digest(dataset, numbers):
    out = hashlib.sha256()
    for i in numbers:
        out.update(repr(dataset.record(i)).encode())
        for pixels in dataset.media(i):
            out.update(repr(pixels.shape).encode() + pixels.tobytes())
    return out.hexdigest()


def test_same_bytes_in_another_process():
    code = (
        "from tests.phantom.test_phantom import PhantomDataset, digest;"
        "print(digest(PhantomDataset('test', balanced=True), range(4)))"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest(PhantomDataset("test", balanced=True), range(4))


def test_exams_stay_what_they_were():
    # Another value here means other exams: raise VERSION in phantom/dataset.py with it, so that
    # plans made for the old ones are not used.
    texts, pixels = hashlib.sha256(), hashlib.sha256()
    dataset = PhantomDataset("train", 64, balanced=True)
    for i in range(14):
        # Plans are made for texts and sizes; seconds between frames are not among them.
        texts.update(re.sub(r", seconds=[^)]*", "", repr(dataset.record(i))).encode())
        pixels.update(b"".join(image.tobytes() for image in dataset.media(i)))
    assert (dataset_module.VERSION, texts.hexdigest()[:16], pixels.hexdigest()[:16]) == GOLDEN


GOLDEN = (1, "5bfd9ab4ce5a138e", "ab2206851ba881e8")


def test_record_and_media_agree_and_record_renders_nothing(monkeypatch):
    dataset = PhantomDataset("train", 60)
    loops = 0
    for i in range(0, 60, 5):
        record, media = dataset.record(i), dataset.media(i)
        assert record.synthetic and record.organ == ORGANS[dataset.organs[i]]
        assert 1 <= len(media) <= 4
        for medium, pixels in zip(record.media, media, strict=True):
            frames = (medium.frames,) * (medium.frames > 0)
            assert pixels.shape == (*frames, medium.height, medium.width, 3)
            assert pixels.dtype == np.uint8
            assert min(medium[1:3]) >= 168 and max(medium[1:3]) <= 336
            loops += medium.frames > 0
    assert loops
    monkeypatch.setattr(dataset_module, "render", None)
    dataset.record(0)
    with pytest.raises(TypeError):
        dataset.media(0)


def test_splits_share_no_exam_and_size_changes_none():
    keys = [
        {PhantomDataset(split).exam(i).key for i in range(200)}
        for split in ("train", "validation", "test")
    ]
    assert len(set.union(*keys)) == 600
    small, large = PhantomDataset("train", 50), PhantomDataset("train", 90)
    assert all(small.record(i) == large.record(i) for i in range(0, 50, 7))
    assert small.fingerprint != large.fingerprint
    assert [len(PhantomDataset(s)) for s in ("train", "validation", "test")] == [4096, 256, 512]


@pytest.mark.parametrize("balanced", [False, True])
def test_organs_are_as_frequent_as_stated(balanced):
    organs = PhantomDataset("train", 5000, balanced=balanced).organs
    shares = np.ones(7) / 7 if balanced else np.array(PAPER_COUNTS) / sum(PAPER_COUNTS)
    for size in (500, 5000):  # any beginning is a fair sample
        assert np.abs(np.bincount(organs[:size], minlength=7) - shares * size).max() < 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "tset"}, "tset"),
        ({"size": 0}, "size"),
        ({"cine": 2}, "cine"),
        ({"cine_frames": 0}, "cine_frames"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        PhantomDataset(**arguments)


# The texts.


@pytest.mark.parametrize(("organ", "diagnosis"), EVERY)
def test_texts_follow_from_parameters(organ, diagnosis):
    for exam in exams_of(organ, diagnosis, 3):
        for at, report in zip((1, 0), reports(exam), strict=True):
            assert report.diagnosis == NAMES[organ][diagnosis][at]
            assert report.impression.casefold().startswith(report.diagnosis.casefold())
            told = report.findings + report.caption
            numbers = re.findall(r"\d+(?:\.\d+)? mm", report.findings)
            assert numbers == ([f"{exam.size:g} mm"] if exam.size else [])
            if exam.lesion is None:
                continue
            for field in ("echo", "place"):
                word = getattr(exam.lesion, field)
                if not word:
                    continue
                words = {name: ATTRIBUTES[field][name][at] for name in ATTRIBUTES[field]}
                assert words[word] in report.findings and words[word] in report.caption
                wrong = [w for name, w in words.items() if name != word and w not in words[word]]
                others = [w for w in wrong if re.search(rf"\b{w}\b" if at == 0 else w, told)]
                assert others == [], told
            if organ != "vessel" and diagnosis != "stone":
                for field in ("shape", "margin"):
                    assert ATTRIBUTES[field][getattr(exam.lesion, field)][at] in report.findings
            if exam.lesion.posterior != "none":
                signs = {"shadow": ("shadow", "声影"), "enhancement": ("enhanced", "增强")}
                assert signs[exam.lesion.posterior][at] in report.findings


def test_findings_have_a_report_s_length():
    lengths = [
        len(PhantomDataset("train").record(i).reports[1].findings.split()) for i in range(99)
    ]
    assert min(lengths) >= 20 and max(lengths) <= 80 and 30 <= np.mean(lengths) <= 60


def test_other_conclusions_mean_other_texts():
    """A statement taken from an exam that concludes otherwise is false of this one."""
    dataset = PhantomDataset("train", 160, balanced=True)
    for at in (0, 1):
        for field in ("findings", "caption"):
            seen: dict[str, set] = {}
            for i in range(160):
                report = dataset.record(i).reports[at]
                seen.setdefault(getattr(report, field), set()).add(report.impression)
            mixed = [text for text, found in seen.items() if len(found) > 1]
            # A caption names neither outline nor calcification, so it may fit two diagnoses.
            assert not mixed or field == "caption"


def test_questions_are_fair():
    """The answer is among the options, in any place as often; half of the claims are right."""
    dataset = PhantomDataset("train", 700)
    places, claims, asked = Counter(), Counter(), Counter()
    for i in range(700):
        record = dataset.record(i)
        zh, en = (report.questions for report in record.reports)
        assert [len(q.options) for q in zh] == [len(q.options) for q in en]
        for question in en:
            asked[bool(question.options)] += 1
            if not question.options:
                continue
            assert question.options.count(question.answer) == 1
            assert len(set(question.options)) == len(question.options)
            if len(question.options) == 5:
                places[question.options.index(question.answer)] += 1
            if set(question.options) == {"True", "False"}:
                claims[question.answer] += 1
                claim = re.split(r"picture of |diagnosis is: ", question.question)[1].rstrip(".")
                assert (claim == record.reports[1].diagnosis) == (question.answer == "True")
    assert min(asked.values()) > 500
    assert abs(claims["True"] - claims["False"]) < 4 * 700**0.5
    total = sum(places.values())
    assert all(abs(places[n] - total / 5) < 4 * (total * 0.16) ** 0.5 for n in range(5))


# The pictures.


def test_speckle_is_fully_developed():
    """A Rayleigh envelope: mean over standard deviation 1.91, at the level that was asked for."""
    probe = Probe(depth=40, width=40)
    tissue = empty_tissue(probe, 240, 240)
    level = beam_levels(tissue, probe, 5).astype(np.float64)
    envelope = 10 ** (level / 20)
    assert abs(envelope.mean() / envelope.std() - 1.91) < 0.08
    assert abs(level.mean()) < 0.3
    tissue.echo -= 12
    assert abs(beam_levels(tissue, probe, 5).mean() + 12) < 0.4


def test_beam_is_narrowest_in_the_focus():
    probe = Probe(depth=40, width=40)
    level = beam_levels(empty_tissue(probe, 240, 240), probe, 5)

    def likeness(rows):  # of neighbours three beams apart
        part = level[rows] - level[rows].mean()
        return (part[:, 3:] * part[:, :-3]).mean() / part.var()

    assert likeness(slice(0, 24)) > likeness(slice(108, 132)) + 0.15


def _behind(exam):
    """Mean grey around and just behind a breast lesion's place, over columns of the picture."""
    view = exam.views[0]._replace(height=230, width=230)
    grey = render(exam, view)[HEADER:, :-RULER, 0].astype(float)
    return grey[int(0.55 * len(grey)) : int(0.65 * len(grey))].mean(axis=0)


def test_lesions_leave_their_mark_behind():
    for exam in exams_of("breast", "fibroadenoma", 2):
        plain = exam.lesion._replace(posterior="none", calcification="none")
        means = {
            sign: _behind(dataclasses.replace(exam, lesion=plain._replace(posterior=sign)))
            for sign in ("none", "enhancement", "shadow")
        }
        assert (means["enhancement"] - means["none"]).max() > 15
        assert (means["shadow"] - means["none"]).min() < -25
        # Beside the lesion nothing changes.
        assert np.median(np.abs(means["shadow"] - means["none"])) < 1


@pytest.mark.parametrize(
    ("organ", "left", "right"),
    [
        ("thyroid", "right lobe", "left lobe"),  # the patient's right is on the picture's left
        ("kidney", "upper pole", "lower pole"),
        ("gynaecology", "right ovary", "left ovary"),
    ],
)
def test_a_cyst_is_where_the_report_says(organ, left, right):
    places = set()
    for exam in exams_of(organ, "cyst", 6):
        darker = without_lesion(exam) - with_lesion(exam) > 60
        middle = darker.shape[1] // 2
        counts = darker[:, :middle].sum(), darker[:, middle:].sum()
        assert max(counts) > 100
        assert exam.lesion.place == (left if counts[0] > counts[1] else right)
        places.add(exam.lesion.place)
    assert len(places) == 2


def with_lesion(exam):
    view = exam.views[0]._replace(height=230, width=241)
    return render(exam, view)[HEADER:, :-RULER, 0].astype(int)


def without_lesion(exam):
    return with_lesion(dataclasses.replace(exam, lesion=None))


@pytest.mark.parametrize(
    ("organ", "upper", "lower"), [("liver", "near", "deep"), ("vessel", "near wall", "far wall")]
)
def test_a_lesion_is_at_its_depth(organ, upper, lower):
    """Where the picture differs most from one without the lesion."""
    diagnosis = "cyst" if organ == "liver" else "soft"
    exams = exams_of(organ, diagnosis, 8)
    assert {exam.lesion.place for exam in exams} == {upper, lower}
    for exam in exams:
        plain = without_lesion(exam)
        most = np.abs(with_lesion(exam) - plain).mean(axis=1).argmax()
        # Above or below the middle of the liver, of the lumen (the darkest there is).
        lumen = np.flatnonzero((plain < 20).mean(axis=1) > 0.5)
        middle = len(plain) / 2 if organ == "liver" else lumen.mean()
        assert (most < middle) == (exam.lesion.place == upper), (most, middle)


def test_sector_pictures_are_black_outside_the_fan():
    for organ, corner in (("liver", True), ("heart", True), ("breast", False)):
        exam = make_exam(3, organ, cine=0)
        grey = render(exam, exam.views[0])[..., 0]
        assert (grey[HEADER : HEADER + 12, :12].max() == 0) == corner


def test_every_picture_says_that_it_is_synthetic():
    labels = set()
    for organ in ORGANS:
        exam = make_exam(7, organ, cine=1.0, cine_frames=2)
        pixels = render(exam, exam.views[0])
        for frame in pixels.reshape(-1, *pixels.shape[-3:]):
            labels.add(frame[:HEADER, :44].tobytes())
    (label,) = labels
    assert max(label) == 200


def test_heart_beats():
    """The left ventricle of a normal heart empties and fills; a dilated one hardly does."""
    dark = {}
    for diagnosis in ("normal", "dilated"):
        exam = next(e for e in exams_of("heart", diagnosis, 50, cine=1.0) if e.views[0].frames)
        loop = render(exam, exam.views[0])[:, HEADER:, :-RULER, 0]
        middle = loop[:, : loop.shape[1] * 6 // 10, loop.shape[2] // 3 : -(loop.shape[2] // 3)]
        dark[diagnosis] = (middle < 30).mean(axis=(1, 2))
        assert not np.array_equal(loop[0], loop[4])
    swing = {name: (values[0] - values[4]) / values[0] for name, values in dark.items()}
    assert swing["normal"] > 0.12 and swing["normal"] > 2 * swing["dilated"]


# What a linear probe reads from the pictures, and a guesser from the texts.


def features(image, side=20):
    """Raw pixels, made small: [side², ] and a constant."""
    small = Image.fromarray(image[HEADER:, :-RULER, 0]).resize((side, side), Image.Resampling.BOX)
    return np.append(np.asarray(small, np.float64).ravel() / 255, 1)


def probe(inputs, labels, split, strength=3.0):
    """Held-out answers of ridge regression on one-hot labels."""
    names = sorted(set(labels))
    onehot = np.array([[label == name for name in names] for label in labels[:split]], float)
    x = inputs[:split]
    gram = x @ x.T + strength * np.eye(len(x))
    weights = x.T @ np.linalg.solve(gram, onehot - onehot.mean(axis=0))
    scores = inputs[split:] @ weights + onehot.mean(axis=0)
    return [names[n] for n in scores.argmax(axis=1)]


def right(answers, labels):
    return sum(a == b for a, b in zip(answers, labels, strict=True))


def clearly_above(correct, labels):
    """More right answers than always saying the commonest, by four standard deviations."""
    n, p = len(labels), max(Counter(labels).values()) / len(labels)
    return correct > n * p + 4 * (n * p * (1 - p)) ** 0.5


def probe_organ(train, test):
    parts = [
        (PhantomDataset(s, n, balanced=True), n) for s, n in (("train", train), ("test", test))
    ]
    exams = [part.exam(i) for part, n in parts for i in range(n)]
    inputs = np.stack([features(render(e, e.views[0]._replace(frames=0))) for e in exams])
    labels = [e.organ for e in exams]
    return right(probe(inputs, labels, train), labels[train:]) / test


def probe_attributes(organ, fields, train, test):
    """Held-out right answers of lesions' attributes, with the labels: {field: (right, labels)}."""
    found = (make_exam(key, organ, cine=0) for key in range(10**6))
    some = (e for e in found if e.lesion is not None)
    exams = [next(some) for _ in range(train + test)]
    inputs = np.stack([features(render(e, e.views[0])) for e in exams])
    out = {}
    for field in fields:
        labels = [getattr(e.lesion, field) for e in exams]
        out[field] = right(probe(inputs, labels, train), labels[train:]), labels[train:]
    return out


def test_linear_probe_tells_organs_from_raw_pixels():
    assert probe_organ(84, 42) >= 0.95


def test_linear_probe_tells_attributes_from_raw_pixels():
    for field, (correct, labels) in probe_attributes("thyroid", ("echo", "place"), 100, 50).items():
        assert clearly_above(correct, labels), (field, correct, Counter(labels))


@pytest.mark.slow
def test_linear_probe_on_more_exams():
    assert probe_organ(700, 350) >= 0.95
    for organ, fields in (
        ("breast", ("echo", "posterior")),
        ("thyroid", ("echo", "place", "posterior")),
        ("liver", ("echo", "place")),
        ("gynaecology", ("echo", "place")),
    ):
        for field, (correct, labels) in probe_attributes(organ, fields, 400, 200).items():
            assert clearly_above(correct, labels), (organ, field, correct, Counter(labels))


def test_nobody_guesses_from_the_words_alone():
    """For each question and set of options, the answer that was commonest in training, at best."""
    learnt: dict[str, Counter] = {}
    kinds = {
        "organ": r"organ",
        "diagnosis": r"diagnosis\?|diagnosis fits",
        "claim": r"True or|true\?",
    }
    for name, size in (("train", 700), ("test", 300)):
        dataset, scores = PhantomDataset(name, size), {kind: [0, 0] for kind in kinds}
        for i in range(size):
            for question in dataset.record(i).reports[1].questions:
                if not question.options:
                    continue
                at = question.question + "|" + "|".join(sorted(question.options))
                if name == "train":
                    learnt.setdefault(at, Counter())[question.answer] += 1
                    continue
                guess = learnt[at].most_common(1)[0][0] if at in learnt else question.options[0]
                for kind, pattern in kinds.items():
                    if re.search(pattern, question.question):
                        scores[kind][0] += guess == question.answer
                        scores[kind][1] += 1
                        break
    shares = {kind: hits / total for kind, (hits, total) in scores.items()}
    # The commonest organ of four; one diagnosis of five; a coin.
    assert shares["organ"] < 0.75 and shares["diagnosis"] < 0.32 and shares["claim"] < 0.62, shares


# Files.


def test_written_exams_are_built_as_they_are(tmp_path):
    made = write_exams(tmp_path / "phantom", 12, 0, cine=1.0)
    assert made["exams"] == 12 and made["loops"] > 0 and made["synthetic"]
    (listed,) = (tmp_path / "phantom").glob("*.json")
    entries = json.loads(listed.read_text(encoding="utf-8"))
    assert {"id", "image", "conversations", "organ", "patient_id", "reports"} <= set(entries[0])
    build([listed], tmp_path / "phantom", tmp_path / "built")
    found = {}
    for split in json.loads((tmp_path / "built" / "manifest.json").read_text())["splits"]:
        dataset = open_dataset(tmp_path / "built", split)
        found |= {dataset.record(i).id.split("/")[-1]: (dataset, i) for i in range(len(dataset))}
    assert len(found) == 12
    base = int(dataset_module.mix(dataset_module.text_key("phantom/files"), 0))
    for n, entry in enumerate(entries[:6]):
        dataset, i = found[entry["id"]]
        exam = make_exam(int(dataset_module.mix(base, 1, n)), entry["organ"], cine=1.0)
        record = dataset.record(i)
        assert record.synthetic and record.organ == exam.organ
        assert {r.language: r for r in record.reports} == {r.language: r for r in reports(exam)}
        for view, pixels in zip(exam.views, dataset.media(i), strict=True):
            assert np.array_equal(pixels, render(exam, view))


def test_written_files_carry_nobody_s_data(tmp_path):
    write_exams(tmp_path, 8, 3, cine=1.0)
    loops, images = sorted(tmp_path.glob("images/*.dcm")), sorted(tmp_path.glob("images/*.png"))
    header = pydicom.dcmread(loops[0])
    assert header.SOPClassUID == "1.2.840.10008.5.1.4.1.1.3.1" and header.Modality == "US"
    assert not header.PatientName and not header.PatientID and not header.StudyDate
    assert "SYNTHETIC" in header.SeriesDescription
    assert read_dicom(loops[0], num_frames=16).shape[0] == header.NumberOfFrames == 8
    assert "SYNTHETIC" in Image.open(io.BytesIO(images[0].read_bytes())).info["Comment"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="not empty"):
        write_exams(tmp_path, 2, 3)
    write_exams(tmp_path / "again", 8, 3, cine=1.0)
    for path, data in before.items():
        assert (tmp_path / "again" / path.relative_to(tmp_path)).read_bytes() == data


@pytest.mark.parametrize("language", ["zh", "en"])
def test_texts_may_be_in_one_language_alone(tmp_path, language):
    write_exams(tmp_path / "both", 6, 3, views=1)
    write_exams(tmp_path / "one", 6, 3, views=1, language=language)
    both, one = (json.loads((tmp_path / n / "phantom.json").read_text()) for n in ("both", "one"))
    for whole, exam in zip(both, one, strict=True):
        [report] = exam["reports"]
        assert report == next(r for r in whole["reports"] if r["language"] == language)
        assert report["findings"] in exam["conversations"][1]["value"]
        assert exam["image"] == whole["image"]
    with pytest.raises(InputError, match="language must be one of zh, en, found 'fr'"):
        write_exams(tmp_path / "none", 1, 0, language="fr")


def test_contact_sheet_shows_every_diagnosis(tmp_path):
    told = contact_sheet(tmp_path / "sheet.png", 1)
    assert told["bytes"] < 400_000
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (told["width"], told["height"])
    with pytest.raises(InputError):
        contact_sheet(tmp_path / "missing" / "sheet.png")


def test_every_diagnosis_has_a_profile_and_a_name():
    assert set(PROFILES) == {(o, d) for o, d in EVERY if d != "normal"}
    assert {(o, d) for o, of in NAMES.items() for d in of} == set(EVERY)


def test_exams_of_some_organs_alone(tmp_path):
    made = write_exams(tmp_path / "two", 5, 0, balanced=("liver", "heart"), cine=0.0, views=1)
    assert {organ: n for organ, n in made["organs"].items() if n} == {"liver": 3, "heart": 2}
    said = json.loads((tmp_path / "two" / "phantom.json").read_text("utf-8"))
    assert [entry["organ"] for entry in said] == ["liver", "heart", "liver", "heart", "liver"]
    for wrong in (("liver", "spleen"), ()):
        with pytest.raises(InputError, match="balanced: choose among"):
            write_exams(tmp_path / "wrong", 5, 0, balanced=wrong)
    assert not (tmp_path / "wrong" / "phantom.json").exists()
