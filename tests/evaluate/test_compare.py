"""Two evaluations compared: known differences, and what is no pair of evaluations."""

import json

import pytest

from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.bootstrap import Difference
from echovlm_jax.evaluate.compare import compare
from echovlm_jax.evaluate.metrics import score


def line(number, kind, prediction, correct=None):
    zh = number % 2 == 0
    organ = "liver" if number < 20 else "kidney"
    return {
        **{"id": f"{number}/{kind}", "record": number, "organ": organ, "task": kind, "kind": kind},
        **{"language": "zh" if zh else "en", "question": "?", "prediction": prediction},
        "reference": f"肝囊肿 {number} mm 大小" if zh else f"a liver cyst of {number} mm is seen",
        **{"answer": None if correct is None else "x", "correct": correct},
        "extracted": None if correct is None else "x" if correct else "y",
    }


def folder(path, lines, finished=True):
    path.mkdir()
    (path / "settings.json").write_text("{}")
    text = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines)
    (path / "predictions.jsonl").write_text(text, "utf-8")
    if finished:
        (path / "metrics.json").write_text(json.dumps({"n": len(lines)}))
    return path


def lines(good, right):
    """30 reports, the first `good` as they should be, and 30 diagnoses, the first `right` right."""
    reports = [line(i, "report", "") for i in range(30)]
    reports = [x | {"prediction": x["reference"] if i < good else "肾 no"} for i, x in
               enumerate(reports)]  # fmt: skip
    return reports + [line(i, "diagnosis", "", i < right) for i in range(30)]


def test_differences(tmp_path):
    a, b = folder(tmp_path / "a", lines(10, 15)), folder(tmp_path / "b", lines(25, 15))
    found = compare(a, b)
    assert (found["n"], found["a"], found["b"]) == (60, str(a), str(b))
    assert set(found["by_organ"]) == {"liver", "kidney"}
    assert "vqa_accuracy" not in found["overall"] and "bertscore" not in found["overall"]
    assert all(set(row) == set(Difference._fields) for row in found["overall"].values())
    rouge = found["overall"]["rouge1"]
    # 10 and 25 of 30 are perfect.
    assert rouge["difference"] == pytest.approx(50, abs=8) and rouge["p"] < 0.01
    assert 0 < rouge["interval"][0] < rouge["difference"] < rouge["interval"][1]
    same = found["overall"]["diagnosis_accuracy"]
    assert (same["a"], same["b"], same["difference"], same["p"]) == (50, 50, 0, 1)
    zh = [x for x in lines(10, 0)[:30] if x["language"] == "zh"]
    only = folder(tmp_path / "zh", zh)
    expected = score([x["reference"] for x in zh], [x["prediction"] for x in zh])["bleu1"]
    assert compare(only, only)["overall"]["bleu1"]["a"] == pytest.approx(expected)


def test_the_order_of_lines_does_not_matter(tmp_path):
    a, b = lines(10, 15), lines(20, 20)
    folder(tmp_path / "a", a)
    one = compare(tmp_path / "a", folder(tmp_path / "b", b))
    two = compare(tmp_path / "a", folder(tmp_path / "c", b[::-1]))
    assert one["overall"] == two["overall"] and one["by_organ"] == two["by_organ"]


def test_runs_of_several_seeds_are_taken_together(tmp_path):
    a, b = folder(tmp_path / "a", lines(10, 15)), folder(tmp_path / "b", lines(25, 15))
    more = folder(tmp_path / "c", lines(13, 21)[::-1])
    alone, thrice = compare(a, b), compare([a, a, a], [b, b, b])
    for name, row in alone["overall"].items():  # no answer is counted as one more exam
        found = thrice["overall"][name]
        assert found["interval"] == pytest.approx(row["interval"])
        assert (found["difference"], found["p"]) == pytest.approx((row["difference"], row["p"]))
    both = compare([a, more], [b])["overall"]
    assert both["diagnosis_accuracy"]["a"] == pytest.approx(100 * (15 + 21) / 60)
    assert both["diagnosis_accuracy"]["difference"] == pytest.approx(-10)
    assert both["rouge1"]["b"] == alone["overall"]["rouge1"]["b"]


def test_no_folder_is_refused(tmp_path):
    a = folder(tmp_path / "a", lines(1, 1))
    for pair in ((a, []), ([], a)):
        with pytest.raises(InputError, match="no evaluation was given"):
            compare(*pair)


def test_other_samples_are_refused_by_name(tmp_path):
    whole = lines(5, 5)
    a = folder(tmp_path / "a", whole)
    for key, name in (("question", "q"), ("reference", "r")):
        changed = [x | {key: "other"} if x["id"] == "3/report" else x for x in whole]
        b = folder(tmp_path / name, changed)
        with pytest.raises(InputError, match=f"sample 3/report has another {key}"):
            compare(a, b)
    less = folder(tmp_path / "less", whole[:-1])
    for pair in ((a, less), (less, a)):
        with pytest.raises(InputError, match="has no sample 29/diagnosis"):
            compare(*pair)


def test_folders_that_are_no_evaluations(tmp_path):
    a = folder(tmp_path / "a", lines(1, 1))
    with pytest.raises(InputError, match="holds no evaluation"):
        compare(a, tmp_path)
    with pytest.raises(InputError, match="isn't finished"):
        compare(a, folder(tmp_path / "b", lines(1, 1), finished=False))
    raw = (a / "predictions.jsonl").read_bytes()
    for damaged in (raw[:-20], raw[: len(raw) // 2], b"[1]\n" * 60, b"\xff" + raw, b"{}\n" * 60):
        (a / "predictions.jsonl").write_bytes(damaged)
        with pytest.raises(InputError, match="is damaged"):
            compare(a, a)


def test_bertscore_is_compared_only_where_every_run_has_it(tmp_path):
    a, b = folder(tmp_path / "a", lines(10, 15)), folder(tmp_path / "b", lines(25, 15))
    scored = {x["id"]: 0.5 for x in lines(0, 0) if x["kind"] == "report"}
    (a / "bertscore.json").write_text(json.dumps(scored))
    assert compare([a, a], [a])["overall"]["bertscore"]["difference"] == 0
    for half in ([a, b], [b, a]):
        assert "bertscore" not in compare(half, [a, a])["overall"]
