"""From a key to a sample: the same every time, with distractors of the same organ."""

import dataclasses

import pytest

from echovlm_jax.data.examples import NOTHING, SIDES, NoExample, example, other_record
from echovlm_jax.data.record import Medium, Record
from tests.data.exams import SETTINGS, MemoryDataset, exam, exams, source


def test_others_are_all_of_the_same_organ_but_oneself():
    dataset = MemoryDataset([exam(i, ("heart", "liver")[i % 3 == 0]) for i in range(13)])
    made = source(dataset)
    for number, record in enumerate(dataset.records):
        expected = [r.id for r in dataset.records if r.organ == record.organ and r is not record]
        for start in (0, 7 * len(expected)):  # counted around
            found = [
                other_record(made.dataset, made.peers, number, start + n).id
                for n in range(len(expected))
            ]
            assert found == expected


def test_an_exam_alone_of_its_organ_has_no_others():
    made = source(exams(heart=1, liver=2))
    assert other_record(made.dataset, made.peers, 0, 3) is None


def test_a_key_gives_a_sample_and_its_lengths_add_up():
    made = source(exams(liver=20))
    for number in range(20):
        one = example(made, number, 5 * number)
        assert one == example(made, number, 5 * number)
        assert one.record is made.dataset.records[number]
        assert len(one.vision) == len(one.grids) == len(one.record.media)
        assert one.patches == 4 * sum(n for _, n in one.vision) <= SETTINGS.max_patches
        assert sum(n for _, n in one.vision) < one.tokens <= SETTINGS.seq_len
    assert len({example(made, 0, key).turns for key in range(40)}) > 20


def test_loops_are_videos():
    record = exam(0, media=[Medium(3, 60, 60), Medium(0, 60, 60)])
    one = example(source(MemoryDataset([record])), 0, 0)
    assert one.vision == (("video", 8), ("image", 4))


def test_reasons_name_the_record_and_what_is_wrong():
    mute = Record("mute", "liver", (Medium(0, 60, 60),))
    sliver = dataclasses.replace(exam(1, media=[Medium(0, 10, 4000)]), id="sliver")
    made = source(MemoryDataset([mute, sliver]))
    for number, reason, text in ((0, NOTHING, "record mute"), (1, SIDES, "10 x 4000 pixels")):
        with pytest.raises(NoExample, match=text) as error:
            example(made, number, 0)
        assert error.value.reason == reason and "\n" not in str(error.value)
