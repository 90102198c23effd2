"""The report's figures and tables as plain data: values with intervals, chance, differences."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echovlm_jax.data.dataset import Dataset
from echovlm_jax.evaluate.answers import label
from echovlm_jax.evaluate.compare import compare

NAMES = {
    **{f"bleu{n}": f"BLEU-{n}" for n in range(1, 5)},
    **{"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"},
    **{"meteor": "METEOR", "bertscore": "BERTScore"},
    **{"facts_f1": "Facts F1", "facts_precision": "Facts precision"},
    "facts_recall": "Facts recall",
    "hallucinated_per_report": "Statements a report that are not the reference's",
    "contradictions_per_report": "Contradictions a report",
    "repeated_per_report": "Repeated clauses a report",
    "facts_unread": "Unread clauses",
    "facts_unread_reference": "Unread clauses of the reference",
    "diagnosis_accuracy": "Diagnosis accuracy",
    "diagnosis_macro_f1": "Diagnosis macro-F1",
    "vqa_accuracy": "VQA accuracy",
}
HEADLINE = {
    "bleu1": "unigram precision of the reports, with a penalty for short ones",
    "facts_f1": "statements of the reports that agree with the reference's, and cover them",
    "rougeL": "longest common subsequence of the reports",
    "diagnosis_accuracy": "answers that name the right diagnosis",
    "vqa_accuracy": "choice and judgement questions answered right",
}
BY_ORGAN = ("bleu1", "facts_f1", "diagnosis_accuracy")

Metrics = Mapping[str, Any]


def chance(
    predictions: Sequence[Mapping[str, Any]], dataset: Dataset | None
) -> dict[str | None, float]:
    """Percent of diagnoses that guessing evenly gets right, by organ and, under None, over all.

    One guesses among the diagnoses that the organ has in the split and language; without a dataset,
    among those asked about. An organ with one diagnosis alone has no chance level.
    """
    names: dict[tuple, set[str]] = defaultdict(set)
    asked = [line for line in predictions if line["kind"] == "diagnosis"]
    for line in asked:
        names[line["organ"], line["language"]].add(str(line["answer"]))
    for number in range(len(dataset) if dataset is not None and asked else 0):
        record = dataset.record(number)  # type: ignore[union-attr]
        for report in record.reports:
            if name := label(report.diagnosis):
                names[record.organ, report.language].add(name)
    guesses: dict[str | None, list[float]] = defaultdict(list)
    for line in asked:
        for key in (line["organ"], None):
            guesses[key].append(1 / len(names[line["organ"], line["language"]]))
    out = {key: 100 * math.fsum(of) / len(of) for key, of in guesses.items()}
    return {key: value for key, value in out.items() if value < 99.9}


def _value(metrics: Metrics | None, name: str) -> dict[str, Any] | None:
    """A metric's value and interval, as the templates draw them; None where there is none."""
    value = (metrics or {}).get(name)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    ends = ((metrics or {}).get("intervals") or {}).get(name)
    if not ends or not all(isinstance(e, int | float) and math.isfinite(e) for e in ends):
        ends = None
    return {"value": value, "low": ends and ends[0], "high": ends and ends[1]}


def headline(
    found: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]], chance: Mapping
) -> list[dict[str, Any]]:
    out = []
    for name, about in HEADLINE.items():
        value = _value(found["metrics"]["overall"], name)
        if value is None:
            continue
        rows = [(other, _value(of["metrics"]["overall"], name)) for other, of in others.items()]
        level = chance.get(None) if name == "diagnosis_accuracy" else None
        out.append({"name": NAMES[name], "about": about, **value, "chance": level})
        out[-1]["rows"] = [("this model", value), *rows]
    return out


def organ_figures(
    found: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]], chance: Mapping
) -> list[dict[str, Any]]:
    """For each of BY_ORGAN: a row an organ, a value each of this and the other evaluations."""
    tables = [of["metrics"]["by_organ"] for of in (found, *others.values())]
    out = []
    for name in BY_ORGAN:
        rows = [
            {
                "organ": organ,
                "values": [_value(table.get(organ), name) for table in tables],
                "chance": chance.get(organ) if name == "diagnosis_accuracy" else None,
            }
            for organ in sorted(tables[0])
            if _value(tables[0][organ], name)
        ]
        if rows:
            out.append({"name": NAMES[name], "rows": rows})
    return out


def tables(metrics: Metrics) -> list[dict[str, Any]]:
    """By organ and by task: the columns that have a value, and all exams as the last row."""
    out = []
    for what, key in (("organ", "by_organ"), ("task", "by_task")):
        groups = sorted(metrics[key].items())
        if not groups:
            continue
        rows = [*groups, ("all", metrics["overall"])]
        columns = [name for name in NAMES if any(_value(m, name) for _, m in groups)]
        out.append({"what": what, "columns": [NAMES[name] for name in columns]})
        out[-1]["rows"] = [
            {"name": group, "n": m.get("n"), "undecided": m.get("undecided")}
            | {"values": [_value(m, name) for name in columns]}
            for group, m in rows
        ]
    return out


def attributes(metrics: Metrics) -> list[dict[str, Any]]:
    """Of facts, a row an attribute with its columns F1, precision and recall, and the F1 of each
    organ's reports; none where there are no reports."""
    parts = metrics.get("facts_by_attribute") or {}
    overall, organs = parts.get("overall") or {}, sorted(set(parts) - {"overall"})
    if not overall:
        return []
    columns = ["F1", "Precision", "Recall", *organs]
    rows = []
    for name, row in overall.items():
        values = [_value(row, key) for key in ("f1", "precision", "recall")]
        values += [_value(parts[organ].get(name), "f1") for organ in organs]
        rows.append({"name": name, "n": row["wanted"], "values": values})
    return [{"what": "attribute", "columns": columns, "rows": rows}]


def differences(out: Path, compared: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Of each other evaluation the metrics of both, and ours minus theirs by `compare`.

    Raises:
      InputError: as `compare`: it is of other samples.
    """
    result = []
    for name, folder in compared.items():
        found = compare(folder, out)
        rows = []
        for metric, row in found["overall"].items():
            low, high = row["interval"]
            rows.append({"name": NAMES.get(metric, metric), "ours": row["b"], "theirs": row["a"]})
            rows[-1] |= {"difference": row["difference"], "low": low, "high": high}
            rows[-1] |= {"clear": low > 0 or high < 0, "p": row["p"]}
        result.append({"name": name, "rows": rows})
    return result
