"""The first look at all source files: where each record is, which are doubles, who goes together.

A row of a few bytes a record is kept: millions fit in memory. Texts are read again, record
by record, when the dataset is written.
"""

import contextlib
import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from echovlm_jax.data.forms import conversations_of, unknown_keys
from echovlm_jax.data.groups import NUMBERS, TIE, key_of
from echovlm_jax.data.json_list import parse_entry, read_entries
from echovlm_jax.data.keys import text_key
from echovlm_jax.data.official import group_ids, pattern_groups, record_id
from echovlm_jax.errors import InputError
from echovlm_jax.patterns import Pattern
from echovlm_jax.processing.files import open_file, shown
from echovlm_jax.progress import progress

ROW = np.dtype(
    [
        ("source", "<i4"),  # index into the list of files
        ("number", "<i8"),  # of the entry in its file, from 0
        ("part", "<i8"),  # which of the entry's conversations
        ("offset", "<i8"),  # bytes
        ("size", "<i8"),
        ("group", "<i8"),  # the same for all records that belong together; −1: alone
        ("split", "<i1"),  # index into SPLITS
        ("pictures", "V16"),  # a digest of its pictures' bytes
        ("twice", "?"),  # its id is that of an earlier record of the file
    ]
)
_MOST_KEYS = 50  # of those that nobody reads, named in a result


class Sources(NamedTuple):
    files: tuple[Path, ...]
    stems: tuple[str, ...]
    digests: tuple[str, ...]  # of the files' bytes
    rows: np.ndarray  # ROW [N], file by file, without what the pictures tell
    keys: np.ndarray  # uint64 [N], of each record's own id
    ties: np.ndarray  # TIE: what the records themselves say of who belongs together
    unmatched: tuple[int, str]  # records that the pattern does not match, and the first one's id
    ignored: dict[str, int]  # keys that nobody reads, and how many entries have each


def read_sources(
    files: Sequence[Path], *, pattern: Pattern | None = None, salt: bytes = b""
) -> Sources:
    """Reads every file once.

    Args:
      files: official JSON; their stems name the sources, so no two may have the same.
      pattern: its first group names the patient, in a record's id or else in its images' paths.
      salt: secret of the keys of `ties`.

    Raises:
      InputError: a file is no JSON list, two files have one name, or there is no record at all.
    """
    stems = tuple(path.stem for path in files)  # as named: a link may lead to a mere digest
    files = tuple(path.resolve() for path in files)
    if twice := {stem for stem in stems if stems.count(stem) > 1}:
        raise InputError(
            f"two sources are named {shown(min(twice))!r}, and ids begin with the name; rename one"
        )
    columns: dict[str, array[int]] = {
        name: array("q") for name in ("source", "number", "part", "offset", "size")
    }
    keys, tied, kinds, values = array("Q"), array("q"), array("b"), array("Q")
    digests, unmatched, example, ignored = [], 0, "", Counter[str]()
    total = sum(_size(path) for path in files)
    with progress(total, "B", "read") as tick:
        for n, (path, stem) in enumerate(zip(files, stems, strict=True)):
            digests.append(digest_of(path))
            for number, entry in enumerate(read_entries(path)):
                ignored.update(set(unknown_keys(entry.value)))
                several = conversations_of(entry.value)
                for part, (ending, value) in enumerate(several):
                    row = len(keys)
                    place = (n, number, part, entry.offset, entry.size)
                    for column, cell in zip(columns.values(), place, strict=True):
                        column.append(cell)
                    id = record_id(value, number) + ending
                    keys.append(text_key(f"{stem}/{id}"))
                    found = group_ids(value)
                    if len(several) > 1:  # the same in other words, it may be
                        found.append(("entry", f"{n}/{number}"))
                    if pattern is not None:
                        matched = pattern_groups(value, pattern)
                        found += [("pattern", group) for group in matched]
                        if not matched:
                            example = example if unmatched else id
                            unmatched += 1
                    for kind, named in found:
                        tied.append(row)
                        kinds.append(NUMBERS[kind])
                        values.append(key_of(kind, named, salt))
                tick(entry.size)
    if not keys:
        raise InputError(f"{', '.join(map(shown, files))}: no record in them; check the paths")
    rows = np.zeros(len(keys), ROW)
    for name, column in columns.items():
        rows[name] = column
    own = np.array(keys, np.uint64)
    _, first = np.unique(own, return_index=True)
    rows["twice"] = True
    rows["twice"][first] = False
    ties = np.zeros(len(tied), TIE)
    ties["row"], ties["kind"], ties["key"] = tied, kinds, values
    shown_keys = {shown(key)[:60]: count for key, count in ignored.most_common(_MOST_KEYS)}
    return Sources(files, stems, tuple(digests), rows, own, ties, (unmatched, example), shown_keys)


def compile_pattern(text: str) -> Pattern:
    """A --group-pattern. Raises InputError where it is no regular expression, or has no group."""
    pattern = Pattern(text, f"--group-pattern {shown(text)}")
    if not pattern.groups:
        raise InputError(
            f"--group-pattern {shown(text)} has no group; put what names the patient into"
            r" parentheses, as in 'bus_(\d+)'"
        )
    return pattern


def read_rows(rows: np.ndarray, files: Sequence[str]) -> Iterator[tuple[Any, str, Any]]:
    """Each of some rows with the ending of its id and its entry, read again from its source."""
    with contextlib.ExitStack() as stack:
        opened: dict[str, IO[bytes]] = {}
        for row in rows:
            path = files[int(row["source"])]
            if path not in opened:
                opened[path] = stack.enter_context(open(path, "rb"))
            opened[path].seek(int(row["offset"]))
            try:
                entry = parse_entry(opened[path].read(int(row["size"])))
            except ValueError:
                raise changed(Path(path)) from None
            yield row, *conversations_of(entry)[int(row["part"])]


def changed(path: Path) -> InputError:
    return InputError(
        f"{shown(path)}: has changed while the dataset was built; run the same command again"
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise InputError(
            f"{shown(path)}: can't be read ({error.strerror}); check the path"
        ) from None


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal. Raises InputError or OSError."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while data := file.read(2**20):
            digest.update(data)
    return digest.hexdigest()
