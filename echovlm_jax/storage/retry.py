"""Reads that a system refuses for a moment are made again, counted, and named when they fail.

Only where it may get better: a server of files that is away, a connection that broke. What is not
there, not permitted or damaged stays so. TensorStore makes a bucket's requests again by itself, and
its count is taken in here.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from echovlm_jax.storage import bucket

_Read = TypeVar("_Read")

# Before each further try; half a minute in all.
_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_PASSING = (
    *(errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
    *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ESHUTDOWN),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
)
_lock, _counted = threading.Lock(), 0


def patiently(read: Callable[[], _Read], path: Path) -> _Read:
    """What `read` returns; it is called again, after longer and longer waits, while it raises an
    OSError that may pass. Each time is a line on standard error.

    Args:
      read: a function that may be called several times.
      path: the file, for messages.

    Raises:
      OSError: it does not pass, or has not passed; it names the file, and says how often it was
        tried.
    """
    for tried, wait in enumerate((*_WAITS, None), 1):
        try:
            return read()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            reason = error.strerror or os.strerror(error.errno)
            if wait is None:
                told = f"{reason}, tried {tried} times in {sum(_WAITS):g} s"
                raise OSError(error.errno, told, str(path)) from error
        count(1)
        print(
            f"echovlm: {path}: can't be read ({reason}); tried again in {wait:g} s", file=sys.stderr
        )
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def system_error(text: str) -> OSError | None:
    """The error of a system's call that a C++ library tells of in words, such as "pread() failed:
    Input/output error; reading …"; None where it tells of anything else."""
    found = re.match(r"\w+\(\) failed: ([^;]*)", text)
    reasons = {os.strerror(number): number for number in errno.errorcode}
    return OSError(reasons.get(found[1], errno.EINVAL), found[1]) if found else None


def count(times: int) -> None:
    """Adds what was made again elsewhere, such as in a worker's process."""
    global _counted
    with _lock:
        _counted += times


def counted() -> int:
    """How many reads and requests this process has made again."""
    return _counted + bucket.retries()
