"""The digest of every file of a folder, kept in the folder: by it every changed bit is found.

`XXH128SUMS` has one line a file, in the form of `xxh128sum`, and last its own digest, so that
damage to itself is found as well. It covers all files below its folder, or some that are named.
XXH3 finds accidents, not forgeries: who can change a file can change its digest. It is nearly as
fast as memory; SHA-256 would take a third of a save's time.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading
from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import numpy as np
import xxhash

from echovlm_jax.storage.files import sync_folder, write_bytes
from echovlm_jax.storage.layout import SUMS

MISSING, UNKNOWN, DIFFERS = "missing", "unknown", "differs"

_OWN = b"# XXH128 of the lines above: "
_BLOCK = 2**18  # stays in a core's cache between reading and hashing
_THREADS = min(8, os.cpu_count() or 1)
_LOOK_SECONDS = 0.05
_SHOWN = 5

# Device, number, size, times of change: equal before and after means that nobody wrote.
Stamp = tuple[int, int, int, int, int]


def write(
    folder: Path,
    *,
    names: Iterable[str] | None = None,
    seen: Mapping[Stamp, str] | None = None,
    known: Mapping[str, str] | None = None,
) -> None:
    """Writes XXH128SUMS for files of `folder`, and makes them, and it, durable.

    Args:
      folder: nobody writes into these files any more.
      names: the files to cover; all below `folder` by default.
      seen: what a `Watch` hashed while files were being written.
      known: digests by name that another process found.

    Raises:
      OSError: a file can't be read, or this one not be written.
    """
    known = known or {}
    names = sorted(_list(folder) - {SUMS} if names is None else names)
    todo = [name for name in names if name not in known]
    found = {**known, **of_files(folder, todo, seen)}
    lines = b"".join(_line(name, found[name]) for name in names)
    write_bytes(folder / SUMS, lines + _own_line(lines))
    for inside in {parent for name in (*names, SUMS) for parent in Path(name).parents}:
        sync_folder(folder / inside)


def of_files(
    folder: Path, names: Iterable[str], seen: Mapping[Stamp, str] | None = None
) -> dict[str, str]:
    """The digests of some files of `folder` by name; what has to be read is made durable too."""

    def digest(name: str) -> str:
        with open(folder / name, "rb", buffering=0) as file:
            if seen and (found := seen.get(_stamp(os.fstat(file.fileno())))):
                return found
            os.fsync(file.fileno())
            return _hash(file)

    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def of_array(values: np.ndarray) -> str:
    """The digest of an array's bytes in row-major order; other threads go on meanwhile."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return xxhash.xxh3_128(data.data).hexdigest()


def of_file(path: Path) -> str:
    """The digest of a file's bytes. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        return _hash(file)


def of_json(value: object) -> str:
    """The digest of a value of JSON's types, whatever the order of its keys."""
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check(
    folder: Path,
    *,
    names: Iterable[str] | None = None,
    tick: Callable[[int], object] = lambda n: None,
    part: int = 0,
    parts: int = 1,
) -> dict[str, str]:
    """Compares every byte of `folder` with XXH128SUMS.

    Args:
      folder: what `write` was called with.
      names: the files that are there and covered; all below `folder` by default.
      tick: told of bytes that were read.
      part, parts: read only every `parts`-th file, from `part`; several processes share the work.

    Returns:
      name → "missing", "unknown" (not in XXH128SUMS, or no plain file) or "differs"; empty where
      all is whole. Where XXH128SUMS itself is damaged, nothing can be said of the others.
    """
    wanted = read(folder)
    if isinstance(wanted, str):
        return {SUMS: wanted}
    there = _list(folder) - {SUMS} if names is None else set(names)
    return compare(folder, wanted, there, tick=tick, part=part, parts=parts)


def compare(
    folder: Path,
    wanted: Mapping[str, str],
    there: Set[str],
    *,
    tick: Callable[[int], object] = lambda n: None,
    part: int = 0,
    parts: int = 1,
) -> dict[str, str]:
    """As `check`, of the digests in `wanted` and the files `there`."""
    problems = dict.fromkeys(wanted.keys() - there, MISSING)
    problems |= dict.fromkeys(there - wanted.keys(), UNKNOWN)

    def differs(name: str) -> bool:
        path = _path(folder, name)
        try:
            if not stat.S_ISREG(os.lstat(path).st_mode):
                return True
            with open(path, "rb", buffering=0) as file:
                return _hash(file, tick) != wanted[name]
        except OSError:
            return True

    both = sorted(wanted.keys() & there)[part::parts]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(differs, both)
        problems |= {name: DIFFERS for name, bad in zip(both, found, strict=True) if bad}
    return dict(sorted(problems.items()))


def read(folder: Path) -> dict[str, str] | str:
    """Each covered file's digest by name, as XXH128SUMS has it; or MISSING or DIFFERS of itself."""
    try:
        content = (folder / SUMS).read_bytes()
    except FileNotFoundError:
        return MISSING
    except OSError:
        return DIFFERS
    lines, mark, _ = content.rpartition(_OWN)
    if not mark or content != lines + _own_line(lines):
        return DIFFERS
    return {name: digest for digest, name in (_parse(line) for line in lines.splitlines())}


def told(problems: Mapping[str, str]) -> str:
    """What is broken, in a few words."""
    shown = [f"{name} {what}" for name, what in list(problems.items())[:_SHOWN]]
    more = len(problems) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def state(folder: Path) -> frozenset[tuple[str, Stamp]]:
    """What changes whenever somebody writes into `folder`; finding it reads no file."""
    out = set()
    for name in _list(folder):
        with contextlib.suppress(OSError):
            out.add((name, _stamp(os.lstat(_path(folder, name)))))
    return frozenset(out)


def nbytes(folder: Path) -> int:
    """The bytes of all files of `folder`."""
    return sum(stamp[2] for _, stamp in state(folder))


class Watch:
    """Hashes files while this process writes others, each once it has been closed.

    Use as a context manager around the writing; then hand `seen` to `write`, which takes from it
    only what has not changed since. Where the system doesn't tell which files are open, it does
    nothing, and `write` does it all.

    Args:
      files: lists the files to look at; called again and again, from another thread.
    """

    def __init__(self, files: Callable[[], Iterable[Path]]) -> None:
        self.seen: dict[Stamp, str] = {}
        self._files = files
        self._taken: set[tuple[int, int]] = set()  # by number: folders are renamed
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="digests", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            with contextlib.suppress(OSError):  # a folder that isn't there yet, or has moved
                # In this order: what exists and is open no more is complete.
                there = {_number(path): path for path in self._files()}
                new = there.keys() - self._taken
                for number in new - _open_files() if new else ():
                    if self._ended.is_set():
                        return  # `write` goes on, with more threads
                    self._taken.add(number)
                    self._take(there[number])

    def _take(self, path: Path) -> None:
        with open(path, "rb", buffering=0) as file:
            stamp = _stamp(os.fstat(file.fileno()))
            digest = _hash(file)
            if _stamp(os.fstat(file.fileno())) == stamp:
                self.seen[stamp] = digest


def _open_files() -> set[tuple[int, int]]:
    """Device and number of each file that this process has open. Raises OSError if nobody tells."""
    out = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            out.add(_number(f"/proc/self/fd/{name}"))
    return out


def _number(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _hash(file: FileIO, tick: Callable[[int], object] = lambda n: None) -> str:
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    while count := file.readinto(block):
        digest.update(block[:count])  # which lets go of the interpreter's lock
        tick(count)
    return digest.hexdigest()


def _stamp(status: os.stat_result) -> Stamp:
    times = status.st_mtime_ns, status.st_ctime_ns
    return (status.st_dev, status.st_ino, status.st_size, *times)


def _list(folder: Path) -> set[str]:
    """Every name below `folder` that is no folder; links are not followed."""
    names = set()
    for inside, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(inside, name))]
        base = os.path.relpath(inside, folder)
        names |= {os.path.normpath(os.path.join(base, name)) for name in (*files, *links)}
    return names


def _path(folder: Path, name: str) -> str:
    return os.path.join(folder, name)


def _line(name: str, digest: str) -> bytes:
    # As xxh128sum does: a name with one of these characters is escaped, and the line says so.
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    mark = "\\" if escaped != name else ""
    return os.fsencode(f"{mark}{digest}  {escaped}\n")


def _parse(line: bytes) -> tuple[str, str]:
    """(digest, name) of a line that `_line` wrote."""
    text = os.fsdecode(line)
    digest, _, name = text.removeprefix("\\").partition("  ")
    if text.startswith("\\"):
        parts = name.split("\\\\")
        name = "\\".join(part.replace("\\n", "\n").replace("\\r", "\r") for part in parts)
    return digest, name


def _own_line(lines: bytes) -> bytes:
    return _OWN + xxhash.xxh3_128(lines).hexdigest().encode() + b"\n"
