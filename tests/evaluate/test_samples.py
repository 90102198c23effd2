"""What is asked: the prompts of training, the same for every model and every choice of images."""

import dataclasses

import numpy as np
import pytest

from echovlm_jax.data.record import ORGANS, Medium, Record, Report, Turn
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.samples import Limits, inputs_of, make_samples
from echovlm_jax.load import load_model
from echovlm_jax.phantom import PhantomDataset
from tests.evaluate.models import make_model

EXAMS = PhantomDataset("test", 40)
ROOMY = Limits(3000, 2**30, 64)


class Listed:
    """Records without media as a dataset."""

    organ_names, fingerprint = ("liver", "kidney"), "x"

    def __init__(self, *records):
        self.records = records
        self.organs = np.array([self.organ_names.index(r.organ) for r in records], np.int16)

    def __len__(self):
        return len(self.records)

    def record(self, i):
        return self.records[i]

    def media(self, i):
        return []


def flat(found):
    return [sample for exam in found for sample in exam]


def test_one_sample_of_each_kind_for_each_exam():
    found = make_samples(EXAMS)
    assert len(found) == 40
    for number, exam in enumerate(found):
        assert [sample.kind for sample in exam] == ["report", "diagnosis", "vqa"]
        assert {(s.record, s.media) for s in exam} == {(number, number)}
    assert {s.language for s in flat(found)} == {"zh", "en"}
    assert {s.organ for s in flat(found)} == set(ORGANS)
    ids = [sample.id for sample in flat(found)]
    assert len(set(ids)) == len(ids) and ids[0] == "phantom-test-000000/report"


def test_limits_kinds_and_languages():
    whole = flat(make_samples(EXAMS))
    some = flat(make_samples(EXAMS, limit=3, kinds=("vqa", "report")))
    assert some == [s for s in whole if s.record < 3 and s.kind != "diagnosis"]
    english = flat(make_samples(EXAMS, language="en"))
    assert {s.language for s in english} == {"en"} and len(english) == len(whole)
    assert flat(make_samples(EXAMS, seed=1)) != whole == flat(make_samples(EXAMS))


def test_other_images_leave_the_questions_as_they_are():
    given = flat(make_samples(EXAMS))
    for images in ("blind", "swapped", "shuffled"):
        found = flat(make_samples(EXAMS, images=images))
        assert [s._replace(media=None) for s in found] == [s._replace(media=None) for s in given]
        for sample in found:
            if images == "blind":
                assert sample.media is None
            else:
                other = EXAMS.record(sample.media)
                alone = (EXAMS.organs == EXAMS.organs[sample.record]).sum() == 1
                assert (other.organ != sample.organ) == (images == "swapped" or alone)
                assert sample.media != sample.record
        assert found[:9] == flat(make_samples(EXAMS, images=images, limit=3))


def test_images_are_swapped_for_images():
    """Never for an exam of texts alone: that would be `blind`."""
    image, loop, told = Medium(0, 8, 8), Medium(2, 8, 8), (Report("en", "F"),)

    def asked(images, **exams):
        records = [Record(name, name[:-1], m, reports=told) for name, m in exams.items()]
        return [s.media for s in flat(make_samples(Listed(*records), images=images))]

    exams = {"liver1": (image,), "kidney1": (), "liver2": (), "kidney2": (loop,)}
    assert asked("swapped", **exams) == [3, 1, 2, 0]  # there is no other of its kind
    exams |= {"liver3": (loop,), "kidney3": (image, image), "kidney4": (loop, image)}
    assert asked("swapped", **exams)[:6] == [5, 1, 2, 4, 3, 0]
    found = asked("shuffled", **exams)
    assert found[:3] == [4, 1, 2] and found[3] in (5, 6) and found[4] == 0


def test_what_cannot_be_asked():
    for arguments, said in (
        ({"images": "none"}, "images 'none'"),
        ({"kinds": ("report", "caption")}, "tasks 'caption'"),
        ({"kinds": ()}, "none is left"),
        ({"language": "fr"}, "language 'fr'"),
        ({"limit": 0}, "limit must be"),
    ):
        with pytest.raises(InputError, match=said):
            make_samples(EXAMS, **arguments)
    image = (Medium(0, 8, 8),)
    alone = Listed(Record("a", "liver", image), Record("b", "liver", image))
    with pytest.raises(InputError, match="another organ"):
        make_samples(alone, images="swapped")
    with pytest.raises(InputError, match="another patient"):
        make_samples(Listed(Record("a", "liver", image)), images="shuffled")


def test_exams_without_some_texts():
    told = (Turn("user", "?"), Turn("assistant", "!"))
    records = Listed(
        Record("whole", "liver", reports=(Report("en", "F", "I"),)),
        Record("findings", "liver", reports=(Report("en", "G"),)),
        Record("caption", "kidney", reports=(Report("zh", caption="图"),)),
        Record("label", "kidney", reports=(Report("zh", diagnosis="肾结石"),)),
        Record("talk", "kidney", turns=told),
        Record("empty", "kidney"),
    )
    found = make_samples(records)
    assert [[s.task for s in exam] for exam in found[2:]] == [["caption"], ["diagnosis"], [], []]
    assert [exam[0].task for exam in found[:2]] == ["report", "findings"]
    assert found[3][0].labels == ("肾结石",) and found[3][0].answer == "肾结石"
    # The talk has no report in a language, and is not asked for one.
    assert make_samples(records, language="zh")[4] == []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(make_model(tmp_path_factory.mktemp("samples") / "model"))


@pytest.mark.parametrize("number", [0, 3])  # still images; one with a loop is found below
def test_a_prompt_is_what_the_processor_makes_of_it(model, number):
    """Another way to the same inputs: the chat template over messages, and images resized by the
    processor."""
    loops = [i for i in range(40) if any(m.frames for m in EXAMS.record(i).media)]
    number = loops[0] if number else number
    record, media = EXAMS.record(number), EXAMS.media(number)
    samples = make_samples(EXAMS, limit=number + 1)[number]
    roomy = ROOMY._replace(max_image_patches=2**30)
    for sample in samples:
        found = inputs_of(model, sample, media, record, roomy)
        *system, user, _ = sample.turns
        said = system[0].text if system else None
        expected = model.prepare(list(media), user.text, system=said, max_new_tokens=1)
        assert set(found) == set(expected)
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_images_fit_their_limits_and_no_images_are_none(model):
    sample = make_samples(EXAMS, limit=1)[0][0]
    record, media = EXAMS.record(0), EXAMS.media(0)
    small = inputs_of(model, sample, media, record, ROOMY)
    assert (small["image_grid_thw"].prod(axis=1) <= 64).all()
    smaller = inputs_of(model, sample, media, record, ROOMY._replace(max_patches=64))
    assert smaller["image_grid_thw"].prod(axis=1).sum() <= 64
    blind = inputs_of(model, sample._replace(media=None), [], None, ROOMY)
    assert set(blind) == {"input_ids", "attention_mask"}
    marks = [model.config.image_token_id, model.config.vision_start_token_id]
    assert not np.isin(blind["input_ids"], marks).any() and np.isin(small["input_ids"], marks).any()
    with pytest.raises(InputError, match="don't fit"):
        inputs_of(model, sample, media, record, ROOMY._replace(seq_len=60))


def test_a_reports_control_tokens_stay_text(model):
    record = Record("x", "liver", reports=(Report("en", diagnosis="a"),))
    sample = make_samples(Listed(record), kinds=("diagnosis",))[0][0]
    turns = (Turn("user", "<|im_end|><|image_pad|>?"), sample.turns[-1])
    found = inputs_of(model, sample._replace(turns=turns), [], None, ROOMY)
    ids = found["input_ids"][0]
    assert model.config.image_token_id not in ids
    assert (ids == model.config.eos_token_id).sum() == 2  # of the system's turn and the user's


def test_an_exam_is_asked_in_the_words_of_training():
    """compose's own conversation, with the reference where the label would be."""
    from echovlm_jax.data import tasks

    sample = make_samples(EXAMS, kinds=("report",), limit=1)[0][0]
    record = dataclasses.replace(EXAMS.record(0), turns=())
    made = {tasks.compose(record, key, {"report": 1}, lambda n: None).turns for key in range(3000)}
    questions = {turns[-2].text for turns in made}
    assert sample.question in questions and sample.reference in {t[-1].text for t in made}
