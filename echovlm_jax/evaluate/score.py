"""Two files of texts, references and predictions, scored."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from echovlm_jax.data.sections import join_report
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.fact_metrics import score_facts
from echovlm_jax.evaluate.metrics import score
from echovlm_jax.processing.files import reading, shown

Id = str | int


class Text(NamedTuple):
    """What one line of a file says."""

    id: Id  # as it is written
    text: str | None  # None: the line says why there is none


def score_files(
    references: str | Path,
    predictions: str | Path,
    language: str = "zh",
    *,
    segment: str = "characters",
    seed: int = 0,
    facts: str | None = None,
) -> dict[str, Any]:
    """`metrics.score` of two files with a line `{"id", "text"}` a text, paired by id.

    The files that our commands write do as well: `generate --batch`'s answers, where a record that
    failed has no text; `eval`'s predictions.jsonl, of which the reports count; and as references a
    dataset's *.records.jsonl, each record's report in the language. The ids 1 and "1" are one.
    A reference without a prediction is scored against an empty text.

    Args:
      facts: "zh" or "en": read the reports' statements in that language as well.

    Returns:
      what `metrics.score` returns and, with `facts`, what `fact_metrics.score_facts` does; n
      (references), matched (those with a prediction), missing (ids without a prediction), failed
      (ids whose prediction is an error, among the missing), unexpected (ids without a reference,
      which don't count) and skipped (lines of other tasks or of another language).

    Raises:
      InputError: a file can't be read, a line is malformed or an id there twice; names file and
        line. No prediction belongs to a reference. Or as `metrics.score`.
    """
    wanted, no_reference = read_texts(Path(references), "reference", language)
    found, no_prediction = read_texts(Path(predictions), "prediction", language)
    if not wanted:
        raise InputError(f'{shown(references)}: holds no references; write {{"id", "text"}} a line')
    for each in wanted.values():
        if each.text is None:
            raise InputError(f"{shown(references)}: id {shown(repr(each.id))} has no text")
    texts = {name: each.text for name, each in found.items() if each.text is not None}
    matched = sum(name in texts for name in wanted)
    if not matched:
        raise InputError(_nothing(references, predictions, wanted, found))
    pairs = [each.text or "" for each in wanted.values()], [texts.get(name, "") for name in wanted]
    result = score(*pairs, language, segment=segment, seed=seed)
    if facts is not None:
        stated = score_facts(*pairs, facts, seed)
        both = {key: result[key] | stated[key] for key in ("intervals", "signature")}
        result |= stated | both
    return result | {
        "matched": matched,
        "missing": [each.id for name, each in wanted.items() if name not in texts],
        "failed": [each.id for name, each in wanted.items() if name in found and name not in texts],
        "unexpected": [each.id for name, each in found.items() if name not in wanted],
        "skipped": no_reference + no_prediction,
    }


def _nothing(
    references: str | Path,
    predictions: str | Path,
    wanted: Mapping[str, Text],
    found: Mapping[str, Text],
) -> str:
    """Why no prediction could be compared, in one line."""
    if not found:
        return f'{shown(predictions)}: holds no predictions; write {{"id", "text"}} a line'
    if any(name in wanted for name in found):
        return f"{shown(predictions)}: every prediction is an error; look at them, and try again"
    first, other = (shown(repr(next(iter(each.values())).id))[:60] for each in (found, wanted))
    return (
        f"{shown(predictions)}: none of its ids ({first} …) is one of {shown(references)}'s"
        f" ({other} …); give both files the same ids"
    )


def read_texts(path: Path, role: str, language: str) -> tuple[dict[str, Text], int]:
    """A file's texts by id, and how many of its lines have none to score.

    Args:
      role: "reference" or "prediction": what to take of a line that has both.
      language: that of the report to take of a dataset's record.

    Raises:
      InputError: names file and line.
    """
    out: dict[str, Text] = {}
    skipped = 0
    with reading(path) as file:
        raw = file.read()
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{shown(path)}:{number}"
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise InputError(f"{where}: is not UTF-8 text") from None
        except (ValueError, RecursionError):
            raise InputError(f'{where}: is not JSON; write {{"id": …, "text": …}}') from None
        name = _id(value.get("id")) if isinstance(value, dict) else None
        if name is None:
            raise InputError(
                f'{where}: must be an object with "id", a text or whole number, and "text", a text'
            )
        if str(name) in out:
            raise InputError(f"{where}: id {shown(repr(name))} is there twice; rename one")
        take = _of_record if "reports" in value and "text" not in value else _of_line
        try:
            text = take(value, role, language)
        except (KeyError, TypeError, AttributeError, IndexError):
            raise InputError(
                f'{where}: must have "text", a text, beside its "id" (or "error", why there is'
                " none)"
            ) from None
        if text is _NONE:
            skipped += 1
        else:
            out[str(name)] = Text(name, text)
    return out, skipped


_NONE = "\0none"  # a line that has nothing to score


def _id(value: Any) -> Id | None:
    """An id; a whole float is the number that a table made of it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str | int) and not isinstance(value, bool) else None


def _of_line(value: Mapping[str, Any], role: str, language: str) -> str | None:
    """The text of a line `{"id", "text"}`, or of one that `eval` wrote."""
    if value.get("kind", "report") != "report" and role in value:
        return _NONE
    if role == "prediction" and value.get("error") and not value.get("text"):
        return None
    text = value["text"] if "text" in value else value[role]
    if not isinstance(text, str):
        raise TypeError
    return text


def _of_record(value: Mapping[str, Any], role: str, language: str) -> str | None:
    """The report of a dataset's record: all of it, or else its findings, or its caption; where it
    has none at all, the last answer of its conversation."""
    if role != "reference":
        raise TypeError
    for report in value["reports"]:
        if report["language"] == language:
            findings, impression = report["findings"], report["impression"]
            whole = findings and impression and join_report(findings, impression, language)
            if text := whole or findings or report["caption"]:
                return text
    if value["reports"] or not value["turns"]:
        return _NONE
    text = value["turns"][-1][1]
    if not isinstance(text, str):
        raise TypeError
    return text
