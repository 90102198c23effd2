"""The studies on synthetic exams: what is trained, what is compared with what, and what is kept."""

import json
from pathlib import Path

import pytest

from echovlm_jax.bench import phantom as bench
from echovlm_jax.cli import main
from echovlm_jax.cli.measure import _WORKS
from echovlm_jax.errors import InputError

SEEDS = 2
# How many of 20 diagnoses, the first 10 of them of vessels, each side's run has right, by seed.
RIGHT = {
    "dense": (4, 6, 5),
    "mixture": (12, 10, 11),
    "as they are": (2, 4, 3),
    "evenly": (14, 14, 14),
}


def answers(right: int) -> list[dict]:
    lines = []
    for i in range(20):
        shared = {"organ": "vessel" if i < 10 else "liver", "language": "en", "question": "?"}
        report = f"a plaque of {i} mm on the wall"
        told = {"answer": "x", "extracted": "x" if i < right else None, "correct": i < right}
        lines += [
            {"id": f"{i}/d", "kind": "diagnosis", "task": "diagnosis", "reference": ""}
            | {"prediction": "", **told, **shared},
            {"id": f"{i}/r", "kind": "report", "task": "report", "reference": report}
            | {"prediction": report, "answer": None, "extracted": None, "correct": None, **shared},
        ]
    return lines


@pytest.fixture
def made(monkeypatch) -> dict[str, list]:
    """Training and evaluation replaced: what they were called with, and answers as in RIGHT."""
    calls = {"data": [], "train": [], "evaluate": []}

    def make_data(folder: Path, exams: int, seed: int, *, balanced: bool) -> None:
        calls["data"].append((exams, seed, balanced))
        (folder / "data").mkdir()

    def evaluate(model: Path, data: Path, out: Path, options, *, report: bool) -> None:
        assert options.tasks == ("report", "diagnosis") and not report
        name, seed = model.name.split("-", 1)[1].replace("-", " ").rsplit(" ", 1)
        calls["evaluate"].append((name, int(seed), data.parent.name))
        out.mkdir(exist_ok=True)
        lines = answers(RIGHT[name][int(seed)])
        (out / "settings.json").write_text("{}")
        (out / "metrics.json").write_text(json.dumps({"n": len(lines)}))
        (out / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")

    monkeypatch.setattr(bench, "make_data", make_data)
    monkeypatch.setattr(bench, "evaluate", evaluate)
    monkeypatch.setattr(bench, "train_whole", lambda config, run: calls["train"].append(config))
    return calls


def values(found: dict, of: str, metric: str) -> dict:
    return next(row for row in found["rows"] if (row["of"], row["metric"]) == (of, metric))


def test_both_sides_differ_in_the_mixture_of_experts_alone(tmp_path, made):
    found = bench.bench_phantom("mixture", tmp_path / "study", seeds=SEEDS, exams=40, steps=7)
    assert made["data"] == [(40, 0, True)]
    first, second, third, _ = (config.to_dict() for config in made["train"])
    differing = {key for key in first.keys() | second if first.get(key) != second.get(key)}
    assert differing == {"model"}
    assert (first["model"], second["model"]) == ("nano_dense", "nano")
    assert first["steps"] == 7 and {**first, "seed": 1} == third
    row = values(found, "all", "diagnosis_accuracy")
    assert (row["before"], row["after"], row["difference"]) == pytest.approx((25, 55, 30))
    assert row["by_seed"] == pytest.approx([40, 20])
    assert row["interval"][0] < 30 < row["interval"][1]
    assert values(found, "all", "bleu1")["difference"] == 0
    assert found["samples"] == 40


def test_both_sides_differ_in_how_organs_are_drawn_alone(tmp_path, made):
    found = bench.bench_phantom("imbalance", tmp_path, seeds=SEEDS, exams=40, steps=7)
    assert sorted(made["data"]) == [(40, 0, False), (40, 0, True)]
    assert {call[2] for call in made["evaluate"]} == {"balanced"}
    first, second = (config.to_dict() for config in made["train"][:2])
    assert Path(first["data"]).parent.name == "imbalanced"
    differing = {key for key in first.keys() | second if first.get(key) != second.get(key)}
    assert differing == {"mix_temperature", "organ_weights"}
    assert set(second["organ_weights"].values()) == {1.0}
    # Of the first ten, which are vessels, 2 and 4 against all: 3 and 10 of 10 on average.
    row = values(found, "vessel", "diagnosis_accuracy")
    assert (row["before"], row["after"]) == pytest.approx((30, 100))


def test_a_second_call_goes_on_with_the_same_data_and_no_other_settings(tmp_path, made):
    options = {"seeds": 1, "exams": 40, "steps": 7}
    first = bench.bench_phantom("mixture", tmp_path, **options)
    assert bench.bench_phantom("mixture", tmp_path, **options) == first
    assert len(made["data"]) == 1
    for name in ("exams", "steps"):
        with pytest.raises(InputError, match=f"was begun with {name}"):
            bench.bench_phantom("imbalance", tmp_path, **{**options, name: 90})
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        bench.bench_phantom("mixture", other, **options)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_what_it_can_not_do_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match="choose of mixture, imbalance"):
        bench.bench_phantom("speed", tmp_path)
    with pytest.raises(InputError, match="seeds must be at least 1"):
        bench.bench_phantom("mixture", tmp_path, seeds=0)
    assert not list(tmp_path.iterdir())
    for words, said in (
        (["phantom", "--what", "train"], "--what train is not of `bench phantom`"),
        (["cpu", "--what", "mixture"], "--what mixture is not of `bench cpu`"),
    ):
        assert main(["bench", *words]) == 2
        assert said in capsys.readouterr().err
    assert _WORKS["phantom"] == tuple(bench.STUDIES)


def test_the_command_prints_a_row_a_metric(tmp_path, made, capsys):
    assert main(["bench", "phantom", "--what", "imbalance", "--dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "diagnosis_accuracy, vessel" in printed and "by seed" in printed


@pytest.mark.slow
def test_a_whole_study(tmp_path):
    """With too few steps to learn anything; on all of this process's devices."""
    options = {"seeds": 1, "exams": 300, "steps": 2, "asked": 14}
    found = bench.bench_phantom("imbalance", tmp_path, **options)
    assert found["samples"] == 28
    assert {row["metric"] for row in found["rows"]} == set(bench.COMPARED)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/predictions.jsonl")}
    assert len(before) == 2
    assert bench.bench_phantom("imbalance", tmp_path, **options) == found
    assert before == {path: path.stat().st_mtime_ns for path in before}
