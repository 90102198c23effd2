"""A long JSON list, entry by entry: memory stays flat however long the file is.

A file holds a list, or one object that has the list under a name of WRAPPERS, or an object a line
(JSONL); its first line tells which, its name does not matter.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from echovlm_jax.errors import InputError
from echovlm_jax.processing.files import open_file, shown

MAX_ENTRY = 2**24  # characters of one entry; a long conversation takes a few thousand
_READ = 2**20
WRAPPERS = ("data", "records", "items", "samples", "examples", "exams", "dataset")
_RECORD_KEYS = {"conversations", "messages", "images"}
_SPACE = re.compile(r"[ \t\r\n]*")
DUPLICATE = "\0twice"  # a key, put into an object that has some key twice


class Entry(NamedTuple):
    offset: int  # bytes from the file's beginning
    size: int  # bytes
    value: Any


def read_entries(path: Path) -> Iterator[Entry]:
    """The entries of a file that holds JSON records.

    Bytes that are no UTF-8 come as lone surrogates: only their own entry is spoilt.

    Raises:
      InputError: the file can't be read or holds no such list; the message says where.
    """
    try:
        with open_file(path) as file:
            yield from _Text(file, path).entries()
    except OSError as error:
        raise InputError(f"{shown(path)}: can't be read ({error.strerror})") from None


def parse_entry(data: bytes) -> Any:
    """What `read_entries` made of an entry, from its bytes. Raises ValueError where it is none."""
    try:
        return _decoder.decode(data.decode("utf-8", "surrogateescape"))
    except RecursionError:
        raise ValueError("too deep") from None


class _Text:
    """The file as text that is taken off at the front and grows at the back."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._at = "", 0  # what is decoded, and how far it is taken
        self._offset, self._line = 0, 1  # of that place in the file
        self._undecoded = b""
        self._ended = False

    def entries(self) -> Iterator[Entry]:
        if self._peek() == "\ufeff":  # a byte order mark, as Windows writes it
            self._take(self._at + 1)
        first = self._peek()
        if "\0" in self._text[:4]:  # of every ASCII character a byte
            raise InputError(f"{shown(self._path)}: is UTF-16 or UTF-32; save it as UTF-8")
        if first == "[":
            yield from self._list()
        elif first == "{" and self._is_jsonl():
            while self._peek():
                yield self._entry()
        elif first == "{":
            yield from self._wrapped()
        else:
            raise self._broken("must hold a JSON list of records, or a record a line")
        if self._peek():
            raise self._broken("is not valid JSON: something follows the list")

    def _list(self) -> Iterator[Entry]:
        self._take(self._at + 1)
        if self._peek() == "]":
            self._take(self._at + 1)
            return
        while True:
            self._peek()
            yield self._entry()
            mark = self._peek()
            if mark not in (",", "]"):
                raise self._broken("is not valid JSON: ',' or ']' is missing")
            self._take(self._at + 1)
            if mark == "]":
                return

    def _is_jsonl(self) -> bool:
        """Whether what begins is a record, and no wrapper of a list."""
        while True:
            try:
                value, _ = _decoder.raw_decode(self._text, self._at)
                wrapped = any(isinstance(value.get(key), list) for key in WRAPPERS)
                return not wrapped and not any(map(_holds_records, value.values()))
            except RecursionError:
                return False
            except json.JSONDecodeError:
                wanted = 2 * (len(self._text) - self._at)
                if self._ended or wanted > 2 * MAX_ENTRY:
                    return False
            while len(self._text) - self._at < wanted and self._more():
                pass

    def _wrapped(self) -> Iterator[Entry]:
        """The entries of the lists in the one object that the file holds."""
        mark, found = ",", False
        while mark == ",":
            self._take(self._at + 1)
            self._peek()
            key = self._entry().value
            if not isinstance(key, str) or self._peek() != ":":
                raise self._broken("is not valid JSON: a key and ':' are missing")
            self._take(self._at + 1)
            if self._peek() == "[" and key in WRAPPERS:
                found = True
                yield from self._list()
            else:
                value = self._entry().value
                if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
                    raise self._broken(f"has a list under {shown(key)[:60]!r}, not under 'data'")
            mark = self._peek()
        if mark != "}":
            raise self._broken("is not valid JSON: ',' or '}' is missing")
        self._take(self._at + 1)
        if not found:
            raise self._broken("must hold a JSON list of records, or a record a line")

    def _peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._take(match.end() if match else self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _entry(self) -> Entry:
        while True:
            try:
                value, end = _decoder.raw_decode(self._text, self._at)
                # A number at the end of the block may continue in the next.
                if end < len(self._text) or self._ended:
                    offset = self._offset
                    self._take(end)
                    return Entry(offset, self._offset - offset, value)
            except RecursionError:
                raise self._broken("an entry is nested too deeply") from None
            except json.JSONDecodeError as error:
                if self._ended:
                    self._take(min(error.pos, len(self._text)))
                    raise self._broken(f"is not valid JSON: {error.msg}") from None
            wanted = 2 * (len(self._text) - self._at)
            if wanted > 2 * MAX_ENTRY:
                raise self._broken(
                    f"an entry begins that is not valid JSON, or longer than {MAX_ENTRY} characters"
                )
            while len(self._text) - self._at < wanted and self._more():
                pass

    def _more(self) -> bool:
        """Reads on; False at the end of the file."""
        data = self._file.read(_READ)
        self._ended = not data
        whole = self._undecoded + data
        # A character's bytes may be cut by the end of what was read; 3 of them at most.
        keep = 0 if self._ended else _unfinished(whole)
        self._undecoded = whole[len(whole) - keep :]
        added = whole[: len(whole) - keep].decode("utf-8", "surrogateescape")
        self._text = self._text[self._at :] + added
        self._at = 0
        return not self._ended

    def _take(self, end: int) -> None:
        taken = self._text[self._at : end]
        self._offset += len(taken if taken.isascii() else taken.encode("utf-8", "surrogateescape"))
        self._line += taken.count("\n")
        self._at = end

    def _broken(self, what: str) -> InputError:
        return InputError(f"{shown(self._path)}: line {self._line}: {what}; mend the file")


def _holds_records(value: Any) -> bool:
    """Whether a value of an object is a list of records; then the object itself is none."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and not _RECORD_KEYS.isdisjoint(first)


def _unfinished(data: bytes) -> int:
    """How many bytes at the end begin a character of UTF-8 that they don't finish."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if back < length else 0
        if byte < 0x80:
            return 0
    return 0


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        out[DUPLICATE] = True
    return out


def _whole(digits: str) -> int | float:
    # Python refuses to make an int of more than 4,300 digits, and no id is so long.
    return int(digits) if len(digits) <= 100 else float("inf")


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole)
