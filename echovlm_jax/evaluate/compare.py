"""Two evaluations of the same samples: every metric's difference, by paired bootstrap."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.bootstrap import paired
from echovlm_jax.evaluate.harness import METRICS, PREDICTIONS, SETTINGS, with_bertscore
from echovlm_jax.evaluate.metrics import signature
from echovlm_jax.evaluate.summary import METRICS as NAMES
from echovlm_jax.evaluate.summary import Line, statistics
from echovlm_jax.processing.files import read_json, shown

_SAME = ("question", "reference", "task", "language")


def compare(a: str | Path, b: str | Path, *, seed: int = 0) -> dict[str, Any]:
    """How much better or worse B does than A, on the samples that both answered.

    Args:
      a, b: folders that `evaluate` left; the same exams, questions and references, whatever the
        model or the images.
      seed: of the resamples.

    Returns:
      a, b (as given), n, overall and by_organ: {metric: {a, b, difference (b − a), interval, p}},
      without the metrics that have no samples; signature.

    Raises:
      InputError: a folder holds no finished evaluation, or the two are of other samples.
    """
    first, second = read_lines(Path(a)), read_lines(Path(b))
    by_id = {line["id"]: line for line in second}
    for line in first:
        if line["id"] not in by_id:
            raise InputError(
                f"{shown(b)}: has no sample {shown(line['id'])}, which {shown(a)} has; evaluate"
                " both on the same exams and tasks"
            )
        for key in _SAME:
            if line[key] != by_id[line["id"]][key]:
                raise InputError(
                    f"{shown(b)}: sample {shown(line['id'])} has another {key} than in {shown(a)};"
                    " evaluate both on the same data with the same seed"
                )
    if extra := by_id.keys() - {line["id"] for line in first}:
        raise InputError(
            f"{shown(a)}: has no sample {shown(min(extra))}, which {shown(b)} has; evaluate both"
            " on the same exams and tasks"
        )
    second = [by_id[line["id"]] for line in first]
    organs = sorted({line["organ"] for line in first})
    at = {organ: [i for i, line in enumerate(first) if line["organ"] == organ] for organ in organs}
    languages = [line["language"] for line in first if line["kind"] == "report"]
    return {
        **{"a": str(a), "b": str(b), "n": len(first)},
        "overall": _differences(first, second, seed),
        "by_organ": {
            organ: _differences([first[i] for i in rows], [second[i] for i in rows], seed)
            for organ, rows in at.items()
        },
        "signature": signature(languages, seed=seed)
        | {"p": "two-sided, paired bootstrap on the same resamples, centred on their mean"},
    }


def _differences(a: Sequence[Line], b: Sequence[Line], seed: int) -> dict[str, Any]:
    first, second = statistics(a), statistics(b)
    out = {}
    for name in NAMES:
        if name in first and name in second:
            found = paired(first[name], second[name], seed)
            if found is not None:
                out[name] = found._asdict()
    return out


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The predictions of a finished evaluation. Raises InputError where there is none."""
    if not (folder / SETTINGS).is_file():
        raise InputError(f"{shown(folder)}: holds no evaluation; name what `echovlm eval` left")
    if not (folder / METRICS).is_file():
        raise InputError(f"{shown(folder)}: the evaluation isn't finished; start it again")
    path, wanted = folder / PREDICTIONS, read_json(folder / METRICS).get("n")
    try:
        raw = path.read_bytes()
        lines = [json.loads(line) for line in raw.split(b"\n") if line]
        whole = len(lines) == wanted and all(
            {"id", "kind", "organ", "prediction", *_SAME} <= line.keys() for line in lines
        )
    except (OSError, ValueError, AttributeError, RecursionError):
        lines, whole = [], False
    if not whole:
        raise InputError(f"{shown(path)}: is damaged; evaluate again in a new folder")
    return with_bertscore(lines, folder)
