"""Numbers that decide what comes in which order: hashes, the same on every machine for ever.

numpy may change what its generators draw from a seed between versions; a data order must outlive
that, or a run that resumes after an upgrade would see some exams twice and others never.
"""

import hashlib

import numpy as np

_STEP = 0x9E3779B97F4A7C15  # splitmix64's constants (Steele, Lea and Flood 2014)
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_WORD = 2**64


def mix(*parts: int | np.integer | np.ndarray) -> np.ndarray:
    """A hash of whole numbers, elementwise over arrays, which broadcast: uint64.

    Every part counts, and so does their order. A negative number counts as its two's complement in
    64 bits.
    """
    if all(isinstance(part, int) for part in parts):
        return np.asarray(np.uint64(number(*parts)))  # type: ignore[arg-type]
    with np.errstate(over="ignore"):  # wrapping around is what a hash does
        state = np.asarray(np.uint64(len(parts)))
        for part in parts:
            state = _scramble((state ^ _word(part)) + np.uint64(_STEP))
    return np.asarray(state)


def number(*parts: int) -> int:
    """`mix` of plain numbers as a plain number, ten times as fast: samples take many of these."""
    state = len(parts)
    for part in parts:
        word = ((state ^ part % _WORD) + _STEP) % _WORD
        word = (word ^ word >> 30) * _MIX1 % _WORD
        word = (word ^ word >> 27) * _MIX2 % _WORD
        state = word ^ word >> 31
    return state


def text_key(text: str) -> int:
    """A 64-bit number for a text: the first 8 bytes of its BLAKE2b."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniform(key: int | np.integer | np.ndarray) -> np.ndarray:
    """Keys as numbers in [0, 1): float64, of their highest 53 bits."""
    if isinstance(key, int):
        return np.asarray((key % _WORD >> 11) * 2.0**-53)
    return np.asarray(_word(key) >> np.uint64(11)) * 2.0**-53


def _word(part: int | np.integer | np.ndarray) -> np.ndarray:
    if isinstance(part, int):
        return np.asarray(np.uint64(part % _WORD))
    array = np.asarray(part)
    if array.dtype.kind not in "iu":
        raise TypeError(f"a key is made of whole numbers, not {array.dtype}")
    return array.astype(np.uint64)  # of a negative number: two's complement


def _scramble(word: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: each bit of the input changes about half of the output's."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(_MIX1)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(_MIX2)
    return word ^ (word >> np.uint64(31))
