"""The digests of a folder's files, kept in the folder: they find every changed bit.

`XXH128SUMS` has one line a file, in the form of `xxh128sum`, and a last line with its own digest.
It covers all files below its folder, or those named. XXH3 finds accidents, not forgeries, and is
nearly as fast as memory; SHA-256 would take a third of a save's time.
"""

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import numpy as np
import xxhash

from echovlm_jax.storage.files import below, in_bucket, sync_folder, write_bytes
from echovlm_jax.storage.layout import SUMS

MISSING, UNKNOWN, DIFFERS = "missing", "unknown", "differs"

_OWN = b"# XXH128 of the lines above: "
_BLOCK = 2**18  # stays in a core's cache between reading and hashing
_THREADS = min(8, os.cpu_count() or 1)
_SHOWN = 5
_DATA = "/d/"  # where a database of arrays has its data files


def write(
    folder: Path,
    *,
    names: Iterable[str] | None = None,
    known: Mapping[str, str] | None = None,
) -> None:
    """Writes XXH128SUMS for files of `folder`, and makes all of them durable.

    Args:
      folder: the folder; its files must not change any more.
      names: the files to cover; all below `folder` by default.
      known: digests that are known already, by name.

    Raises:
      OSError: a file can't be read, or this one not be written.
    """
    known = known or {}
    names = sorted(set(below(folder)) - {SUMS} if names is None else names)
    todo = [name for name in names if name not in known]
    found = {**known, **of_files(folder, todo)}
    lines = b"".join(_line(name, found[name]) for name in names)
    write_bytes(folder / SUMS, lines + _own_line(lines))
    for inside in {parent for name in (*names, SUMS) for parent in Path(name).parents}:
        sync_folder(folder / inside)


def of_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The digests of some files of `folder` by name; they are made durable too."""

    def digest(name: str) -> str:
        if in_bucket(folder):
            return of_file(folder / name)
        with open(folder / name, "rb", buffering=0) as file:
            os.fsync(file.fileno())
            return _hash(file)

    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def of_array(values: np.ndarray) -> str:
    """The digest of an array's bytes in row-major order. Other threads can run meanwhile."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return xxhash.xxh3_128(data.data).hexdigest()


def of_bytes(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()


def of_file(path: Path, tick: Callable[[int], object] = lambda n: None) -> str:
    """The digest of a file's bytes; `tick` as in `check`. Raises OSError."""
    if in_bucket(path):
        tick(len(content := path.read_bytes()))
        return of_bytes(content)
    with open(path, "rb", buffering=0) as file:
        return _hash(file, tick)


def of_json(value: object) -> str:
    """The digest of a value of JSON's types; the order of keys does not matter."""
    return of_bytes(json.dumps(value, sort_keys=True).encode())


def check(
    folder: Path,
    *,
    names: Iterable[str] | None = None,
    data: bool = True,
    tick: Callable[[int], object] = lambda n: None,
) -> dict[str, str]:
    """Compares every byte of `folder` with XXH128SUMS.

    Args:
      folder: the folder of `write`.
      names: the files to compare; all below `folder` by default.
      data: whether to read arrays' data files too, or only check that they exist.
      tick: called with the number of bytes read.

    Returns:
      name → "missing", "unknown" (not in XXH128SUMS, or no plain file) or "differs"; empty where
      all is whole. A damaged XXH128SUMS is the only entry.
    """
    wanted = read(folder)
    if isinstance(wanted, str):
        return {SUMS: wanted}
    there = set(below(folder)) - {SUMS} if names is None else set(names)
    problems = dict.fromkeys(wanted.keys() - there, MISSING)
    problems |= dict.fromkeys(there - wanted.keys(), UNKNOWN)

    def differs(name: str) -> bool:
        path = folder / name
        try:
            if not in_bucket(folder) and not stat.S_ISREG(os.lstat(path).st_mode):
                return True
            return (data or _DATA not in name) and of_file(path, tick) != wanted[name]
        except OSError:
            return True

    both = sorted(wanted.keys() & there)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(differs, both)
        problems |= {name: DIFFERS for name, bad in zip(both, found, strict=True) if bad}
    return dict(sorted(problems.items()))


def read(folder: Path) -> dict[str, str] | str:
    """The digests in XXH128SUMS by name; MISSING or DIFFERS where it is missing or damaged."""
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
    """A short text about the problems that `check` found."""
    shown = [f"{name} {what}" for name, what in list(problems.items())[:_SHOWN]]
    more = len(problems) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def nbytes(folder: Path) -> int:
    """The bytes of all files of `folder`; 0 for a bucket, whose lists have no sizes."""
    if in_bucket(folder):
        return 0
    sizes = []
    for name in set(below(folder)):
        with contextlib.suppress(OSError):  # deleted meanwhile
            sizes.append(os.lstat(folder / name).st_size)
    return sum(sizes)


def _hash(file: FileIO, tick: Callable[[int], object] = lambda n: None) -> str:
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    while count := file.readinto(block):
        digest.update(block[:count])  # which lets go of the interpreter's lock
        tick(count)
    return digest.hexdigest()


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
    return _OWN + of_bytes(lines).encode() + b"\n"
