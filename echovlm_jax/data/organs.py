"""Which organ a record is of: what it says, what a mapping says, or what its file's name says."""

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echovlm_jax.errors import InputError
from echovlm_jax.processing.files import read_json, shown

UNKNOWN = "unknown"
MAX_NAME = 64

_TABLES: dict[str, Any] = json.loads(Path(__file__).with_name("organs.json").read_text("utf-8"))
# Words that mean one of the seven regions, in a record's own statement or in a file's name; and
# public collections whose names say it in an abbreviation (BUS: breast ultrasound).
_ORGAN_OF, _COLLECTIONS = (
    {word: organ for organ, words in _TABLES[name].items() for word in words}
    for name in ("words", "collections")
)
_PLAIN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # "ThyroidSet" is two words


def organ_name(text: str) -> str:
    """A stated organ by the one name that it goes by here; others stay, in lower case."""
    name = " ".join(text.casefold().split())
    return _ORGAN_OF.get(name, name)[:MAX_NAME]


def organ_of_file(stem: str) -> str:
    """The organ that a file's name tells, or "unknown".

    A word for an organ wins over a collection's name; words for two organs tell nothing.

    >>> organ_of_file("Annotated Ultrasound Liver images"), organ_of_file("BUS-BRA")
    ('liver', 'breast')
    """
    name = stem.casefold()
    words = [word.casefold() for word in _PLAIN.findall(stem)]
    # A plural is the same word; Chinese has no spaces to look for words between.
    found = {_ORGAN_OF[w] for word in words for w in (word, word.rstrip("s")) if w in _ORGAN_OF}
    found |= {organ for word, organ in _ORGAN_OF.items() if not word.isascii() and word in name}
    joined = [a + b for a, b in itertools.pairwise(words)]
    found = found or {_COLLECTIONS[w] for w in (*words, *joined) if w in _COLLECTIONS}
    return found.pop() if len(found) == 1 else UNKNOWN


def read_mapping(path: Path, stems: tuple[str, ...]) -> dict[str, str]:
    """A file {source's stem or name: organ}. Raises InputError where it names no such source."""
    mapping: Mapping[str, object] = read_json(path)
    out = {}
    for name, organ in mapping.items():
        stem = name if name in stems else Path(name).stem
        if stem not in stems:
            raise InputError(
                f"{shown(path)}: {shown(name)!r} is none of the sources {', '.join(stems)}"
            )
        if not isinstance(organ, str) or not organ.strip():
            raise InputError(f"{shown(path)}: the organ of {shown(name)!r} must be a text")
        out[stem] = organ_name(organ)
    return out
