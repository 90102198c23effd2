"""What a free text answers: the stated rules, and how often that is right.

All rules read the text after Unicode's NFKC (full-width letters and digits become plain ones), in
small letters, spaces joined. A refusal, and a text that no rule can read, answers nothing: it is
undecided, is counted as that, and counts as wrong.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from echovlm_jax.evaluate.bootstrap import Statistic
from echovlm_jax.evaluate.judgement import NO, YES, judgement
from echovlm_jax.evaluate.negation import (
    AFFIRMED,
    DENIED,
    EDGE,
    clauses,
    hedges,
    refuses,
    small,
    status,
    widths,
)

__all__ = ["NO", "READING", "YES", "choice", "diagnosis", "judgement", "label", "macro_f1"]

READING = {
    "choice": "an option's text alone; else the letter that the answer begins with or names as its"
    " choice; else the one letter that it mentions; else the one option whose text occurs; what is"
    " denied, left open or asked does not count",
    "judgement": "the words for yes or no (true, false, correct, wrong; 是, 否, 正确, 错误 …), each"
    " turned round by the negations that govern it; where they contradict each other, nothing",
    "diagnosis": "a label alone; else the one label of the organ's that occurs; what is denied,"
    " left open or asked does not count",
    "undecided": "refusals, choices and diagnoses beside which something is not excluded, and"
    " answers that no rule can read; they count as wrong",
}
_OPTION = re.compile(r"^\s*([A-Z])[.．、:：)）]\s*(.*\S)\s*$", re.MULTILINE)
# What may come before an answer: "the answer is", "答案：", "选".
_LEAD = re.compile(
    r"^(?:(?:(?:my|the)\s+)?(?:correct\s+|right\s+|final\s+|best\s+)?(?:answer|option|choice)"
    r"(?:\s+is)?\s*:?\s*"
    r"|(?:正确|最终)?(?:答案|选项)(?:应?该?[是为选])?\s*:?\s*|(?:我|应该?)?选择?\s*:?\s*)"
)
# What names the letter behind it as the choice.
_NAMES = re.compile(
    r"(?:\b(?:answer|option|choice|choose|select|pick|go with|be|is)|答案|选项?|选择|应选|答)"
    r"(?:\s+(?:is|option|would be|must be|should be))?\s*(?:应?该?[是为选])?\s*:?"
    r"\s*[(\[【“\"'‘*「]*$"
)
# A letter that stands alone. Neither the article and the pronoun, nor a part of a name.
_LETTER = re.compile(
    r"(?<![A-Za-z0-9])(?<!(?i:vitamin ))(?<!(?i:hepatitis ))(?<!(?i:type ))(?<!(?i:grade ))"
    r"(?<!(?i:class ))(?<!-)([A-Z])"
    r"(?![A-Za-z0-9]|'|-[A-Za-z]|[超型级期族类组]|\s+(?:mode|lines?|scan)\b)"
)
_ARTICLE = re.compile(
    r"[AI]\s+(?!(?:is|was|isn|are|or|nor|and|because|since|as|seems|fits|matches|describes|would"
    r"|should|must|can|cannot|with|for|not|in|but|wrong|right|correct)\b)[a-z]"
)
# Letters that are spoken of together: "A, B and C", "A、B", "A B".
_LIST = re.compile(
    r"(?<![A-Za-z0-9])[A-Z](?:\s*,\s*[A-Z](?![A-Za-z0-9]))*"
    r"(?:(?:\s*[、/&]\s*|[ \t]+(?=[B-H]\b)"
    r"|\s*,?\s*(?:\b(?:and|or|nor)\b|[和或及与跟])\s*)[A-Z](?![A-Za-z0-9]))+"
)
_BOTH = re.compile(r"良[、/ ]?恶性")  # names two labels at once, and decides for none


def plain(text: str) -> str:
    """A text as the rules read it."""
    return " ".join(widths(text).casefold().split()).strip(EDGE)


def options_of(question: str) -> dict[str, str]:
    """The lettered options that a question lists, a line each: {"A": text, …}; from A on."""
    found: dict[str, str] = {}
    for letter, text in _OPTION.findall(widths(question)):
        if letter == chr(ord("A") + len(found)):
            found[letter] = text
    return found


def choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer chooses among lettered options; see READING."""
    said, text = plain(text), widths(text)
    named = {letter: plain(option) for letter, option in options.items()}
    alone = [letter for letter, option in named.items() if option and option == said]
    if alone and not _asks(text):
        return alone[0] if len(alone) == 1 else None
    rest = _LEAD.sub("", said).strip(EDGE)
    first, behind = rest[:1].upper(), rest[1:]
    if named.get(first) and behind.strip(EDGE) == named[first]:
        return first  # restated: what the option itself says is no comment on it
    if refuses(text) or _hedges(text, options.values()):
        return None
    leads = first if first in named and _ends_letter(behind, named[first]) else ""
    chosen, mentioned, others = _letters(text, named, leads)
    for found in (chosen, mentioned):
        if found:
            return found.pop() if len(found) == 1 else None
    return None if others else _one_affirmed(" ".join(_lines(text).casefold().split()), named)


def _letters(
    text: str, options: Mapping[str, str], leads: str
) -> tuple[set[str], set[str], set[str]]:
    """The letters that a text chooses, those that it affirms, and all others that it mentions.

    Args:
      leads: the letter that the answer begins with, if it does: it is chosen unless it is denied.
    """
    lowered = small(text)
    together = [found.span() for found in _LIST.finditer(text)]
    bare = {clause.text for clause in clauses(text) if not clause.asks}
    chosen, mentioned, denied, others = set(), set(), set(), set()
    places = [found.span(1) for found in _LETTER.finditer(text)]
    if leads and (at := lowered.find(leads.lower())) not in [start for start, _ in places]:
        places.insert(0, (at, at + 1))  # a small letter
    for n, (start, end) in enumerate(places):
        letter, first = text[start].upper(), n == 0 and text[start].upper() == leads
        if letter not in options or (not first and _ARTICLE.match(text, start)):
            continue
        listed = next((span for span in together if span[0] <= start < span[1]), None)
        what = status(lowered, *(listed or (start, end)))
        others.add(letter)
        if what == DENIED:
            denied.add(letter)
        elif what == AFFIRMED:
            mentioned.add(letter)
            before = re.split(r"[,;.!?\n。]", lowered[:start])[-1]
            if not listed and (first or letter.lower() in bare or _NAMES.search(before)):
                chosen.add(letter)
    return chosen - denied, mentioned - denied, others


def _asks(text: str) -> bool:
    return text.rstrip(" \t\n\"'”’)").endswith("?")


def _ends_letter(rest: str, option: str) -> bool:
    """Whether what follows a first letter shows that it was an option's letter, not a word's."""
    if not rest or rest[0] in EDGE.replace(" ", "").replace("-", ""):
        return True
    if rest[0].isspace():
        return rest.strip(EDGE).startswith(option) or not rest.strip()
    return not (rest[0].isascii() and rest[0].isalnum()) and rest[0] not in "超型级期族类组-'"


def diagnosis(text: str, labels: Iterable[str]) -> str | None:
    """The label that an answer names, as `label` writes it; see READING."""
    named = {name: name for name in map(label, labels) if name}
    said = label(text)
    if said in named and not _asks(widths(text)):
        return said
    if refuses(text) or _hedges(text, named):
        return None
    return _one_affirmed(_BOTH.sub(" ", _label(_lines(text))), named)


def _hedges(text: str, names: Iterable[str]) -> bool:
    """Whether a text leaves something not excluded. Names that do so themselves may be named."""
    return hedges(text) and not any(map(hedges, names))


def label(text: str) -> str:
    """A label as labels are compared: `plain`, and without spaces between Chinese characters."""
    return _label(text).strip(EDGE)


def _label(text: str) -> str:
    return re.sub(
        r"(?<=[^\x00-\x7f]) (?=[^\x00-\x7f])", "", " ".join(widths(text).casefold().split())
    )


def _lines(text: str) -> str:
    """A text whose line ends stay ends of sentences when spaces are joined."""
    return re.sub(r"(?<=\S)[ \t]*\n", "; ", text)


def _one_affirmed(text: str, named: Mapping[str, str]) -> str | None:
    """The key of the one name that a text affirms, and nowhere denies; a name inside a longer one's
    places is none."""
    covered = [False] * len(text)
    affirmed, denied = set(), set()
    for key, name in sorted(named.items(), key=lambda item: -len(item[1])):
        for found in _finder(name).finditer(text) if name else ():
            start, end = found.span()
            if any(covered[start:end]):
                continue
            covered[start:end] = [True] * (end - start)
            what = status(text, start, end)
            if what == AFFIRMED:
                affirmed.add(key)
            elif what == DENIED:
                denied.add(key)
    return affirmed.pop() if len(affirmed) == 1 and not affirmed & denied else None


@functools.lru_cache(4096)
def _finder(name: str) -> re.Pattern[str]:
    """Where a name occurs; in Latin letters as a whole word, without a prefix that makes another
    thing of it."""
    start = r"(?<!假性)"
    start += (
        r"(?<![a-z0-9])(?<!pre-)(?<!semi-)(?<!near-)(?<!pseudo-)"
        if name[0].isascii() and name[0].isalnum()
        else ""
    )
    end = r"(?![a-z0-9])" if name[-1].isascii() and name[-1].isalnum() else ""
    return re.compile(start + re.escape(name) + end)


def macro_f1(answers: Sequence[str], extracted: Sequence[str | None]) -> Statistic:
    """The mean F1 of the labels that occur among the answers or the extracted, each counting once.

    Nothing extracted is a miss of the answer's label and no label of its own.
    """
    names = sorted({*answers, *(name for name in extracted if name is not None)})
    at = {name: i for i, name in enumerate(names)}
    columns = np.zeros((len(answers), 3, len(names)))  # found and right, answers, found
    for row, (answer, found) in enumerate(zip(answers, extracted, strict=True)):
        columns[row, 0, at[answer]] = answer == found
        columns[row, 1, at[answer]] = 1
        if found is not None:
            columns[row, 2, at[found]] = 1

    def value(sums: np.ndarray) -> np.ndarray:
        right, wanted, found = sums.reshape(len(sums), 3, len(names)).transpose(1, 0, 2)
        both = wanted + found
        f1 = np.divide(2 * right, both, out=np.zeros_like(right), where=both > 0)
        return 100 * f1.sum(axis=1) / np.maximum((both > 0).sum(axis=1), 1)

    return Statistic(columns.reshape(len(answers), 3 * len(names)), value)


def read_answer(task: str, text: str, question: str, labels: Iterable[str]) -> str | None:
    """What a text answers in a task: a letter, YES or NO, or a label; None where nothing.

    Args:
      task: one of `data.tasks`.
      question: the prompt, which lists a choice's options.
      labels: those of a diagnosis.
    """
    rules: dict[str, Callable[[], str | None]] = {
        "choice": lambda: choice(text, options_of(question)),
        "choice_restate": lambda: choice(text, options_of(question)),
        "judge": lambda: judgement(text),
        "diagnosis": lambda: diagnosis(text, labels),
    }
    return rules[task]() if task in rules else None
