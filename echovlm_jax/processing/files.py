"""What a file is, told by its first bytes, and small JSON files read with one-line errors."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from echovlm_jax.errors import InputError

# Value representations of the elements that a DICOM data set can begin with.
_FIRST_VRS = {b"UL", b"CS", b"UI", b"DA", b"LO", b"OB", b"TM", b"ST", b"SH"}
MAX_JSON_BYTES = 64 * 2**20  # the largest tokenizer.json in use is about 35 MB


def shown(path: str | Path) -> str:
    """A path as errors show it: always one line."""
    return "".join(c if c.isprintable() else "?" for c in str(path))


def open_file(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading bytes.

    Raises:
      InputError: it is a pipe, a device or a folder, any of which could block or never end.
      OSError, ValueError: as `open`.
    """
    # Without O_NONBLOCK, opening a pipe waits for its writer, perhaps forever.
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(f"{shown(path)}: can't be read (it is not a regular file)") from None
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def model_files(folder: Path) -> Path:
    """Where a MODEL folder has config.json and its tokenizer: a training run, and each of its
    checkpoints (RUN/checkpoints/STEP), in RUN/model; any other folder itself."""
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    is_run = (run / "checkpoints").is_dir() and (run / "model" / "config.json").is_file()
    return run / "model" if is_run else folder


def file_kind(path: str | Path) -> str:
    """'png', 'jpeg' or 'dicom', by content; the name's ending is not looked at.

    Raises:
      InputError: the file can't be read or is none of the three.
    """
    try:
        with open_file(path) as file:
            head = file.read(132)
    except InputError:  # a ValueError itself
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(path)}: can't be read ({_reason(error)})") from None
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if is_dicom(head):
        return "dicom"
    if not head:
        raise InputError(f"{shown(path)}: the file is empty")
    raise InputError(f"{shown(path)}: is neither PNG, JPEG nor DICOM, whatever its name says")


def is_dicom(head: bytes) -> bool:
    """Whether a file's first 132 bytes begin a DICOM file.

    Some devices leave out the preamble, or the file meta information as well: then the first
    element must be of group 2 or 8, and state a VR or a length that such an element can have.
    """
    if head[128:132] == b"DICM":
        return True
    little, big = head[:2] in (b"\2\0", b"\x08\0"), head[:2] == b"\0\x08"
    if (little or big) and head[4:6] in _FIRST_VRS:
        return True
    length = int.from_bytes(head[4:8], "little")
    after = head[8 + length : 10 + length]
    return head[:2] == b"\x08\0" and length <= 64 and after in (b"\x08\0", b"\x10\0")


def read_bytes(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """A regular file of bounded size. Raises InputError."""
    try:
        with open_file(path) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{shown(path)}: can't be read ({_reason(error)})") from None
    if len(data) > limit:
        raise InputError(f"{shown(path)}: is larger than {limit} bytes")
    return data


def read_text(path: Path, limit: int = MAX_JSON_BYTES) -> str:
    """A UTF-8 text file of bounded size, its line ends made plain. Raises InputError."""
    try:
        text = read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{shown(path)}: is not UTF-8 text") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError when it is anything else."""
    try:
        value = json.loads(read_text(path))
    except InputError:
        raise
    except (ValueError, RecursionError):  # ValueError also for a number of too many digits
        raise InputError(f"{shown(path)}: is not valid JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{shown(path)}: must hold a JSON object, found {type(value).__name__}")
    return value


def read_json_if_there(path: Path) -> dict[str, Any] | None:
    """`read_json`, or None where there is no such file."""
    return read_json(path) if path.is_file() else None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
