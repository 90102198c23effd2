"""Writes that fail: one line with the path and the space, where Python's error has neither."""

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from echovlm_jax.errors import InputError
from echovlm_jax.processing.files import shown

_FULL = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "the disk quota is used up"}
_LEAST_FREE = 2**20  # bytes: with less, a library's failed write is taken for a full disk


@contextlib.contextmanager
def writing(path: Path, needed: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Turns an OSError inside into an InputError.

    Args:
      path: the file or folder written; a file that the error itself names takes its place.
      needed: about how many bytes are still to be written, asked for when a write has failed; 0
        where nobody knows.
    """
    try:
        yield
    except OSError as error:
        where = Path(error.filename) if isinstance(error.filename, str | Path) else path
        try:
            missing = needed() if error.errno in _FULL else 0
        except OSError:
            missing = 0
        if (full := full_disk(error, path, missing)) is None:
            reason = error.strerror or "the write failed"
            raise InputError(f"{shown(where)}: {reason}; check the path and the disk") from None
        raise InputError(f"{shown(path)}: {full}") from None


def full_disk(error: OSError, path: Path | None = None, missing: int = 0) -> str | None:
    """The message for a full disk, with the way to resume; None for another error.

    Args:
      error: of a write.
      path: what was being written; the file that the error names by default.
      missing: about how many bytes are still to be written; 0 where nobody knows.
    """
    if error.errno not in _FULL:
        return None
    more = f", about {_size(missing)} more are needed" if missing > 0 else ""
    where = path or (Path(error.filename) if isinstance(error.filename, str) else None)
    free = f" ({_size(free_bytes(where))} free{more})" if where else ""
    return (
        f"{_FULL[error.errno]}{free}; make room and run the same command again, or name a folder on"
        " another disk"
    )


def write_error(path: Path) -> OSError:
    """What to raise where a library says no more than that its write of `path` failed."""
    full = free_bytes(path) < _LEAST_FREE
    return OSError(errno.ENOSPC if full else errno.EIO, "can't be written", str(path))


def free_bytes(path: Path) -> int:
    """The space left on the disk of `path`, which need not be there yet."""
    for folder in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000  # pyright: ignore[reportAssignmentType]
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
