"""What a report states: its facts, read by the rules of one table, in Chinese and English.

A text is cut into clauses. A clause names subjects (a lesion, the tissue around it, ducts …) and
values of attributes (hypoechoic, irregular, dilated …); both stand in `facts.json`, and here is how
they are put together. What is denied or left open is decided by `negation.status`. What no rule
reads is counted, never guessed.

The terms follow the public lexicons of BI-RADS and TI-RADS, and the wording of Chinese reports.
Several lesions of a report are read as one: their statements are a set.
"""

import functools
import hashlib
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from echovlm_jax.evaluate.negation import AFFIRMED, DENIED, EDGE, OPEN, small, status, widths

_SOURCE = Path(__file__).with_name("facts.json").read_bytes()
_TABLE: dict[str, Any] = json.loads(_SOURCE)
_ATTRIBUTES: dict[str, dict[str, Any]] = _TABLE["attributes"]
ATTRIBUTES = ("organ", "lesion", "size", "category", *_ATTRIBUTES)
# Part of every signature: to be raised by whoever changes how terms are put together.
VERSION = 1
RULES = f"{VERSION}-{hashlib.sha256(_SOURCE).hexdigest()[:12]}"
_LOCAL = {name for name, of in _TABLE["subjects"].items() if of.get("local")}
_SIZED = {*_TABLE["subjects"]} - _LOCAL

_LONGEST = 400  # characters that are read as one sentence: time stays linear in the text's length
_SENTENCE = re.compile(r"[;!。\n]+|\.(?!\d)|(?<=\?)")
_TIMES = re.compile(r"(?<=[\d米mM])\s?\*\s?(?=\d)")  # no mark of Markdown
_CLAUSE = re.compile(r"[,:()\[\]]+")
_REPEATS = re.compile(r"[,;:!?。\n()\[\]]+|\.(?!\d)|\band\b")
_SHORT = {"zh": 3, "en": 8}  # characters up to which a clause may be said twice
_JOINED = re.compile(r"\s*(?:及|和|与|、|/|and(?: the)?)\s*")
_NUMBER = r"\d{1,4}(?:\.\d{1,3})?"
_UNIT = r"(mm|cm|毫米|厘米|millimet(?:er|re)s?|centimet(?:er|re)s?)"
_SIZE = re.compile(
    rf"(?<![\d.])({_NUMBER})\s?{_UNIT}?(?:\s?(?:x|×|by)\s?({_NUMBER})\s?{_UNIT}?)?"
    rf"(?:\s?(?:x|×|by)\s?({_NUMBER})\s?{_UNIT}?)?(?<=[米mrs])(?![a-z0-9/²³^])"
)
_CATEGORY = re.compile(r"(?<![a-z])(?:acr |[a-z]-)?(bi|ti)-?rads\D{0,6}?([0-6])([abc]?)(?![\da-z])")


class Fact(NamedTuple):
    """One statement: of what, which of ATTRIBUTES, and what it is, or that it is not there.

    A size is in mm, the longest dimension first; other values are those of `facts.json`.
    """

    subject: str
    attribute: str
    value: str | tuple[float, ...]
    present: bool = True


class Reading(NamedTuple):
    """What was read of a text, and what was not."""

    facts: frozenset[Fact]
    contradictions: int  # attributes of a subject that are stated in two ways
    repeated: int  # clauses that were there before
    clauses: int  # without those that only give advice
    unread: int  # of these, clauses in which no rule reads anything


class _Term(NamedTuple):
    """What a term of the table stands for."""

    attribute: str  # or "subject", "organ", "name"
    value: str
    named: bool = False  # counts only beside the attribute's name


class _Found(NamedTuple):
    start: int
    end: int
    terms: tuple[_Term, ...]


class _Finder(NamedTuple):
    """One kind of terms of a language: where they are, and what they stand for."""

    pattern: re.Pattern[str]
    terms: tuple[tuple[_Term, ...], ...]

    def find(self, text: str) -> list[_Found]:
        return [
            _Found(*found.span(), self.terms[(found.lastindex or 1) - 1])
            for found in self.pattern.finditer(text)
        ]


def _finder(pairs: Iterable[tuple[str, _Term]], language: str) -> _Finder:
    terms: dict[str, list[_Term]] = defaultdict(list)
    for text, term in pairs:
        terms[text.lstrip("~")].append(term._replace(named=text.startswith("~")))
    # By the first character, which says at most places that none is there; then the longest first.
    ordered = sorted(terms, key=lambda text: (text[0], -len(text), text))
    groups = [
        re.escape(first) + "(?:" + "|".join(f"({_gaps(text[1:])})" for text in texts) + ")"
        for first, texts in itertools.groupby(ordered, key=lambda text: text[0])
    ]
    pattern = f"(?:{'|'.join(groups)})"
    if language == "en":
        pattern = f"(?<![a-z]){pattern}(?:e?s)?(?![a-z])"
    return _Finder(re.compile(pattern), tuple(tuple(terms[text]) for text in ordered))


def _gaps(text: str) -> str:
    return re.escape(text).replace("…", "[^,]{0,8}?")


@functools.cache
def _rules(language: str) -> dict[str, _Finder]:
    """The table's finders: subjects, organs, values with the attributes' names, and the rest."""

    def listed(part: dict[str, Any], kind: str) -> Iterator[tuple[str, _Term]]:
        for name, words in part.items():
            for text in words[language]:
                yield text, _Term(kind, name)

    values = [
        pair
        for attribute, of in _ATTRIBUTES.items()
        for pair in (
            *listed(of["values"], attribute),
            *listed({attribute: of["names"]} if "names" in of else {}, "name"),
        )
    ]
    subjects = [*listed(_TABLE["subjects"], "subject"), *listed({"": _TABLE["ignored"]}, "subject")]
    values += listed({"": _TABLE["ignored"]}, "")
    out = {"subjects": subjects, "values": values}
    out["organs"] = list(listed(_TABLE["organs"], "organ"))
    for kind in ("partial", "several", "aside"):
        out[kind] = list(listed({kind: _TABLE[kind]}, kind))
    return {kind: _finder(pairs, language) for kind, pairs in out.items()}


class _Sentence:
    """A sentence whose recognised words are hidden, so that 不 in 不规则 denies nothing."""

    def __init__(self, text: str, values: list[_Found]) -> None:
        self._text, self._hidden = text, text
        for start, end, terms in values:
            if terms[0].attribute != "name":
                self._hidden = self._hidden[:start] + "〇" * (end - start) + self._hidden[end:]

    def status(self, start: int, end: int) -> str:
        hidden = self._hidden
        return status(hidden[:start] + self._text[start:end] + hidden[end:], start, end)


class _Subject(NamedTuple):
    """Where a clause names what it is of."""

    start: int
    end: int
    name: str
    joined: bool = False  # to the next one: "vessels and diaphragm"


class _Reader:
    """Reads a text clause by clause, and remembers what the last one was of."""

    def __init__(self, language: str) -> None:
        self.rules = _rules(language)
        self.facts: set[Fact] = set()
        self.firm: set[Fact] = set()  # those that are not of a part alone
        self.carried = ""
        self.near = ""  # what the last clause was of, where that is local
        self.lesion = False

    def sentence(self, text: str) -> Iterator[bool | None]:
        """Reads a sentence; of each clause, whether anything was read, None for advice."""
        values = self.rules["values"].find(text)
        sentence = _Sentence(text, values)
        at = 0
        for mark in [*_CLAUSE.finditer(text), None]:
            end = mark.start() if mark else len(text)
            clause = text[at:end]
            if clause.strip(EDGE):
                read = self._clause(
                    sentence, clause, at, [f for f in values if at <= f.start < end]
                )
                aside = not read and self.rules["aside"].pattern.search(clause)
                yield None if aside else read
            at = mark.end() if mark else end

    def _clause(self, sentence: _Sentence, clause: str, at: int, values: list[_Found]) -> bool:
        subjects, lesions, read = self._subjects(sentence, clause, at)
        facts: list[Fact] = []
        local = [s for s in subjects if s.name in _LOCAL]
        others = [s for s in subjects if s.name not in _LOCAL]
        self.near = local[-1].name if local else self.near if not others else ""
        for place, what in lesions:
            # "No abnormal echo" is said of a lesion, and of the tissue around one.
            inside = [f for f in values if _is_structure(f) and _meet(f, place)]
            of_near = any(s.start < place.start for s in local) or (self.near and inside)
            if what != OPEN and not of_near:
                facts.append(Fact("lesion", "lesion", "any", what == AFFIRMED))
                values = [found for found in values if found not in inside]
        for found in values:
            for term in _bound(found, values, subjects):
                what = sentence.status(found.start, found.end)
                read |= what != OPEN
                for subject in self._resolve(term, found.start, subjects):
                    if fact := _fact(subject, term, what):
                        facts.append(fact)
        facts += self._measured(clause, at, subjects)
        self.facts.update(facts)
        if not self.rules["partial"].pattern.search(clause):
            self.firm.update(facts)
        if others:
            names = [s.name for s in others if s.name != "organ"] or ["organ"]
            self.carried = "lesion" if "lesion" in names else names[-1]
            self.lesion |= "lesion" in names
        return bool(read or facts)

    def _subjects(
        self, sentence: _Sentence, clause: str, at: int
    ) -> tuple[list[_Subject], list[tuple[_Subject, str]], bool]:
        """What the clause names: subjects, without lesions that it denies; all lesions with their
        status; and whether it names an organ or a lesion, which is read already."""
        out: list[_Subject] = []
        lesions: list[tuple[_Subject, str]] = []
        named = self.rules["subjects"].find(clause)
        for found in named:
            for term in found.terms:
                place = _Subject(at + found.start, at + found.end, term.value)
                if term.value == "lesion":
                    lesions.append((place, sentence.status(place.start, place.end)))
                if term.value and (term.value != "lesion" or lesions[-1][1] == AFFIRMED):
                    out.append(place)
        organs = self.rules["organs"].find(clause)
        read = any(what != OPEN for _, what in lesions)
        for found in organs:
            over = [f for f in named if _meet(f, found)]
            if any(f.terms[0].value in ("", "neighbours") for f in over):
                continue
            self.facts.update(Fact("report", "organ", term.value) for term in found.terms)
            read = True
            if not over:
                out.append(_Subject(at + found.start, at + found.end, "organ"))
        out.sort()
        for n, (one, other) in enumerate(itertools.pairwise(out)):
            between = clause[one.end - at : other.start - at]
            joined = bool(_JOINED.fullmatch(between)) or clause[: one.end - at].endswith("及")
            out[n] = one._replace(joined=joined)
        return out, lesions, read

    def _resolve(self, term: _Term, start: int, subjects: list[_Subject]) -> list[str]:
        """The subjects that a value at `start` is of; none where the clause is of something that
        its attribute is not read for."""
        rule = _ATTRIBUTES.get(term.attribute) or {"of": _SIZED, "values": {}}
        own = rule["values"].get(term.value, {}).get("of")
        of = own or rule["of"]
        if own or rule.get("always"):
            return [of[0]]
        before = [s for s in subjects if s.start <= start]
        if near := [s.name for s in before if s.name in _LOCAL]:
            return near[-1:] if near[-1] in of else []
        plain = [s for s in subjects if s.name not in _LOCAL]
        if not plain:
            # What is normal is around where the clause before was; all else goes on with it.
            around = self.near if term.attribute == "structure" else ""
            options = [around, self.carried, "lesion" if self.lesion else "", "organ"]
            return [name for name in options if name in of][:1]
        lesion = [s for s in plain if s.name == "lesion"]
        earlier = [s for s in reversed(plain) if s.start <= start]
        order = [*lesion, *(s for s in earlier if s.name != "organ"), *earlier, *plain]
        for subject in order:
            if subject.name in of:
                return [s.name for s in _together(subject, plain) if s.name in of]
        return []

    def _measured(self, clause: str, at: int, subjects: list[_Subject]) -> Iterator[Fact]:
        for found in _SIZE.finditer(clause):
            for subject in self._resolve(_Term("size", ""), at + found.start(), subjects):
                yield Fact(subject, "size", _millimetres(found))
        for found in _CATEGORY.finditer(clause):
            system, number, letter = found.groups()
            yield Fact("lesion", "category", f"{system.upper()}-RADS {number}{letter}")


def _together(subject: _Subject, subjects: list[_Subject]) -> list[_Subject]:
    """A subject and those before it that are named in one breath: "vessels and diaphragm"."""
    out = [subject]
    for other in reversed(subjects[: subjects.index(subject)]):
        if not other.joined:
            break
        out.append(other)
    return out


def _bound(found: _Found, values: list[_Found], subjects: list[_Subject]) -> list[_Term]:
    """What a value's term stands for beside the names of attributes in its clause: that of the
    nearest name, or else those that need none."""
    terms = [term for term in found.terms if term.attribute not in ("name", "")]
    attributes = {term.attribute for term in terms}
    near = [
        (name.start, name.end, term.value)
        for name in values
        for term in name.terms
        if term.attribute == "name" and term.value in attributes
    ]
    if any(term.named and term.attribute == "structure" for term in terms):
        of = {*_ATTRIBUTES["structure"]["of"], "neighbours"}
        near += [(s.start, s.end, "structure") for s in subjects if s.name in of]
    best: tuple[int, str] | None = None
    for start, end, attribute in near:
        if start <= found.start:
            gap = 2 * max(found.start - end, 0)
        elif any(found.end <= f.start < start and not _names(f) for f in values):
            continue  # "irregular with clear margins": another value stands between
        else:
            gap = 2 * (start - found.end) + 1
        if best is None or gap < best[0]:
            best = gap, attribute
    if best is not None:
        return [term for term in terms if term.attribute == best[1]]
    return [term for term in terms if not term.named]


def _names(found: _Found) -> bool:
    return found.terms[0].attribute == "name"


def _is_structure(found: _Found) -> bool:
    return any(term.attribute == "structure" for term in found.terms)


def _meet(one: _Found | _Subject, other: _Found | _Subject) -> bool:
    return one.start < other.end and other.start < one.end


def _fact(subject: str, term: _Term, what: str) -> Fact | None:
    """A value's statement, affirmed or denied."""
    rule = _ATTRIBUTES[term.attribute]
    if what == AFFIRMED:
        return Fact(subject, term.attribute, term.value)
    if what != DENIED:
        return None
    if opposite := rule.get("opposite", {}).get(term.value):
        return Fact(subject, term.attribute, opposite)
    return Fact(subject, term.attribute, term.value, False) if rule.get("denied") else None


def _millimetres(found: re.Match[str]) -> tuple[float, ...]:
    """A size in mm, longest first; a number without a unit has that of the next one."""
    numbers, units = found.groups()[::2], list(found.groups()[1::2])
    out, unit = [], ""
    for number, own in reversed(list(zip(numbers, units, strict=True))):
        unit = own or unit
        if number is not None:
            out.append(float(number) * (10 if unit.startswith(("c", "厘")) else 1))
    return tuple(sorted((round(value, 3) for value in out), reverse=True))


@functools.lru_cache(2**14)
def read_facts(text: str, language: str) -> Reading:
    """What a text states.

    Args:
      text: any text; of a report findings and impression together.
      language: "zh" or "en".

    Returns:
      the facts, and counts of contradictions, repeated and unread clauses.
    """
    text = small(widths(_TIMES.sub("x", text))).lower()
    reader = _Reader(language)
    said = [
        read
        for piece in _SENTENCE.split(text)
        for at in range(0, len(piece), _LONGEST)
        for read in reader.sentence(piece[at : at + _LONGEST])
        if read is not None
    ]
    several = bool(reader.rules["several"].pattern.search(text))
    repeated = 0
    for section in text.split("\n"):  # an impression may repeat a finding
        clauses = Counter(" ".join(piece.split()) for piece in _REPEATS.split(section))
        repeated += sum(n - 1 for piece, n in clauses.items() if len(piece) > _SHORT[language])
    return Reading(
        frozenset(reader.facts),
        _contradictions(reader.firm, several),
        repeated,
        len(said),
        said.count(False),
    )


def _contradictions(facts: Iterable[Fact], several: bool) -> int:
    """Attributes of a subject that are stated in two ways. Of several lesions each may be other."""
    stated: dict[tuple[str, str], set[tuple[Any, bool]]] = defaultdict(set)
    for subject, attribute, value, present in facts:
        stated[subject, attribute].add((value, present))
    count = 0
    for (subject, attribute), values in stated.items():
        there = {value for value, present in values if present}
        absent = {value for value, present in values if not present}
        clash = bool(there & absent) or ("any" in absent and bool(there))
        if not (several and subject == "lesion"):
            groups = _ATTRIBUTES.get(attribute, {}).get("exclusive", ())
            clash |= any(len(there.intersection(group)) > 1 for group in groups)
        count += clash
    return count
