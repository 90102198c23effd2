"""A program in a process of its own: for what strangers wrote, and what has to end.

What such a program may take, limits of the operating system say, which it sets for itself.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

_MAX_WAIT = 300  # seconds by the clock for a reply; a machine may be busy


class Child:
    """A process that answers in JSON, a line each way: started when first asked, and anew when it
    has ended. It ends with its input, and so with this process."""

    def __init__(self, program: str, told: Mapping[str, Any], most: int) -> None:
        """Args:
        program: the path of a Python file, which imports nothing of ours.
        told: the first thing that the process is told; {} is its reply where it can begin.
        most: bytes of a reply.
        """
        self._program, self._told, self._most = program, told, most
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, content: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """A reply; for None only whether the process can begin. None: it ended without one, or
        took too long for it."""
        with self._lock:
            if (
                self._owner != os.getpid()
                or self._process is None
                or self._process.poll() is not None
            ):
                reply = self._start()
                if reply != {}:
                    return reply
            return {} if content is None else self._request(content)

    def _start(self) -> dict[str, Any] | None:
        # No thread of ours and nothing of JAX is copied: the process starts from a program file.
        process = subprocess.Popen(
            [sys.executable, "-S", "-P", "-X", "utf8", self._program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._process, self._owner = process, os.getpid()
        weakref.finalize(self, _end, process, self._owner)
        return self._request(self._told)

    def _request(self, content: Mapping[str, Any]) -> dict[str, Any] | None:
        """A reply, or None from a process that has ended or doesn't answer, which is ended."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        # What is no text or number, a picture for one, can only be seen to be there.
        line = json.dumps(content, default=lambda value: f"<{type(value).__name__}>")
        until, held = time.monotonic() + _MAX_WAIT, bytearray()
        try:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
            while not held.endswith(b"\n") and len(held) <= self._most:
                left = until - time.monotonic()
                if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                    break
                if not (more := os.read(process.stdout.fileno(), 2**20)):
                    break
                held += more
            else:
                return json.loads(held)
        except (OSError, ValueError):
            pass
        except BaseException:  # Ctrl-C: its reply would be taken for the next one's
            _end(process, self._owner)
            raise
        _end(process, self._owner)
        return None


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Ends a process and closes its pipes; after a fork only the one that started it does."""
    if owner != os.getpid():
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
