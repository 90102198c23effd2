"""What `stats` says of a dataset is what an epoch of it is."""

import dataclasses
import json

import numpy as np
import pytest

from echovlm_jax.data.epoch import make_epoch
from echovlm_jax.data.examples import TOO_LONG, example
from echovlm_jax.data.record import Medium, Report
from echovlm_jax.data.stats import describe, stats_of
from tests.data.exams import SETTINGS, MemoryDataset, exam, exams, source


@pytest.fixture(scope="module")
def found():
    weights = (("heart", 1.0), ("kidney", 0.0), ("liver", 3.0))
    settings = dataclasses.replace(SETTINGS, mix_temperature=None, organ_weights=weights)
    made = source(exams(heart=30, kidney=5, liver=30), settings)
    return made, stats_of(made)


def test_counts_are_those_of_the_epoch(found):
    made, stats = found
    epoch = make_epoch(made, 0)
    assert stats["records"] == 65 and stats["samples"] == len(epoch.record) == 120
    assert stats["rows"] == len(epoch.offsets) - 1 == 4 * stats["steps_per_epoch"]
    assert stats["packing_efficiency"] == {
        "tokens": pytest.approx(epoch.tokens.sum() / stats["rows"] / 1024),
        "patches": pytest.approx(epoch.patches.sum() / stats["rows"] / 2048),
    }
    assert stats["tokens"]["mean"] == pytest.approx(epoch.tokens.mean())
    assert stats["tokens"]["max"] == epoch.tokens.max()
    assert sum(stats["patches"]["histogram"]["counts"]) == 120


def test_organs_come_up_as_their_weights_say(found):
    organs = found[1]["by_organ"]
    assert {name: organ["share"] for name, organ in organs.items()} == {
        "heart": 0.25,
        "kidney": 0,
        "liver": 0.75,
    }
    assert [organ["repeats"] for organ in organs.values()] == [1, 0, 3]
    assert [organ["records"] for organ in organs.values()] == [30, 5, 30]
    assert 0.5 < organs["liver"]["packing_efficiency"]["tokens"] <= 1


def test_counts_of_tasks_are_those_of_the_samples(found):
    made, stats = found
    epoch = make_epoch(made, 0)
    pairs = zip(epoch.record.tolist(), epoch.key.tolist(), strict=True)
    tasks = [example(made, *pair).task for pair in pairs]
    assert {task: found["trained"] for task, found in stats["tasks"].items()} == {
        task: tasks.count(task) for task in stats["tasks"]
    }
    assert {found["dropped"] for found in stats["tasks"].values()} == {0}
    assert sum(found["drawn"] for found in stats["tasks"].values()) == 120
    assert stats["languages"] == {"en": 1}


def test_the_suggested_patches_let_tokens_fill_rows():
    """With too few patches a row, tokens stay empty; with the suggested they don't."""
    dataset = MemoryDataset([exam(i, words=i * 7 % 60) for i in range(600)])
    tight = dataclasses.replace(SETTINGS, stage="alignment", max_patches=704)
    stats = stats_of(source(dataset, tight))
    better = stats["suggested"]
    assert stats["packing_efficiency"]["tokens"] < 0.9
    assert better["max_patches"] % 128 == 0 and better["max_patches"] > 704
    again = stats_of(source(dataset, dataclasses.replace(tight, max_patches=better["max_patches"])))
    for stated in (better["packing_efficiency"], again["packing_efficiency"]):
        assert stated["tokens"] >= max(0.93, stats["packing_efficiency"]["tokens"] + 0.05)
    assert again["suggested"]["max_patches"] == better["max_patches"]


def test_text_alone_and_what_is_left_out():
    records = [exam(i, media=[]) for i in range(20)]
    records[5] = dataclasses.replace(exam(5), reports=(Report("zh", caption="好" * 900),))
    stats = stats_of(source(MemoryDataset(records)))
    assert stats["dropped"] == {TOO_LONG: 1}
    assert stats["by_organ"]["liver"]["dropped"] == 1
    assert stats["suggested"]["max_patches"] == 0
    assert stats["suggested"]["packing_efficiency"]["patches"] == 0
    assert "left out: 1 too long" in describe(stats)


def test_it_is_json_and_a_text_of_lines_that_fit_a_screen(found):
    _, stats = found
    assert json.loads(json.dumps(stats)) == stats
    text = describe(stats)
    for word in ("heart", "kidney", "liver", "max_patches", "judge", "tokens a sample"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120
    bars = [line.count("#") for line in text.splitlines() if "#" in line]
    assert max(bars) == 40 and np.all(np.array(bars) > 0)


def test_loops_count_by_time_step():
    records = [exam(i, media=[Medium(8, 60, 60)]) for i in range(8)]
    stats = stats_of(source(MemoryDataset(records)))
    assert stats["patches"]["mean"] == 4 * 16
