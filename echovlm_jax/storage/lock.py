"""One writer at a time: a lock on a file or a folder, which the kernel takes back at any end."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

from echovlm_jax.errors import InputError


class Lock:
    """Holds a file or a folder that is there; a context manager.

    Args:
      path: what to hold.
      name: what the user knows it by.

    Raises:
      InputError: another process holds it, or has just removed it.
      OSError: it can't be opened.
    """

    def __init__(self, path: Path, name: Path | None = None) -> None:
        busy = InputError(
            f"{name or path}: another process is writing into it; wait for it to end, or name"
            " another"
        )
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # the one that held it has just ended, and removed it
            raise busy from None
        try:
            self._take(path, name or path, busy)
        except BaseException:
            self.close()
            raise

    def _take(self, path: Path, name: Path, busy: InputError) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError as error:  # some network file systems have no locks
            print(
                f"echovlm: {name}: can't be locked here ({error.strerror}): start no second process"
                " that writes into it",
                file=sys.stderr,
            )
            return
        # The one that held it may just have ended, and replaced or removed what we opened.
        try:
            same = os.path.samestat(os.fstat(self._fd), os.stat(path))
        except FileNotFoundError:
            same = False
        if not same:
            raise busy

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
