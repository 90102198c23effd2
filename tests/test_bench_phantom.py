"""The studies on synthetic exams, with too few steps to learn: what is left is the bookkeeping."""

import json

import pytest

from echovlm_jax import bench_phantom as bench
from echovlm_jax.cli import main
from echovlm_jax.errors import InputError
from echovlm_jax.train.config_file import load_config, own_config


@pytest.mark.slow
def test_a_study_compares_its_two_sides_and_goes_on(tmp_path, monkeypatch):
    options = {"seeds": 2, "exams": 300, "asked": 14}
    few = {"steps": 2, "eval_every": 2, "checkpoint_every": 2}
    found = bench.bench_phantom("imbalance", tmp_path, **options, changes=few)
    assert (found["before"], found["after"], found["steps"]) == ("as they are", "evenly", 2)
    assert {(row["of"], row["metric"]) for row in found["rows"]} >= {
        ("all", m) for m in bench.METRICS
    }
    for row in found["rows"]:
        assert row["difference"] == pytest.approx(row["after"] - row["before"])
        assert row["interval"][0] <= row["difference"] <= row["interval"][1]
        assert len(row["by_seed"]) == 2
    # Both sides differ in the mixture of organs alone, and seeds in the seed.
    runs = {
        path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/config.json")
    }
    assert len(runs) == 4
    first, second = runs["imbalance-as-they-are-0"], runs["imbalance-evenly-0"]
    differing = {key for key in first.keys() | second if first.get(key) != second.get(key)}
    assert differing == {"mix_temperature", "organ_weights"}
    # What is there is not made again.
    monkeypatch.setattr(bench, "make_data", None)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/predictions.jsonl")}
    assert bench.bench_phantom("imbalance", tmp_path, **options, changes=few) == found
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_the_sides_of_a_study_differ_in_one_thing():
    for study in bench.STUDIES.values():
        sides = [
            load_config(own_config(arm.config), {**bench._COMMON, **arm.changes}).to_dict()
            for arm in (study.before, study.after)
        ]
        differing = {key for key in sides[1] if sides[0].get(key) != sides[1][key]}
        assert differing in ({"model"}, {"mix_temperature", "organ_weights"})


def test_what_it_can_not_do_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match="choose of mixture, imbalance"):
        bench.bench_phantom("speed", tmp_path)
    for words, said in (
        (["phantom", "--what", "train"], "--what train is not of `bench phantom`"),
        (["cpu", "--what", "mixture"], "--what mixture is not of `bench cpu`"),
        (["moe", "--config.steps=2"], "is for `bench phantom`"),
    ):
        assert main(["bench", *words]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
