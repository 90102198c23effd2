"""A whole evaluation: what it leaves, and that a stopped one ends the same."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from echovlm_jax import load
from echovlm_jax.cli import main
from echovlm_jax.data import dataset
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate import harness
from echovlm_jax.evaluate.compare import compare
from echovlm_jax.evaluate.facts import RULES
from echovlm_jax.evaluate.harness import EvalOptions
from echovlm_jax.evaluate.metrics import TEXT_METRICS, score
from echovlm_jax.evaluate.summary import METRICS
from echovlm_jax.load import fingerprint, load_model
from echovlm_jax.phantom import PhantomDataset
from echovlm_jax.storage.lock import Lock
from tests.evaluate.models import SMALL, answer_by_hash, make_model

FEW = {**SMALL, "limit": 7, "batch_size": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("evaluate") / "model")


@pytest.fixture
def quick(monkeypatch, model):
    """No network, and a test split of 12 exams."""
    loaded = load_model(model)
    monkeypatch.setattr(harness, "load_model", lambda path, **_: loaded)
    monkeypatch.setattr(load.Model, "answer_each", answer_by_hash)
    exams = PhantomDataset("test", 12)
    monkeypatch.setattr(harness, "open_dataset", lambda data, split: exams)


def evaluate(model, data, out, *, progress=None, report=True, **options):
    made = EvalOptions(**options)
    return harness.evaluate(model, data, out, made, report=report, progress=progress)


def read(out):
    raw = (out / "predictions.jsonl").read_bytes()
    assert raw.endswith(b"\n")
    return [json.loads(line) for line in raw.split(b"\n")[:-1]]


def test_what_an_evaluation_leaves(model, quick, tmp_path):
    out, said = tmp_path / "out", []
    result = evaluate(model, "phantom", out, **FEW, progress=lambda *n: said.append(n))
    lines = read(out)
    assert said == [(9, 21), (18, 21), (21, 21)]
    assert [line["record"] for line in lines] == sorted(line["record"] for line in lines)
    assert set(lines[0]) == {
        *("id", "record", "organ", "task", "kind", "language", "question", "reference"),
        *("prediction", "answer", "extracted", "correct"),
    }
    for line in lines:
        assert (line["answer"] is None) == (line["kind"] == "report") == (line["correct"] is None)
        assert line["correct"] in (None, line["extracted"] == line["answer"])
    stored = json.loads((out / "metrics.json").read_text("utf-8"))
    assert stored == json.loads(json.dumps({k: v for k, v in result.items() if k != "out"}))
    assert set(METRICS) | {"n", "undecided", "intervals"} == set(stored["overall"])
    assert stored["overall"]["n"] == result["n"] == 21 and result["failed"] == 0
    assert stored["reasons"] == {"bertscore": "no model folder was given"}
    assert sum(row["n"] for row in stored["by_organ"].values()) == 21
    assert set(stored["by_task"]) == {line["task"] for line in lines}
    assert stored["by_task"]["diagnosis"]["bleu1"] is None
    assert stored["settings"] == json.loads((out / "settings.json").read_text("utf-8"))
    assert stored["settings"]["images"] == "given" and stored["settings"]["split"] == "test"


def test_facts_are_of_the_texts_and_of_the_rules_that_read_them(model, quick, tmp_path):
    out = tmp_path / "out"
    result = evaluate(model, "phantom", out, **FEW)
    parts = result["facts_by_attribute"]
    reports = [line for line in read(out) if line["kind"] == "report"]
    assert set(parts) == {"overall", *(line["organ"] for line in reports)}
    wanted = {name: sum(row["wanted"] for row in part.values()) for name, part in parts.items()}
    assert wanted["overall"] == sum(wanted.values()) / 2 > 4 * len(reports)
    assert RULES in result["signature"]["facts"]
    # What other rules left behind is no part of the figures.
    stored = json.loads((out / "metrics.json").read_text("utf-8"))
    stored["overall"]["facts_f1"], stored["signature"]["facts"] = 12.5, "rules 0-other"
    (out / "metrics.json").write_text(json.dumps(stored), "utf-8")
    assert evaluate(model, "phantom", out, **FEW) == result


def test_every_window_has_as_many_slots(model, quick, tmp_path, monkeypatch):
    """Another number of rows would be another program to compile."""
    slots = []

    def answer_each(self, asked, **settings):
        slots.append((settings["slots"], settings["max_new_tokens"]))
        return answer_by_hash(self, asked, **settings)

    monkeypatch.setattr(load.Model, "answer_each", answer_each)
    evaluate(model, "phantom", tmp_path / "out", **{**FEW, "max_new_tokens": 100})
    assert slots == [(3, 100), (3, harness.SHORT), (3, harness.SHORT)] * 3


def test_tables_are_of_their_lines(model, quick, tmp_path):
    result = evaluate(model, "phantom", tmp_path / "out", **FEW, language="zh")
    lines = read(tmp_path / "out")
    organ = lines[0]["organ"]
    for part, row in (("overall", result["overall"]), (organ, result["by_organ"][organ])):
        mine = [x for x in lines if part in ("overall", x["organ"])]
        texts = [x for x in mine if x["kind"] == "report"]
        alone = score([x["reference"] for x in texts], [x["prediction"] for x in texts], "zh")
        for name in TEXT_METRICS:
            assert row[name] == pytest.approx(alone[name], abs=1e-9)
            assert row["intervals"][name] == pytest.approx(alone["intervals"][name], abs=1e-9)
        for kind in ("diagnosis", "vqa"):
            right = [x["correct"] for x in mine if x["kind"] == kind]
            assert row[f"{kind}_accuracy"] == pytest.approx(100 * sum(right) / len(right))


def test_refusals_are_undecided_and_counted(model, quick, tmp_path, monkeypatch, capsys):
    refusals = ["对不起，我无法判断。", "I cannot tell.", ""]

    def answer_each(self, asked, **settings):
        return ((row, {"text": refusals[row % 3]}) for row, _ in asked)

    monkeypatch.setattr(load.Model, "answer_each", answer_each)
    arguments = ["--data", "phantom", "--out", str(tmp_path / "out"), "--limit", "3"]
    assert main(["eval", str(model), *arguments, "--batch-size", "3"]) == 0
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    asked = [line for line in read(tmp_path / "out") if line["kind"] != "report"]
    assert stored["undecided"] == stored["overall"]["undecided"] == len(asked) == 6
    assert sum(row["undecided"] for row in stored["by_organ"].values()) == 6
    assert stored["overall"]["vqa_accuracy"] == 0
    assert "undecided: 6" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert '<th scope="col">undecided</th>' in page


def test_perfect_answers_are_scored_so(model, quick, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        harness, "inputs_of", lambda model, sample, *rest: made.append(sample) or sample.reference
    )
    monkeypatch.setattr(
        load.Model,
        "answer_each",
        lambda self, asked, **settings: ((row, {"text": text}) for row, text in asked),
    )
    result = evaluate(model, "phantom", tmp_path / "out", **FEW)
    for name in ("bleu4", "rouge1", "rougeL", "diagnosis_accuracy", "diagnosis_macro_f1"):
        assert result["overall"][name] == pytest.approx(100), name
    assert result["overall"]["vqa_accuracy"] == 100 and result["overall"]["meteor"] > 99
    assert len(made) == 21


def test_stopped_anywhere_it_ends_the_same(model, quick, tmp_path):
    whole = tmp_path / "whole"
    evaluate(model, "phantom", whole, **FEW)
    expected, metrics = (
        (whole / name).read_bytes() for name in ("predictions.jsonl", "metrics.json")
    )
    assert "🙂\u2028".encode() in expected
    rng = random.Random(0)
    for cut in (0, len(expected) - 1, *(rng.randrange(len(expected)) for _ in range(4))):
        out = tmp_path / f"cut{cut}"
        out.mkdir()
        (out / "settings.json").write_bytes((whole / "settings.json").read_bytes())
        (out / "predictions.jsonl").write_bytes(expected[:cut])
        evaluate(model, "phantom", out, **FEW)
        assert (out / "predictions.jsonl").read_bytes() == expected
        assert (out / "metrics.json").read_bytes() == metrics


def test_a_finished_evaluation_asks_nothing(model, quick, tmp_path, monkeypatch):
    first = evaluate(model, "phantom", tmp_path / "out", **FEW)
    monkeypatch.setattr(load.Model, "answer", None)
    assert evaluate(model, "phantom", tmp_path / "out", **FEW) == first


def test_other_settings_are_refused_by_name(model, quick, tmp_path):
    out = tmp_path / "out"
    evaluate(model, "phantom", out, **FEW)
    for change in ({"seed": 1}, {"images": "blind"}, {"limit": 5}, {"batch_size": 2}):
        [key] = change
        with pytest.raises(InputError, match=f"begun with {key} "):
            evaluate(model, "phantom", out, **{**FEW, **change})
    lines = (out / "predictions.jsonl").read_bytes().split(b"\n")
    (out / "predictions.jsonl").write_bytes(b"\n".join([b"{}", *lines[1:]]))
    with pytest.raises(InputError, match=r"predictions\.jsonl: its line of"):
        evaluate(model, "phantom", out, **FEW)
    read = json.loads(lines[1]) | {"extracted": "benign"}  # as other rules would read it
    changed = [lines[0], json.dumps(read).encode(), *lines[2:]]
    (out / "predictions.jsonl").write_bytes(b"\n".join(changed))
    with pytest.raises(InputError, match="or other rules read it"):
        evaluate(model, "phantom", out, **FEW)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="is not empty"):
        evaluate(model, "phantom", tmp_path / "mine", **FEW)
    with pytest.raises(InputError, match="is a file"):
        evaluate(model, "phantom", tmp_path / "mine" / "thesis.txt", **FEW)
    for change, said in (({"batch_size": 0}, "batch_size"), ({"max_new_tokens": 4096}, "no room")):
        with pytest.raises(InputError, match=said):
            evaluate(model, "phantom", tmp_path / "new", **{**FEW, **change})
    assert not (tmp_path / "new").exists()


def test_a_run_and_its_export_are_not_mixed(model, quick, tmp_path, monkeypatch):
    """They have one fingerprint, and the run's rows leave out exams that the export answers."""
    evaluate(model, "phantom", tmp_path / "out", **FEW)
    rows = {"seq_len": 256, "max_patches": 64, "max_image_patches": 16}
    monkeypatch.setattr(harness, "run_step", lambda folder: (folder, 1))
    monkeypatch.setattr(harness, "training_settings", lambda run, step: rows)
    with pytest.raises(InputError, match="begun with seq_len "):
        evaluate(model, "phantom", tmp_path / "out", **FEW)


def test_another_model_is_refused(model, quick, tmp_path):
    evaluate(model, "phantom", tmp_path / "out", **FEW)
    loaded = load_model(model)
    mark = fingerprint(loaded.params)
    assert mark == fingerprint(load_model(model).params)
    leaf = loaded.params["text"]["lm_head"]["kernel"]
    loaded.params["text"]["lm_head"]["kernel"] = leaf + 1e-6
    assert fingerprint(loaded.params) != mark


def test_a_second_evaluation_is_refused(model, quick, tmp_path):
    (tmp_path / "out").mkdir()
    with Lock(tmp_path / "out"), pytest.raises(InputError, match="out: another process is writing"):
        evaluate(model, "phantom", tmp_path / "out", **FEW)
    assert not any((tmp_path / "out").iterdir())


def test_what_does_not_fit_has_no_prediction(model, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "limits_of", lambda *rest: harness.Limits(260, 64, 16))
    result = evaluate(model, "phantom", tmp_path / "out", **FEW)
    lines = read(tmp_path / "out")
    failed = [line for line in lines if "error" in line]
    assert 0 < result["failed"] == len(failed) < len(lines) == 21
    assert sum(result["failed_by_task"].values()) == len(failed)
    assert result["first_failure"] == failed[0]["error"]
    assert all("don't fit" in x["error"] and x["prediction"] == "" for x in failed)
    assert not any(x["correct"] for x in failed)


def test_a_runs_own_image_limits_hold(model, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "20").mkdir(parents=True)
    (run / "model").mkdir()
    (run / "model" / "config.json").write_bytes((model / "config.json").read_bytes())
    sizes = {"seq_len": 512, "max_patches": 800, "max_image_patches": 100}
    (run / "config.json").write_text(json.dumps(sizes))
    loaded = load_model(model)
    for folder in (run, run / "checkpoints" / "20"):
        assert harness.limits_of(loaded, folder, 64, None) == (512, 800, 100)
    assert harness.limits_of(loaded, run, 64, 36) == (512, 800, 36)
    assert harness.limits_of(loaded, model, 96, None)[0] == 4000


def test_blind_and_given_are_compared(model, quick, tmp_path, capsys):
    for images in ("given", "blind"):
        evaluate(model, "phantom", tmp_path / images, **FEW, images=images)
    a, b = (read(tmp_path / images) for images in ("given", "blind"))
    assert [x["question"] for x in a] == [x["question"] for x in b]
    assert [x["prediction"] for x in a] != [x["prediction"] for x in b]
    found = compare(tmp_path / "given", tmp_path / "blind")
    assert found["n"] == 21 and set(found["overall"]) == set(METRICS) - {"bertscore"}
    arguments = ["compare", str(tmp_path / "given"), str(tmp_path / "blind")]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))
    assert main(arguments) == 0
    assert "B - A" in capsys.readouterr().out


def test_batches_of_the_real_model(model, tmp_path, capsys):
    """Each line has its own prompt's answer."""
    out = tmp_path / "out"
    command = ["eval", str(model), "--data", "phantom", "--out", str(out), "--tasks", "diagnosis"]
    command += ["--limit", "2", "--batch-size", "2", "--max-new-tokens", "6", "--images", "given"]
    command += ["--max-image-patches", "16", "--language", "en", "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["overall"]["diagnosis_accuracy"] == 0 and result["overall"]["bleu1"] is None
    assert result["reasons"]["bleu1"] == "no sample of the kind report"
    assert set(result["by_task"]) == {"diagnosis"}
    loaded, exams = load_model(model), dataset.open_dataset("phantom", "test")
    samples = harness.make_samples(exams, kinds=("diagnosis",), limit=2, language="en")
    limits = harness.limits_of(loaded, model, 6, 16)
    lines = read(out)
    inputs = [
        harness.inputs_of(loaded, s, exams.media(s.record), exams.record(s.record), limits)
        for [s] in samples
    ]
    answers = loaded.answer(inputs[::-1], max_new_tokens=6)[::-1]
    assert [line["prediction"] for line in lines] == [answer["text"] for answer in answers]
    assert len({line["prediction"] for line in lines}) > 1


@pytest.mark.slow
def test_killed_and_resumed(model, tmp_path):
    command = [sys.executable, "-m", "echovlm_jax.cli", "eval", str(model), "--data", "phantom"]
    command += ["--limit", "24", "--batch-size", "2", "--max-new-tokens", "24"]
    command += ["--max-image-patches", "16", "--json"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    subprocess.run([*command, "--out", str(whole)], check=True, capture_output=True, timeout=600)
    path = out / "predictions.jsonl"
    for _ in range(3):
        size = path.stat().st_size if path.exists() else 0
        process = subprocess.Popen(
            [*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (path.exists() and path.stat().st_size > size):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, timeout=600)
    for name in ("predictions.jsonl", "settings.json", "metrics.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
