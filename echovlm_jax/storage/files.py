"""Files and folders that appear whole or not at all, and stay after a power cut."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file under another name and gives it its own once it is durable.

    Raises:
      OSError: it can't be written; what was there is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` in UTF-8; half of a surrogate pair is escaped, as JSON does."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def rename_folder(made: Path, path: Path) -> None:
    """Gives a folder, complete and durable, its final name. Raises OSError."""
    os.rename(made, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes durable which names a folder holds."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
