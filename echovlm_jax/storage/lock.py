"""One writer at a time: a lock that ends soon after its holder does.

On a file system it is the kernel's lock of the file or folder. In a bucket it is an object,
NAME.writer, created only if absent. Its holder rewrites it every RENEW seconds. Another process
watches it: a renewal shows that the holder is alive. After EXPIRE seconds without one, the lock is
taken over, by one process only. No clocks are compared. The death of a holder on this machine is
seen at once. A holder checks that the lock is still its own before it declares anything whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

from echovlm_jax.errors import InputError
from echovlm_jax.storage.bucket import BucketPath

WRITER = ".writer"  # behind the name of what is held
RENEW, EXPIRE = 5.0, 30.0


class Lock:
    """Holds an existing file or folder, or a name in a bucket; a context manager.

    Args:
      path: the file, folder or name.
      name: the path to show in errors; `path` by default.

    Raises:
      InputError: another process holds it, or has just removed it.
      OSError: it can't be opened.
    """

    def __init__(self, path: Path, name: Path | None = None) -> None:
        self._fd, self._lease = -1, None
        busy = InputError(
            f"{name or path}: another process is writing into it; wait for it to end, or name"
            " another"
        )
        if isinstance(path, BucketPath):
            self._lease = _Lease(path.with_name(path.name + WRITER), busy)
            return
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

    def check(self, *, ask: bool = True) -> None:
        """Raises InputError where another process may have taken over: write nothing more.

        Args:
          ask: whether to read the lock's object, or only see that it was renewed in time.
        """
        if self._lease is not None:
            self._lease.check(ask)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._lease is not None:
            self._lease.close()
            self._lease = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Lease:
    """The lock of a bucket."""

    def __init__(self, path: BucketPath, busy: InputError) -> None:
        self._path, self._id, self._renewals = path, uuid.uuid4().hex, 0
        self._version = self._acquire(busy)
        self._renewed, self._ended = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _acquire(self, busy: InputError) -> bytes:
        while (version := self._path.write_if(self._content(), None)) is None:
            if (found := self._path.read_stamped()) is None:
                continue  # given back just now
            content, seen = found
            alive = _is_running(content)
            if alive is None:
                self._watch(seen, busy)
            if alive or (version := self._path.write_if(self._content(), seen)) is None:
                raise busy
            return version
        return version

    def _watch(self, seen: bytes, busy: InputError) -> None:
        """Returns once a lock has not been renewed for EXPIRE seconds."""
        print(
            f"echovlm: {self._path}: is held on another machine; taken over in {EXPIRE:.0f} s"
            " unless its holder is alive",
            file=sys.stderr,
        )
        deadline = time.monotonic() + EXPIRE
        while time.monotonic() < deadline:
            time.sleep(RENEW / 5)
            if (found := self._path.read_stamped()) is None or found[1] != seen:
                raise busy

    def _content(self) -> bytes:
        self._renewals += 1  # each is another version
        content = {"id": self._id, "host": socket.gethostname(), "process": _process(os.getpid())}
        return json.dumps(content | {"renewals": self._renewals}).encode()

    def _renew(self) -> None:
        while not self._ended.wait(RENEW):
            with contextlib.suppress(OSError):  # `check` counts the seconds
                version = self._path.write_if(self._content(), self._version)
                if version is None:  # or it is ours: an answer was lost, and the request repeated
                    found = self._path.read_stamped()
                    if found is None or self._id.encode() not in found[0]:
                        self._renewed = -EXPIRE
                        return
                    version = found[1]
                self._version, self._renewed = version, time.monotonic()

    def check(self, ask: bool) -> None:
        lost = time.monotonic() - self._renewed > EXPIRE - RENEW
        if not lost and ask:  # this machine's clock may have stood still
            found = self._path.read_stamped()
            lost = found is None or self._id.encode() not in found[0]
        if lost:
            raise InputError(
                f"{self._path}: was not renewed in time, so that another process may be writing"
                " there now; run the same command again"
            )

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # it expires
            self._path.write_if(None, self._version)


def _process(pid: int) -> list[str] | None:
    """The identity of a running process among those of all machines; None where it has ended."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ended = status[0] == "Z"  # and nobody has asked for its exit code yet
        return None if ended else [boot, os.readlink("/proc/self/ns/pid"), str(pid), status[19]]
    except OSError:
        return None


def _is_running(content: bytes) -> bool | None:
    """Whether a lock's holder is running; None where it is on another machine."""
    try:
        holder, here = json.loads(content)["process"], _process(os.getpid())
        if holder[:2] == (here or [])[:2]:
            return _process(int(holder[2])) == holder
    except (ValueError, KeyError, TypeError, IndexError):
        pass
    return None
