"""Which records belong together: whatever two records share ties them, and ties are followed on.

A group is never in two splits. A key is 64 bits of a hash: of ten million keys two are alike by
chance once in 370,000 builds, and then two groups become one. While a million records with three
DICOM pictures each are grouped, 0.9 GB of memory are used.
"""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from echovlm_jax.data.keys import mix, uniform

# What ties records, and the name space of its values: a patient is one, however a record names it.
KINDS = {
    "patient_id": "patient",
    "pattern": "patient",
    "dicom_patient": "patient",
    "study_id": "study",
    "dicom_study": "study",
    "exam_id": "exam",
    "entry": "entry",
    "file": "file",
    "pixels": "pixels",
}
NUMBERS = {kind: n for n, kind in enumerate(KINDS)}
_PATIENT = [n for kind, n in NUMBERS.items() if KINDS[kind] == "patient"]
_SHARED = [NUMBERS["entry"], NUMBERS["file"], NUMBERS["pixels"]]  # these name nobody
TIE = np.dtype([("row", "<u4"), ("kind", "u1"), ("key", "<u8")])
SPLITS = ("train", "validation", "test")
_SALT = 0x5EED  # so that a split does not lean on other uses of the same hashes
HASH_BYTES = 32
# Of the 256 bits of two perceptual hashes, this many may differ between near-duplicates. Of 130
# phantom pictures, saved as JPEG at quality 60, at half their size or brighter, at most 9 did;
# pictures of different exams differed in 18 or more.
NEAR = 12
_BLOCK = 2**20  # pairs compared at a time: 100 MB at worst


class Grouping(NamedTuple):
    group: np.ndarray  # int64 [N]: the same for all that belong together; −1: alone
    split: np.ndarray  # int8 [N]: index into SPLITS
    counts: dict[str, Any]


def key_of(kind: str, value: str, salt: bytes) -> int:
    """The key of a tie; never 0. `salt` is drawn anew for each build and kept in memory only, so
    that keys of patients' ids tell nobody anything."""
    text = f"{KINDS[kind]}\0{value}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8, key=salt).digest()
    return int.from_bytes(digest, "little") or 1


def group(own: np.ndarray, ties: np.ndarray, *, validation: float, test: float) -> Grouping:
    """Groups records and deals the groups out to splits.

    A group's split follows from the lowest of its records' own keys alone: neither the order of the
    records nor what else there is changes it.

    Args:
      own: uint64 [N], each record's own key.
      ties: TIE [M], in any order.
      validation, test: about this share of the groups goes to each.

    Returns:
      the grouping; counts: groups {kind: how many patients, studies … it names, and of `entry`,
      `file` and `pixels` how many more than one record has}; ungrouped, records that no kind but
      those three names; unnamed, records of which no patient is named; largest_group, its records.
    """
    found = _join(len(own), ties)
    _, place, sizes = np.unique(found, return_inverse=True, return_counts=True)
    together = np.where(sizes[place] > 1, found, -1)
    named = ties[~np.isin(ties["kind"], _SHARED)]
    of_patients = ties[np.isin(ties["kind"], _PATIENT)]
    counts = {
        "groups": _counts(ties),
        "ungrouped": len(own) - len(np.unique(named["row"])),
        "unnamed": len(own) - len(np.unique(of_patients["row"])),
        "largest_group": int(sizes.max(initial=0)),
    }
    return Grouping(together, _split(together, own, validation, test), counts)


def _join(count: int, ties: np.ndarray) -> np.ndarray:
    """For each of `count` rows the lowest row that a chain of ties leads to."""
    joined = np.arange(count)
    if not len(ties):
        return joined
    rows = ties["row"].astype(np.int64)
    _, number = np.unique(ties["key"], return_inverse=True)
    lowest = np.empty(int(number.max()) + 1, np.int64)
    while True:
        lowest.fill(count)
        np.minimum.at(lowest, number, joined[rows])
        after = joined.copy()
        np.minimum.at(after, rows, lowest[number])
        np.minimum.at(after, joined, after.copy())  # a whole group follows one of its rows
        after = after[after]
        if np.array_equal(after, joined):
            return joined
        joined = after


def _counts(ties: np.ndarray) -> dict[str, int]:
    out = {}
    for kind, number in NUMBERS.items():
        some = ties[ties["kind"] == number]
        order = np.lexsort((some["row"], some["key"]))
        keys, rows = some["key"][order], some["row"][order]
        first = np.ones(len(some), bool)  # of a record that has a key several times
        first[1:] = (keys[1:] != keys[:-1]) | (rows[1:] != rows[:-1])
        _, records = np.unique(keys[first], return_counts=True)
        found = int((records > 1).sum()) if number in _SHARED else len(records)
        if found:
            out[kind] = found
    return out


def _split(group: np.ndarray, own: np.ndarray, validation: float, test: float) -> np.ndarray:
    key = own.copy()
    tied = group >= 0
    lowest = np.full(len(own), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(lowest, group[tied], own[tied])
    key[tied] = lowest[group[tied]]
    draw = uniform(mix(key, _SALT))
    return np.where(draw < test, 2, np.where(draw < test + validation, 1, 0)).astype(np.int8)


def near_duplicates(split: np.ndarray, row: np.ndarray, hashes: np.ndarray) -> int:
    """How many records of validation and test have a picture nearly like one of an earlier split.

    Every hash is compared with every other across splits: a million pictures with a tenth of them
    held out take minutes, in bounded memory.

    Args:
      split: int8 [N], of each record.
      row: int64 [P], of each picture its record.
      hashes: uint8 [P, HASH_BYTES], perceptual hashes; all zeros: none.
    """
    some = hashes.any(axis=1)
    row, words = row[some], np.ascontiguousarray(hashes[some]).view(np.uint64)
    of = split[row]
    seen: list[np.ndarray] = []
    for later in (1, 2):
        unlike = np.unique(words[of < later], axis=0)  # each once: sequences repeat themselves
        held_out = np.flatnonzero(of == later)
        step = max(1, _BLOCK // max(1, len(unlike)))
        for start in range(0, len(held_out) if len(unlike) else 0, step):
            some = held_out[start : start + step]
            seen.append(row[some[_has_near(words[some], unlike)]])
    return len(np.unique(np.concatenate(seen))) if seen else 0


def _has_near(words: np.ndarray, others: np.ndarray) -> np.ndarray:
    """bool [n]: whether one of `others` differs in at most NEAR bits."""
    near = np.zeros(len(words), bool)
    first = np.bitwise_count(words[:, None, 0] ^ others[None, :, 0])
    mine, theirs = np.nonzero(first <= NEAR)  # few are left: the rest is looked at for these alone
    apart = np.bitwise_count(words[mine] ^ others[theirs]).sum(1, dtype=np.int64)
    near[mine[apart <= NEAR]] = True
    return near
