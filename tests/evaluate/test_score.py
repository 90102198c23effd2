"""Two files of texts scored, and files that are no such files."""

import json

import pytest

from echovlm_jax.cli import main
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.metrics import TEXT_METRICS, score
from echovlm_jax.evaluate.score import score_files


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
    assert {*TEXT_METRICS, "signature", "intervals", "n", "missing", "unexpected"} == set(found)
    assert main([*arguments, "--lang", "zh"]) == 0
    shown = capsys.readouterr().out
    assert "95 % interval" in shown and "missing: c" in shown


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
    found = score_files(files[0], tmp_path / "empty.jsonl")
    assert found["bleu1"] == 0 and found["missing"] == ["a", 2, "c"]
    with pytest.raises(InputError, match="can't be read"):
        score_files(tmp_path, files[1])


def test_a_byte_order_mark_and_windows_line_ends(tmp_path, files):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "a", "text": "x"}\r\n{"id": "b", "text": "y"}\r\n')
    assert score_files(path, path, "en")["bleu1"] == pytest.approx(100)
