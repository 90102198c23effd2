"""From a line a sample to tables: every metric over all, by organ and by task, with intervals."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from echovlm_jax.evaluate.answers import READING, macro_f1
from echovlm_jax.evaluate.bootstrap import Statistic, mean_of
from echovlm_jax.evaluate.fact_metrics import (
    FACT_METRICS,
    SIGNATURE,
    fact_statistics,
    facts_by_attribute,
)
from echovlm_jax.evaluate.metrics import TEXT_METRICS, percentages, signature, text_statistics

Line = Mapping[str, Any]
_OF_REPORTS = (*TEXT_METRICS, *FACT_METRICS)
METRICS = (
    *_OF_REPORTS,
    *("bertscore", "diagnosis_accuracy", "diagnosis_macro_f1", "vqa_accuracy"),
)
KINDS = ("report", "diagnosis", "vqa")
NO_BERTSCORE = "no model folder was given"


def statistics(lines: Sequence[Line]) -> dict[str, Statistic]:
    """Every metric of METRICS but bertscore: those of texts and facts over the kind "report",
    accuracies over the samples with an answer of theirs. A metric without samples has no rows."""
    kinds = {kind: [line for line in lines if line["kind"] == kind] for kind in KINDS}
    reports, diagnoses = kinds["report"], kinds["diagnosis"]
    texts = _texts(reports)
    out = text_statistics(*texts) | fact_statistics(*texts)
    out["diagnosis_accuracy"] = mean_of([bool(line["correct"]) for line in diagnoses])
    out["diagnosis_macro_f1"] = macro_f1(
        [line["answer"] for line in diagnoses], [line["extracted"] for line in diagnoses]
    )
    out["vqa_accuracy"] = mean_of([bool(line["correct"]) for line in kinds["vqa"]])
    if scored := [line["bertscore"] for line in reports if line.get("bertscore") is not None]:
        out["bertscore"] = mean_of(scored)
    return out


def _texts(reports: Sequence[Line]) -> tuple[list[str], list[str], list[str]]:
    """References, predictions and languages."""
    references, predictions, languages = (
        [line[key] for line in reports] for key in ("reference", "prediction", "language")
    )
    return references, predictions, languages


def table(lines: Sequence[Line], seed: int) -> dict[str, Any]:
    """One row of a table: each of METRICS, or None without samples, intervals, n and undecided."""
    found: dict[str, Any] = dict.fromkeys(METRICS)
    counts = {"n": len(lines), "undecided": undecided(lines)}
    return found | percentages(statistics(lines), seed) | counts


def undecided(lines: Iterable[Line]) -> int:
    """How many predictions answer nothing where something was asked for: refusals, and what no rule
    can read. They count as wrong; a sample without a prediction is not among them."""
    return sum(
        line["answer"] is not None and line["extracted"] is None and not line.get("error")
        for line in lines
    )


def summarise(lines: Sequence[Line], seed: int, reasons: Mapping[str, str]) -> dict[str, Any]:
    """overall, by_organ, by_task, facts_by_attribute (overall, and of each organ), signature and
    reasons, as in `metrics.json`."""
    reports = [line for line in lines if line["kind"] == "report"]
    languages = [line["language"] for line in reports]
    out = {
        "overall": table(lines, seed),
        "by_organ": _by(lines, "organ", lambda part: table(part, seed)),
        "by_task": _by(lines, "task", lambda part: table(part, seed)),
        "facts_by_attribute": {
            "overall": _attributes(reports, seed),
            **_by(reports, "organ", lambda part: _attributes(part, seed)),
        },
        "signature": signature(languages, seed=seed) | SIGNATURE | READING,
    }
    absent = {
        name: f"no sample of the kind {'report' if name in _OF_REPORTS else name.split('_')[0]}"
        for name in METRICS
        if out["overall"][name] is None
    }
    return out | {"reasons": absent | dict(reasons)}


def _attributes(reports: Sequence[Line], seed: int) -> dict[str, Any]:
    return facts_by_attribute(*_texts(reports), seed)


def _by(
    lines: Iterable[Line], key: str, made: Callable[[list[Line]], dict[str, Any]]
) -> dict[str, Any]:
    parts: dict[str, list[Line]] = {}
    for line in lines:
        parts.setdefault(line[key], []).append(line)
    return {name: made(parts[name]) for name in sorted(parts)}
