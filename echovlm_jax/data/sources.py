"""The first look at all source files: where each record is, which are doubles, who goes together.

A row of a few bytes a record is kept, so that millions fit in memory; texts are read again, record
by record, when the dataset is written.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from echovlm_jax.data.forms import conversations_of, unknown_keys
from echovlm_jax.data.json_list import read_entries
from echovlm_jax.data.keys import mix, text_key, uniform
from echovlm_jax.data.official import group_texts, record_id
from echovlm_jax.errors import InputError
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
        ("twice", "?"),  # its id is that of an earlier record of the file
    ]
)
SPLITS = ("train", "validation", "test")
_MOST_KEYS = 50  # of those that nobody reads, named in a result
_SALT = 0x5EED  # so that a split does not lean on other uses of the same hashes


class Sources(NamedTuple):
    files: tuple[Path, ...]
    stems: tuple[str, ...]
    digests: tuple[str, ...]  # of the files' bytes
    rows: np.ndarray  # ROW [N], file by file
    ignored: dict[str, int]  # keys that nobody reads, and how many entries have each


def read_sources(files: Sequence[Path], *, validation: float = 0.0, test: float = 0.0) -> Sources:
    """Reads every file once.

    A record's split follows from its ids alone: the patient's where it names one, and so on through
    all records that share a patient, study, exam or image with it; a record that shares nothing
    goes by its own id.

    Args:
      files: official JSON; their stems name the sources, so no two may have the same.
      validation, test: about this share of the groups goes to each.

    Raises:
      InputError: a file is no JSON list, two files have one name, or there is no record at all.
    """
    files = tuple(path.resolve() for path in files)
    stems = tuple(path.stem for path in files)
    if twice := {stem for stem in stems if stems.count(stem) > 1}:
        raise InputError(
            f"two sources are named {shown(min(twice))!r}, and ids begin with the name; rename one"
        )
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise InputError("the shares of validation and test must be at least 0, together below 1")
    columns: dict[str, array[int]] = {
        name: array("q") for name in ("source", "number", "part", "offset", "size")
    }
    keys, edges = array("Q"), (array("q"), array("Q"))
    digests, ignored = [], Counter[str]()
    total = sum(_size(path) for path in files)
    with progress(total, "B", "read") as tick:
        for n, (path, stem) in enumerate(zip(files, stems, strict=True)):
            digests.append(_digest(path))
            for number, entry in enumerate(read_entries(path)):
                ignored.update(set(unknown_keys(entry.value)))
                for part, (ending, value) in enumerate(conversations_of(entry.value)):
                    row = len(keys)
                    values = (n, number, part, entry.offset, entry.size)
                    for column, cell in zip(columns.values(), values, strict=True):
                        column.append(cell)
                    keys.append(text_key(f"{stem}/{record_id(value, number)}{ending}"))
                    for text in group_texts(value):
                        edges[0].append(row)
                        edges[1].append(text_key(text))
                tick(entry.size)
    if not keys:
        raise InputError(f"{', '.join(map(shown, files))}: no record in them; check the paths")
    rows = np.zeros(len(keys), ROW)
    for name, column in columns.items():
        rows[name] = column
    own = np.array(keys, np.uint64)
    _mark(rows, own, np.array(edges[0], np.int64), np.array(edges[1], np.uint64))
    rows["split"] = _split(rows["group"], own, validation, test)
    shown_keys = {_printable(key): count for key, count in ignored.most_common(_MOST_KEYS)}
    return Sources(files, stems, tuple(digests), rows, shown_keys)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:60]


def _mark(rows: np.ndarray, own: np.ndarray, members: np.ndarray, keys: np.ndarray) -> None:
    """Sets `twice` and `group`, given each row's own key and (row, key) of what ties rows."""
    _, first = np.unique(own, return_index=True)
    rows["twice"] = True
    rows["twice"][first] = False
    group = np.arange(len(rows))
    if len(keys):
        _, number = np.unique(keys, return_inverse=True)
        while True:  # as often as the longest chain of ties is long
            lowest = np.full(int(number.max()) + 1, len(rows))
            np.minimum.at(lowest, number, group[members])
            after = group.copy()
            np.minimum.at(after, members, lowest[number])
            after = after[after]
            if np.array_equal(after, group):
                break
            group = after
    _, place, counts = np.unique(group, return_inverse=True, return_counts=True)
    rows["group"] = np.where(counts[place] > 1, group, -1)


def _split(group: np.ndarray, own: np.ndarray, validation: float, test: float) -> np.ndarray:
    """Each row's split: by its group's lowest key, so that the order of the records is nothing."""
    key = own.copy()
    tied = group >= 0
    lowest = np.full(len(own), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(lowest, group[tied], own[tied])
    key[tied] = lowest[group[tied]]
    draw = uniform(mix(key, _SALT))
    return np.where(draw < test, 2, np.where(draw < test + validation, 1, 0)).astype(np.int8)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise InputError(
            f"{shown(path)}: can't be read ({error.strerror}); check the path"
        ) from None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open_file(path) as file:
        while data := file.read(2**20):
            digest.update(data)
    return digest.hexdigest()
