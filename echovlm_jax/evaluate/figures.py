"""Figures of the report as plain data: positions in percent, which the page's templates draw."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from echovlm_jax.evaluate.runs import Curve, Run

POINTS = 300  # of a curve: about a point for two pixels
NUMBERS_TO = 24  # columns of a heatmap that has numbers in its cells
COLUMNS = 48  # of a heatmap without; the layers go on below
_GAP = 9.0  # % of the height between two labels at a curve's end


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 · 10ⁿ apart) from `low` to `high`, about as many as asked for.

    >>> ticks(0, 7.5)
    [0.0, 2.0, 4.0, 6.0]
    """
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def short(value: float) -> str:
    """A tick's text: 0.0001 is 1 · 10⁻⁴, 2000 is 2,000."""
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    if -3 <= power < 6:
        return f"{value:,.6g}"
    digits = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value / 10**power:.3g}·10{digits}"


def smooth(values: Sequence[float]) -> list[float]:
    """A moving mean over a twentieth of the values, fewer at the ends."""
    half = len(values) // 40
    if half == 0:
        return list(values)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return [float(v) for v in (sums[high] - sums[low]) / (high - low)]


def training(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The curves of runs that went on from each other: loss, then learning rate, on one axis of
    steps. Empty where no run logged any."""
    total = sum(run.steps for run in runs)
    if not total:
        return []
    starts = np.cumsum([0, *(run.steps for run in runs)]).tolist()
    bands = [
        {"left": 100 * start / total, "width": 100 * run.steps / total, "name": run.name}
        for start, run in zip(starts, runs, strict=False)
    ]
    panels = []
    for title, unit, keys, about in (
        ("Loss", "nats a token", ("loss", "eval_loss"), 4),
        ("Learning rate", "", ("lr",), 2),
    ):
        found = [_line(key, [run.curves.get(key, []) for run in runs], starts) for key in keys]
        lines = [line for line in found if line is not None]
        if not lines:
            continue
        values = [value for line in lines for value in line.values]
        low, top = min(0.0, *values), max(0.0, *values)
        high = low + ((top - low) or 1.0) * 1.05
        panels.append(
            {
                "title": title,
                "unit": unit,
                "bands": bands,
                "lines": _placed(lines, total, low, high),
                "y": [_tick(value, low, high) for value in ticks(low, top, about)],
                "x": [_tick(value, 0, total) for value in ticks(0, total)],
            }
        )
    return panels


_NAMES = {"loss": "training", "eval_loss": "held out", "lr": ""}


def _tick(value: float, low: float, high: float) -> dict[str, Any]:
    return {"at": 100 * (value - low) / (high - low), "text": short(value)}


class _Line(NamedTuple):
    """One quantity over all runs; a piece a run."""

    key: str
    raw: list[Curve]  # what is drawn faint behind; empty where nothing was smoothed
    main: list[Curve]

    @property
    def values(self) -> list[float]:
        return [value for piece in (*self.raw, *self.main) for _, value in piece]


def _line(key: str, curves: Sequence[Curve], starts: Sequence[int]) -> _Line | None:
    line = _Line(key, [], [])
    for curve, start in zip(curves, starts, strict=False):
        if not curve:
            continue
        points = [(start + step, value) for step, value in curve]
        if key == "loss":
            line.raw.append(_thin(points))
            steps, values = zip(*points, strict=True)
            points = list(zip(steps, smooth(values), strict=True))
        line.main.append(_thin(points))
    return line if line.main else None


def _thin(points: Curve) -> Curve:
    """At most POINTS means of neighbours; the last point stays as it is."""
    if len(points) <= POINTS:
        return points
    parts = np.array_split(np.array(points[:-1], np.float64), POINTS - 1)
    return [(int(x), float(y)) for x, y in (part.mean(0) for part in parts)] + [points[-1]]


def _path(points: Curve, total: int, low: float, high: float) -> str:
    """In a box of 1000 × 1000."""
    at = [(1000 * x / total, 1000 * (high - y) / (high - low)) for x, y in points]
    at = at * 2 if len(at) == 1 else at  # a line from a point to itself has round ends: a dot
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)


def _placed(lines: Sequence[_Line], total: int, low: float, high: float) -> list[dict[str, Any]]:
    """Lines as SVG paths, each with its name and last value, and the height of these in percent."""
    out = []
    for line in lines:
        last = line.main[-1][-1][1]
        raw, main = (
            "".join(_path(piece, total, low, high) for piece in pieces)
            for pieces in (line.raw, line.main)
        )
        out.append({"key": line.key, "name": _NAMES[line.key], "raw": raw, "main": main})
        out[-1] |= {"at": 100 * (last - low) / (high - low), "value": f"{last:.3g}"}
    if len(out) == 2 and abs(gap := out[1]["at"] - out[0]["at"]) < _GAP:
        push = (_GAP - abs(gap)) / 2 * (1 if gap >= 0 else -1)
        out[0]["at"], out[1]["at"] = out[0]["at"] - push, out[1]["at"] + push
    lift = max(0.0, 4 - min(line["at"] for line in out))  # both stay in the box
    for line in out:
        line["at"] += lift
    return out


def heatmaps(run: Run) -> list[dict[str, Any]]:
    """For each kind of token tables of organs by (layer, expert): strips of some layers each."""
    kinds = list(dict.fromkeys(kind for kinds in run.load.values() for kind in kinds))
    out = []
    for kind in kinds:
        tables = {organ: kinds[kind] for organ, kinds in run.load.items() if kind in kinds}
        layers, experts = next(iter(tables.values())).shape
        numbers = layers * experts <= NUMBERS_TO
        step = max(1, (NUMBERS_TO if numbers else COLUMNS) // experts)
        strips = [
            {
                "layers": list(range(first, min(first + step, layers))),
                "rows": [
                    {"organ": organ, "cells": [_cell(v, experts) for v in table.flat]}
                    for organ, whole in tables.items()
                    if (table := whole[first : first + step]) is not None
                ],
            }
            for first in range(0, layers, step)
        ]
        out.append({"kind": kind, "experts": experts, "numbers": numbers, "strips": strips})
    return out


def _cell(share: float, experts: int) -> dict[str, Any]:
    """Colour by how far a share is from an even one, in doublings: full at twice and at half."""
    if not math.isfinite(share):
        return {"side": "none", "depth": 0, "text": "", "title": "no token"}
    doublings = math.log2(share * experts) if share > 0 else -math.inf
    depth = min(abs(doublings), 1.0)
    return {
        "side": "more" if doublings > 0 else "less",
        "depth": round(depth, 2),
        "text": f"{100 * share:.0f}",
        "title": f"{100 * share:.1f} % ({share * experts:.2f} × even)",
    }
