"""What training runs left in their folders, read for the report: curves and experts' loads."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echovlm_jax.errors import InputError
from echovlm_jax.processing.files import read_json_if_there, read_text, shown
from echovlm_jax.storage.layout import CONFIG, METRICS_LOG, ROUTING

MAX_BYTES = 2**30  # of one log

Curve = list[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class Run:
    """A run as far as the report shows it."""

    name: str  # its stage; the folder's name where that is unknown
    steps: int  # the last one logged
    curves: dict[str, Curve]  # "loss", "eval_loss" and "lr", those that are there
    skipped: int  # logged steps whose update was left out
    # Of the last evaluation: organ → kind of token → shares [L, E], of layers and experts; not a
    # number where the organ had no such token. Empty for a model without a mixture.
    load: dict[str, dict[str, np.ndarray]]


def read_run(folder: Path) -> Run:
    """Reads a run's folder; files that are missing leave out what they would tell.

    Raises:
      InputError: there is no such folder, or a file in it is not what `train` writes.
    """
    if not folder.is_dir():
        raise InputError(f"{shown(folder)}: is no folder; name one that `echovlm train` made")
    config = read_json_if_there(folder / CONFIG) or {}
    curves: dict[str, Curve] = {}
    steps = skipped = 0
    for line in json_lines(folder / METRICS_LOG):
        step = line.get("step")
        if not isinstance(step, int):
            raise InputError(f"{shown(folder / METRICS_LOG)}: a line has no step; is it of a run?")
        steps = max(steps, step)
        skipped += bool(line.get("skipped"))
        for key in ("loss", "eval_loss", "lr"):
            value = line.get(key)
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(key, []).append((step, float(value)))
    name = str(config.get("stage") or folder.resolve().name).replace("_", " ")
    return Run(name, steps, curves, skipped, _load(folder / ROUTING))


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file; none where it is missing, and not a last line cut off.

    Raises:
      InputError: another line is not a JSON object.
    """
    if not path.is_file():
        return
    text = read_text(path, MAX_BYTES)
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError
        except (ValueError, RecursionError):
            if number == len(lines):  # no line end: the writer was stopped in the middle
                return
            raise InputError(
                f"{shown(path)}: line {number} is not a JSON object; take it out"
            ) from None
        yield value


def _load(path: Path) -> dict[str, dict[str, np.ndarray]]:
    last = next(reversed([*json_lines(path)]), {})
    out: dict[str, dict[str, np.ndarray]] = {}
    shapes = set()
    try:
        for organ, kinds in last.get("expert_load", {}).items():
            for kind, shares in kinds.items():
                table = np.array(shares, np.float64)
                empty = table.sum(axis=-1, keepdims=True) == 0
                out.setdefault(organ, {})[kind] = np.where(empty, np.nan, table)
                shapes.add(table.shape)
    except (ValueError, TypeError, AttributeError, np.exceptions.AxisError):
        shapes = {(), (1,)}
    if len(shapes) > 1 or any(len(shape) != 2 or 0 in shape for shape in shapes):
        raise InputError(f"{shown(path)}: its last line is no table of layers by experts")
    return out
