"""What a command prints: one JSON object, or lines for people."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def print_json(result: Mapping[str, Any]) -> None:
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(_plain(result), ensure_ascii=not utf8, allow_nan=False))


def _plain(value: Any) -> Any:
    """`value` in JSON's own types: numpy's scalars and arrays unpacked, paths as text, and null
    for the NaN and infinity that JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def show(result: Mapping[str, Any], args: argparse.Namespace) -> None:
    print("\n".join(lines(result)))


def lines(result: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A result for people: a line a key, deeper ones indented, a list of records a line each."""
    for key, value in result.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from lines(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{indent}{key}:"
            for record in value:
                cells = (f"{name} {_cell(name, item)}" for name, item in record.items())
                yield f"{indent}  " + "  ".join(cells)
        else:
            yield f"{indent}{key}: {_cell(key, value)}"


def _cell(key: str, value: Any) -> str:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) or "none"
    if isinstance(value, int) and key.endswith("bytes") and value >= 2**20:
        return f"{value:,} ({value / 2**30:.2f} GiB)"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Records of the same keys as a table: a line of names, then one each, columns aligned."""
    rows = [list(records[0]), *([_cell(k, v) for k, v in r.items()] for r in records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
