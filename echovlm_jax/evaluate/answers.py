"""What a free text answers: the stated rules, and how often that is right.

All rules read the text after Unicode's NFKC (full-width letters and digits become plain ones), in
small letters, spaces joined. A text that no rule can read answers nothing, and counts as wrong.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from echovlm_jax.evaluate.bootstrap import Statistic

RULES = {
    "choice": "an option's text alone; else the letter that the answer begins with, or the one that"
    " stands alone in it; else the one option whose text occurs",
    "judgement": "a word for yes or no (true, false, correct, wrong; 是, 否, 正确, 错误 …) that the"
    " answer begins with; else such a word anywhere, where all are of one kind",
    "diagnosis": "a label alone; else the one label of the organ's that occurs; negations are not"
    " looked at",
}
YES, NO = "yes", "no"
_EDGE = " \t\n.,:;!?。，、：；！？…\"'“”‘’()（）[]【】*_`"
_OPTION = re.compile(r"^\s*([A-Z])[.．、:：)）]\s*(.*\S)\s*$", re.MULTILINE)
# What may come before an answer: "the answer is", "答案：", "选".
_LEAD = re.compile(
    r"^(?:(?:the\s+)?(?:correct\s+|right\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*"
    r"|(?:正确)?(?:答案|选项)(?:应?[是为选])?\s*:?\s*|(?:应该?)?选择?\s*:?\s*)"
)
_POSITIVE = ("yes", "true", "correct", "right", "是", "对", "正确", "符合", "属实", "一致")
_NEGATIVE = (
    *("no", "not", "false", "incorrect", "wrong", "untrue"),
    *("否", "不", "错", "错误", "有误", "并非", "没有"),
)
# Looked for anywhere; 是 and 对 are parts of too many sentences.
_ANYWHERE = {
    NO: r"\b(?:no|false|incorrect|wrong|untrue|not (?:true|correct|right))\b"
    r"|不正确|不对|不是|不符合?|不一致|不属实|错误|有误|并非",
    YES: r"\b(?:yes|true|correct|right)\b|正确|符合|属实|一致",
}


def plain(text: str) -> str:
    """A text as the rules read it."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.split()).strip(_EDGE)


def options_of(question: str) -> dict[str, str]:
    """The lettered options that a question lists, a line each: {"A": text, …}; from A on."""
    found: dict[str, str] = {}
    for letter, text in _OPTION.findall(unicodedata.normalize("NFKC", question)):
        if letter == chr(ord("A") + len(found)):
            found[letter] = text
    return found


def choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer chooses among lettered options; see RULES."""
    said = plain(text)
    named = {letter: plain(option) for letter, option in options.items()}
    if alone := [letter for letter, option in named.items() if option and option == said]:
        return alone[0] if len(alone) == 1 else None
    rest = _LEAD.sub("", said).strip(_EDGE)
    if rest[:1].upper() in options and _ends_letter(rest[1:], named[rest[0].upper()]):
        return rest[0].upper()
    # Capitals alone: a small a is a word.
    standing = re.findall(r"(?<![A-Za-z0-9])([A-Z])(?![A-Za-z0-9])", _widths(text))
    a_word = re.search(r"(?<![A-Za-z0-9])A\s+(?!or\b|and\b)[a-z]", _widths(text))
    letters = {
        letter for letter in standing if letter in options and not (letter == "A" and a_word)
    }
    if len(letters) == 1:
        return letters.pop()
    if letters:
        return None
    return _one_that_occurs(said, named)


def _ends_letter(rest: str, option: str) -> bool:
    """Whether what follows a first letter shows that it was an option's letter, not a word's."""
    if not rest or rest[0] in _EDGE.replace(" ", ""):
        return True
    if rest[0].isspace():
        return rest.strip(_EDGE).startswith(option) or not rest.strip()
    return not (rest[0].isascii() and rest[0].isalnum())


def _widths(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def judgement(text: str) -> str | None:
    """YES or NO, or None where an answer is neither; see RULES."""
    said = _LEAD.sub("", plain(text)).strip(_EDGE)
    for words, value in ((_NEGATIVE, NO), (_POSITIVE, YES)):
        for word in words:
            if said.startswith(word) and not (word.isascii() and said[len(word) :][:1].isalnum()):
                return value
    without_no = re.sub(_ANYWHERE[NO], " ", said)
    no, yes = without_no != said, bool(re.search(_ANYWHERE[YES], without_no))
    return None if no == yes else NO if no else YES


def diagnosis(text: str, labels: Iterable[str]) -> str | None:
    """The label that an answer names, as `label` writes it; see RULES."""
    named = {name: name for name in map(label, labels) if name}
    said = label(text)
    return said if said in named else _one_that_occurs(said, named)


def label(text: str) -> str:
    """A label as labels are compared: `plain`, and without spaces between Chinese characters."""
    return re.sub(r"(?<=[^\x00-\x7f]) (?=[^\x00-\x7f])", "", plain(text))


def _one_that_occurs(text: str, named: Mapping[str, str]) -> str | None:
    """The key of the one name that occurs in a text; one inside a longer one's places is none."""
    rest, found = text, []
    for key, name in sorted(named.items(), key=lambda item: -len(item[1])):
        if name and (cut := _finder(name).sub("\0", rest)) != rest:
            found.append(key)
            rest = cut
    return found[0] if len(found) == 1 else None


@functools.lru_cache(4096)
def _finder(name: str) -> re.Pattern[str]:
    """Where a name occurs; in Latin letters as a whole word."""
    start = r"(?<![a-z0-9])" if name[0].isascii() and name[0].isalnum() else ""
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
      task: of `data.tasks`.
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
