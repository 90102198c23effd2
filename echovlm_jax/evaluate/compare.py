"""Two evaluations of the same samples: every metric's difference, by paired bootstrap."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.bootstrap import Statistic, paired
from echovlm_jax.evaluate.fact_metrics import SIGNATURE
from echovlm_jax.evaluate.folder import FIGURES, PREDICTIONS, SETTINGS, with_bertscore
from echovlm_jax.evaluate.metrics import signature
from echovlm_jax.evaluate.summary import METRICS, Line, statistics
from echovlm_jax.processing.files import read_json, shown
from echovlm_jax.storage.files import as_path

_SAME = ("question", "reference", "task", "language")


def compare(
    a: str | Path | Sequence[str | Path],
    b: str | Path | Sequence[str | Path],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """How much better or worse B does than A, on the samples that both answered.

    Args:
      a, b: folders that `evaluate` left; the same exams, questions and references, whatever the
        model or the images. Several, such as runs of several seeds, are taken together: a metric is
        then over the answers of all, and a resample takes an exam's answers of all or of none.
      seed: seed of the resamples.

    Returns:
      a, b (the folders' names, a list where several were given), n (samples of one folder),
      overall and by_organ: {metric: {a, b, difference (b − a), interval, p}}, without the metrics
      that have no samples; signature.

    Raises:
      InputError: a folder holds no finished evaluation, or two are of other samples.
    """
    first, second = _folders(a), _folders(b)
    lines = read_lines(first[0])
    ours, theirs = (
        [_same(lines, read_lines(folder), first[0], folder) for folder in folders]
        for folders in (first, second)
    )
    organs = sorted({line["organ"] for line in lines})
    at = {organ: [i for i, line in enumerate(lines) if line["organ"] == organ] for organ in organs}
    languages = [line["language"] for line in lines if line["kind"] == "report"]
    return {
        **{"a": _names(a), "b": _names(b), "n": len(lines)},
        "overall": _differences(ours, theirs, range(len(lines)), seed),
        "by_organ": {organ: _differences(ours, theirs, rows, seed) for organ, rows in at.items()},
        "signature": signature(languages, seed=seed)
        | SIGNATURE
        | {"p": "two-sided, paired bootstrap on the same resamples, centred on their mean"},
    }


def _folders(given: str | Path | Sequence[str | Path]) -> list[Path]:
    folders = [given] if isinstance(given, str | os.PathLike) else given
    if not folders:
        raise InputError("no evaluation was given; name at least one on each side")
    return [as_path(folder) for folder in folders]


def _names(given: str | Path | Sequence[str | Path]) -> str | list[str]:
    return str(given) if isinstance(given, str | os.PathLike) else [str(folder) for folder in given]


def _same(lines: Sequence[Line], other: Sequence[Line], at: Path, folder: Path) -> list[Line]:
    """The other folder's lines in the order of the first one's, which are of the same samples."""
    by_id = {line["id"]: line for line in other}
    for line in lines:
        if line["id"] not in by_id:
            raise InputError(
                f"{shown(folder)}: has no sample {shown(line['id'])}, which {shown(at)} has;"
                " evaluate both on the same exams and tasks"
            )
        for key in _SAME:
            if line[key] != by_id[line["id"]][key]:
                raise InputError(
                    f"{shown(folder)}: sample {shown(line['id'])} has another {key} than in"
                    f" {shown(at)}; evaluate both on the same data with the same seed"
                )
    if extra := by_id.keys() - {line["id"] for line in lines}:
        raise InputError(
            f"{shown(at)}: has no sample {shown(min(extra))}, which {shown(folder)} has; evaluate"
            " both on the same exams and tasks"
        )
    return [by_id[line["id"]] for line in lines]


def _differences(
    a: Sequence[Sequence[Line]], b: Sequence[Sequence[Line]], rows: Sequence[int], seed: int
) -> dict[str, Any]:
    first, second = ([[lines[i] for i in rows] for lines in system] for system in (a, b))
    out = {}
    before, after = _together(first), _together(second)
    for name in METRICS:
        if name in before and name in after:
            found = paired(before[name], after[name], seed)
            if found is not None:
                out[name] = found._asdict()
    return out


def _together(runs: Sequence[Sequence[Line]]) -> dict[str, Statistic]:
    """Each metric over the answers of several runs: those of a sample are added up."""
    found, count = statistics([line for lines in runs for line in lines]), len(runs)
    reports = sum(line["kind"] == "report" for lines in runs for line in lines)
    if "bertscore" in found and len(found["bertscore"].columns) < reports:
        del found["bertscore"]  # some runs, or reports, are without
    out = {}
    for name, of in found.items():
        samples, width = len(of.columns) // count, of.columns.shape[1]
        out[name] = of._replace(columns=of.columns.reshape(count, samples, width).sum(axis=0))
    return out


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The predictions of a finished evaluation. Raises InputError where there is none."""
    if not (folder / SETTINGS).is_file():
        raise InputError(f"{shown(folder)}: holds no evaluation; name what `echovlm eval` left")
    if not (folder / FIGURES).is_file():
        raise InputError(f"{shown(folder)}: the evaluation isn't finished; start it again")
    path, wanted = folder / PREDICTIONS, read_json(folder / FIGURES).get("n")
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
