"""What a file is, told by its first bytes, and small JSON files read with one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from echovlm_jax.errors import InputError

MAX_JSON_BYTES = 64 * 2**20  # the largest tokenizer.json in use is about 35 MB


def shown(path: str | Path) -> str:
    """A path as errors show it: always one line."""
    return "".join(c if c.isprintable() else "?" for c in str(path))


def file_kind(path: str | Path) -> str:
    """'png', 'jpeg' or 'dicom', by content; the name's ending is not looked at.

    Raises:
      InputError: the file can't be read or is none of the three.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(132)
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(path)}: can't be read ({_reason(error)})") from None
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[128:] == b"DICM":
        return "dicom"
    if not head:
        raise InputError(f"{shown(path)}: the file is empty")
    raise InputError(f"{shown(path)}: is neither PNG, JPEG nor DICOM, whatever its name says")


def read_text(path: Path, limit: int = MAX_JSON_BYTES) -> str:
    """A UTF-8 text file of bounded size. Raises InputError."""
    try:
        if path.stat().st_size > limit:
            raise InputError(f"{shown(path)}: is larger than {limit} bytes")
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{shown(path)}: is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{shown(path)}: can't be read ({_reason(error)})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError when it is anything else."""
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError):
        raise InputError(f"{shown(path)}: is not valid JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{shown(path)}: must hold a JSON object, found {type(value).__name__}")
    return value


def read_json_if_there(path: Path) -> dict[str, Any] | None:
    """`read_json`, or None where there is no such file."""
    return read_json(path) if path.is_file() else None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
