"""What a killed conversion leaves for the next one: which tensors are already durable."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from echovlm_jax.errors import InputError


class Journal:
    """A file of JSON lines: first what is converted to what, then a line a finished tensor.

    Also the lock that keeps a second process out. Use as a context manager.

    Attributes:
      done: the finished tensors' digests by name.

    Raises:
      InputError: another process holds it, or it belongs to another conversion.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise InputError(
                f"{path.parent}: another process is converting into it; wait for it to end"
            ) from None
        self._synced = 0.0
        self.done: dict[str, str] = {}
        lines = self._complete_lines()
        if not lines:
            self._file.truncate(0)
            self._append(identity)
        elif lines[0] != identity:
            self._file.close()
            raise InputError(
                f"{path.parent}: holds an unfinished conversion of another source or dtype;"
                " delete that folder to start over"
            )
        else:
            self.done = {line["name"]: line["sha256"] for line in lines[1:]}

    def _complete_lines(self) -> list[Any]:
        """The lines before the first torn one, which a kill or a power cut left; it is cut off."""
        self._file.seek(0)
        lines, end = [], 0
        for line in self._file:
            try:
                lines.append(json.loads(line) if line.endswith("\n") else None)
            except ValueError:
                lines.append(None)
            if not isinstance(lines[-1], dict):
                lines.pop()
                break
            end += len(line.encode())
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() > end:
            self._file.truncate(end)
        return lines

    def add(self, name: str, digest: str) -> None:
        """Notes a tensor whose data is durable."""
        self.done[name] = digest
        self._append({"name": name, "sha256": digest})

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        # A kill loses nothing that was flushed; only a power cut does, and then a second's work.
        if time.monotonic() - self._synced > 1:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
