"""An evaluation's folder: the names of its files, its predictions and what lies beside them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echovlm_jax.evaluate.summary import Line
from echovlm_jax.processing.files import read_json_if_there

SETTINGS, PREDICTIONS = "settings.json", "predictions.jsonl"
FIGURES, BERTSCORE = "metrics.json", "bertscore.json"
REPORT = "report.html"


def with_bertscore(lines: Sequence[Line], out: Path) -> list[dict[str, Any]]:
    """The lines, those of reports with the "bertscore" that the folder has for them."""
    known = read_json_if_there(out / BERTSCORE) or {}
    return [{**line, "bertscore": known.get(line["id"])} for line in lines]
