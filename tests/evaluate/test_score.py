"""Two files of texts scored, and files that are no such files."""

import json

import pytest

from echovlm_jax.cli import main
from echovlm_jax.data.build import Options, build
from echovlm_jax.data.sections import join_report
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.metrics import TEXT_METRICS, score
from echovlm_jax.evaluate.score import score_files
from tests.data.sources import record
from tests.data.sources import write as sources_of


def write(path, texts):
    lines = (json.dumps({"id": name, "text": text}, ensure_ascii=False) for name, text in texts)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@pytest.fixture
def files(tmp_path):
    references = [("a", "肝囊肿"), (2, "肾结石"), ("c", "🙂")]
    predictions = [(2, "肾囊肿"), ("b", "没有"), ("a", "肝囊肿")]
    return write(tmp_path / "r.jsonl", references), write(tmp_path / "p.jsonl", predictions)


def test_pairs_are_by_id_and_a_missing_one_is_empty(files):
    found = score_files(*files)
    assert found["missing"] == ["c"] and found["unexpected"] == ["b"] and found["n"] == 3
    expected = score(["肝囊肿", "肾结石", "🙂"], ["肝囊肿", "肾囊肿", ""])
    assert {name: found[name] for name in TEXT_METRICS} == {
        name: expected[name] for name in TEXT_METRICS
    }


def test_the_command_prints_one_object(files, capsys):
    arguments = ["score", "--references", str(files[0]), "--predictions", str(files[1])]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {*TEXT_METRICS, "signature", "intervals", "n", "missing", "unexpected"} <= set(found)
    assert {"matched", "failed", "skipped"} <= set(found)
    assert main([*arguments, "--lang", "zh"]) == 0
    shown = capsys.readouterr().out
    assert "95 % interval" in shown and "missing: 1 (c)" in shown and "unexpected: 1 (b)" in shown


def test_facts_are_scored_where_they_are_asked_for(tmp_path, capsys):
    references = write(
        tmp_path / "r.jsonl", [("a", "见低回声结节，约1.2cm，边界清晰。"), ("b", "未见结节。")]
    )
    predictions = write(tmp_path / "p.jsonl", [("a", "见低回声结节，约12 mm，边界模糊。")])
    plain = score_files(references, predictions)
    assert not any("fact" in name for name in plain)
    found = score_files(references, predictions, facts="zh")
    assert {name: found[name] for name in TEXT_METRICS} == {
        name: plain[name] for name in TEXT_METRICS
    }
    # Lesion, echo, size and margin, and no lesion; the margin is another, the last report empty.
    assert found["facts_precision"] == 75 and found["facts_recall"] == 60
    assert found["hallucinated_per_report"] == 0.5
    assert found["facts_by_attribute"]["size"]["f1"] == 100
    assert {*plain["intervals"], "facts_f1"} <= set(found["intervals"])
    assert {*plain["signature"], "facts"} <= set(found["signature"])
    arguments = ["score", "--references", str(references), "--predictions", str(predictions)]
    assert main([*arguments, "--facts", "zh", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))
    assert main([*arguments, "--facts", "zh"]) == 0
    assert "hallucinated_per_report" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"id": "a", "text": "x"}', "id 'a' is there twice"),
        (b'{"id": "b"}', '"text", a text'),
        (b'{"id": true, "text": "x"}', '"id", a text or whole number'),
        (b'{"id": "b", "text": 3}', '"text", a text'),
        (b"[1]", "must be an object"),
        (b'{"id": "b", ', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_bad_lines_are_named(files, line, said, capsys):
    with open(files[1], "wb") as file:
        file.write(b'{"id": "a", "text": "x"}\n\n' + line + b"\n")
    with pytest.raises(InputError) as caught:
        score_files(*files)
    assert said in str(caught.value) and str(caught.value).startswith(f"{files[1]}:3: ")
    assert "\n" not in str(caught.value)
    assert main(["score", "--references", str(files[0]), "--predictions", str(files[1])]) == 2
    assert said in capsys.readouterr().err


def test_files_that_are_not_there_or_empty(files, tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl: can't be read"):
        score_files(tmp_path / "none.jsonl", files[1])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no references"):
        score_files(tmp_path / "empty.jsonl", files[1])
    with pytest.raises(InputError, match="holds no predictions"):
        score_files(files[0], tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="can't be read"):
        score_files(tmp_path, files[1])


def test_a_byte_order_mark_and_windows_line_ends(tmp_path, files):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "a", "text": "x"}\r\n{"id": "b", "text": "y"}\r\n')
    assert score_files(path, path, "en")["bleu1"] == pytest.approx(100)


def lines(path, *values):
    path.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values), "utf-8")
    return path


def test_ids_are_one_as_text_and_as_number(tmp_path):
    texts = ["肝囊肿", "肾结石", "正常"]
    numbers = write(tmp_path / "n.jsonl", list(enumerate(texts)))
    words = write(tmp_path / "w.jsonl", [(str(n), text) for n, text in enumerate(texts)])
    table = write(tmp_path / "f.jsonl", [(float(n), text) for n, text in enumerate(texts)])
    for one, other in ((numbers, words), (words, numbers), (numbers, table), (table, words)):
        found = score_files(one, other)
        assert found["bleu1"] == pytest.approx(100)
        assert (found["matched"], found["missing"], found["unexpected"]) == (3, [], [])
    both = write(tmp_path / "b.jsonl", [(0, "a"), ("0", "b")])
    with pytest.raises(InputError, match=r"b\.jsonl:2: id '0' is there twice"):
        score_files(both, words)


def test_answers_of_a_batch_with_failures_are_scored(tmp_path, capsys):
    wanted = write(tmp_path / "r.jsonl", [(1, "a node"), (2, "a cyst"), (3, "normal")])
    answers = lines(
        tmp_path / "o.jsonl",
        {"id": 1, "text": "a node", "prompt_tokens": 3, "new_tokens": 2},
        {"id": 2, "error": "image lost.png: can't be read"},
    )
    found = score_files(wanted, answers, "en")
    assert (found["matched"], found["missing"], found["failed"]) == (1, [2, 3], [2])
    expected = score(["a node", "a cyst", "normal"], ["a node", "", ""], "en")
    assert found["bleu1"] == expected["bleu1"]
    arguments = ["--references", str(wanted), "--predictions", str(answers), "--lang", "en"]
    assert main(["score", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "matched: 1" in shown and "missing: 2 (2, 3)" in shown and "failed: 1 (2)" in shown
    with pytest.raises(InputError, match="must have"):
        score_files(answers, wanted, "en")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([{"id": "z", "text": "x"}], "none of its ids ('z' …) is one of"),
        ([{"id": "a", "error": "x"}], "every prediction is an error"),
        ([], "holds no predictions"),
    ],
)
def test_nothing_to_compare_is_an_error(files, tmp_path, values, said, capsys):
    found = lines(tmp_path / "x.jsonl", *values)
    assert main(["score", "--references", str(files[0]), "--predictions", str(found)]) == 2
    out = capsys.readouterr()
    assert said in out.err and not out.out and out.err.count("\n") == 1


def test_an_evaluations_predictions_score_as_its_reports_did(tmp_path):
    common = {"organ": "liver", "language": "en"}
    path = lines(
        tmp_path / "predictions.jsonl",
        {"id": "1/report", "kind": "report", "reference": "a b c", "prediction": "a b", **common},
        {"id": "1/judge", "kind": "vqa", "reference": "Yes", "prediction": "No", **common},
        {
            **{"id": "2/report", "kind": "report", "reference": "d", "prediction": ""},
            **{"error": "too long"},
        },
    )
    found = score_files(path, path, "en")
    assert found["bleu1"] == score(["a b c", "d"], ["a b", ""], "en")["bleu1"]
    assert found["failed"] == ["2/report"] and found["skipped"] == 2 and found["n"] == 2


def test_a_datasets_records_are_references(tmp_path):
    reports = [{"language": "en", "findings": "A node.", "impression": "Benign."}]
    entries = [record(0, reports=reports), record(1), record(2, description="见一结节。")]
    sources, images = sources_of(tmp_path, entries)
    build(sources, images, tmp_path / "out", Options(validation=0, test=0))
    wanted = tmp_path / "out" / "train.records.jsonl"
    answers = write(tmp_path / "p.jsonl", [("liver/exam0", "A node."), ("liver/exam1", "x")])
    found = score_files(wanted, answers, "en")
    assert found["n"] == found["matched"] == 2 and found["skipped"] == 1
    whole = join_report("A node.", "Benign.", "en")
    assert found["bleu1"] == score([whole, "Finding 1."], ["A node.", "x"], "en")["bleu1"]
    with pytest.raises(InputError, match=r"records\.jsonl:1: must have"):
        score_files(answers, wanted)
