"""The work folder beside a target, from which a killed run resumes.

It holds a journal, which is also the lock, and the unfinished model. A folder with anything else is
refused: clearing it away must not delete other people's files.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from echovlm_jax.convert.table import quoted
from echovlm_jax.errors import InputError
from echovlm_jax.storage import files
from echovlm_jax.storage.lock import WRITER, Lock

JOURNAL, MODEL = "journal.jsonl", "model"
REMEMBERED = "source.json"  # of a source whose files are deleted (see `shards`)


def work_folder(target: Path, suffix: str) -> Path:
    """The folder beside `target` to work in. Raises InputError for "/", which has no beside."""
    if not target.name:
        raise InputError(f"{target}: exists; choose another place")
    return target.with_name(target.name + suffix)


def make_folder(path: Path) -> bool:
    """Makes a work folder; False where it was there.

    Raises:
      InputError: it can't be made, or what is there is not a work folder's.
    """
    try:
        there = path.is_dir()
        held = {inside.name for inside in path.iterdir()} if there else set()
        held -= {JOURNAL + WRITER}
        odd = held - {JOURNAL, MODEL, REMEMBERED} or (held if JOURNAL not in held else set())
        if odd or path.is_symlink():
            what = f"holds {quoted(min(odd))}" if odd else "is a link"
            raise InputError(
                f"{path}: {what} and is no unfinished work of ours, but its name is needed; delete"
                " it or move it away"
            )
        files.make_folder(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be made ({error.strerror}); choose another place"
        ) from None
    return not there


class Journal:
    """A file of JSON lines: first the conversion's identity, then a line a finished tensor.

    It is also the lock that keeps a second process out; a context manager.

    Attributes:
      done: the finished tensors' digests by name: that of all bytes, and after spaces those of the
        chunks; all are computed from the source.

    Raises:
      InputError: another process holds it, it belongs to another conversion, or it is damaged.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path, self._folder = path, path.parent
        self._file: files.Lines | None = None
        try:
            if not files.in_bucket(path):
                files.Lines(path).close()  # there has to be something to hold
            self._lock = Lock(path, name=path.parent)
        except OSError as error:
            raise InputError(f"{path}: cannot be opened ({error.strerror}); try again") from None
        try:
            self._synced = 0.0
            self.done = self._read(identity)
        except BaseException:
            self.__exit__()
            raise

    def check(self) -> None:
        """Raises InputError where another process has taken over since."""
        self._lock.check()

    def _is_held(self) -> bool:
        with contextlib.suppress(InputError, OSError):
            self._lock.check()
            return True
        return False

    def discard(self, made: Path | None = None) -> None:
        """Removes the work folder, and `made` before it; the journal, which says so, last. Where
        another process has taken over, they are its."""
        if not self._is_held():
            return
        if made is not None:
            files.remove(made)
        files.remove(self._folder / MODEL)
        files.remove(self._folder / REMEMBERED)
        self._path.unlink(missing_ok=True)
        if not files.in_bucket(self._folder):
            # Whatever else came into it meanwhile is not ours.
            with contextlib.suppress(OSError):
                self._folder.rmdir()

    def _read(self, identity: dict[str, Any]) -> dict[str, str]:
        """The finished tensors. A file of another conversion is not changed."""
        data = self._path.read_bytes() if self._path.is_file() else b""
        lines, end = self._complete_lines(data)
        if not lines:
            if data or (not files.in_bucket(self._path) and len(os.listdir(self._folder)) > 1):
                raise self._damaged()
            self._file = files.Lines(self._path)
            self._append(identity)
            self._file.sync()
            return {}
        if lines[0] != identity:
            raise InputError(
                f"{self._folder}: holds an unfinished conversion of another source or dtype, or"
                " with other settings; delete that folder to start over"
            )
        self._file = files.Lines(self._path, end)
        done: dict[str, str] = {}
        for line in lines[1:]:
            name, digest = line.get("name"), line.get("sha256")
            if not isinstance(name, str) or not isinstance(digest, str):
                raise self._damaged()
            done[name] = digest
        return done

    def _complete_lines(self, data: bytes) -> tuple[list[dict[str, Any]], int]:
        """The lines before the first incomplete one, which a kill may leave; their size."""
        lines, end = [], 0
        for line in data.splitlines(keepends=True):
            try:
                content = json.loads(line.decode()) if line.endswith(b"\n") else None
            except UnicodeDecodeError:
                raise self._damaged() from None
            except (RecursionError, ValueError):
                content = None
            if not isinstance(content, dict):
                break
            lines.append(content)
            end += len(line)
        return lines, end

    def _damaged(self) -> InputError:
        return InputError(
            f"{self._folder}: its {JOURNAL} is damaged; delete that folder to start over"
        )

    def add(self, name: str, digest: str) -> None:
        """Notes a tensor whose data is durable, with its digests in the form of `done`."""
        self.done[name] = digest
        self._append({"name": name, "sha256": digest})

    def sync(self) -> None:
        """Makes all that was noted survive a power cut."""
        assert self._file is not None
        self._file.sync()
        self._synced = time.monotonic()

    def _append(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line) + "\n")
        # A kill loses nothing that was written to a disk; a power cut a second's work.
        if not files.in_bucket(self._path) and time.monotonic() - self._synced > 1:
            self.sync()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        # It may have been discarded.
        if self._file is not None and self._is_held() and self._path.is_file():
            self._file.close()
        self._lock.close()
