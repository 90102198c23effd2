"""One exam to one conversation: which task, in which language and words, is a function of a key.

The same (record, key) always gives the same conversation: a plan made from lengths and the
worker that builds the sample agree without passing texts along.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from echovlm_jax.data import keys
from echovlm_jax.data.record import Question, Record, Report, Turn, language_of
from echovlm_jax.data.sections import join_report
from echovlm_jax.data.wordings import YES_NO, system_prompt, wording
from echovlm_jax.errors import InputError

# Shares of the tasks by stage. Alignment learns what images look like in words: long texts only.
# After it everything, with the report, which is what the model is for, most often.
_ALIGNMENT = {"conversation": 1.0, "report": 3.0, "findings": 2.0, "caption": 3.0}
_ALL = {
    "conversation": 1.0,
    "report": 4.0,
    "findings": 1.0,
    "impression": 1.5,
    "caption": 1.0,
    "diagnosis": 1.5,
    "question": 2.0,
    "choice": 1.0,
    "choice_restate": 1.0,
    "judge": 1.0,
}
TASKS = tuple(_ALL)
_STAGES: dict[str, Mapping[str, float]] = {
    "alignment": _ALIGNMENT,
    "alignment_with_vision": _ALIGNMENT,
    "instruction": _ALL,
    "full": _ALL,
}

_OPTIONS = 4  # of a choice that we make, where as many different ones are found
_TRIES = 16  # other exams looked at for them
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_DESCRIPTIONS, _CONCLUSIONS = ("findings", "caption"), ("impression", "diagnosis")

Other = Callable[[int], Record | None]


class Composed(NamedTuple):
    """A conversation made from a record, and how."""

    task: str  # one of TASKS
    language: str
    turns: tuple[Turn, ...]  # system?, then user and assistant by turns


class Unmade(InputError):
    """The drawn task can't be made of this exam with this key. `task` names it."""

    def __init__(self, record: Record, task: str) -> None:
        super().__init__(f"record {record.id!r}: no other exam has a text for {task} that differs")
        self.task = task


class _Draw(NamedTuple):
    """The input of a maker of conversations: the exam, its report in one language, the key."""

    record: Record
    report: Report
    key: int
    other: Other


def mix_for(stage: str, task_weights: Mapping[str, float] | None = None) -> dict[str, float]:
    """The weight of each task in a stage; `task_weights` replaces those that it names.

    Raises:
      InputError: an unknown stage or task, a weight that is no number of at least 0, or all 0.
    """
    if stage not in _STAGES:
        raise InputError(f"stage {stage!r} is unknown; choose one of {', '.join(_STAGES)}")
    out = {task: _STAGES[stage].get(task, 0.0) for task in TASKS}
    for task, weight in (task_weights or {}).items():
        if task not in TASKS:
            raise InputError(f"task_weights.{task}: no such task; choose of {', '.join(TASKS)}")
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 <= weight < math.inf:
            raise InputError(f"task_weights.{task} must be a number of at least 0, not {weight!r}")
        out[task] = float(weight)
    if not any(out.values()):
        raise InputError("task_weights: all tasks have weight 0; give one more")
    return out


def compose(
    record: Record,
    key: int,
    weights: Mapping[str, float],
    other: Other,
    *,
    redraw: bool = True,
) -> Composed:
    """The conversation that the model learns from one exam, by key.

    The task is drawn by weight among those that the exam has texts for; where it has texts only
    for tasks of weight 0, among these evenly. The language is drawn evenly among the reports that
    the task can be made from.

    Args:
      key: any whole number; another key gives another task, wording and order of options.
      weights: those of `mix_for`.
      other: the n-th (modulo their number) record of the same organ that is not this one, or
        None; where wrong options and statements come from. n is below 2**31.
      redraw: whether another task takes the place of a choice or judgement for which none of the
        other exams looked at has a text that differs. Of an organ's only exam it always does: such
        an exam has no texts for these.

    Raises:
      InputError: the exam has no text to teach from.
      Unmade: the drawn task can't be made, and may not be drawn again.
    """
    key = int(key)
    left = [task for task in TASKS if any(_possible(record, task))]
    while left:
        task = _draw_task(left, weights, keys.number(key, 11))
        reports = list(_possible(record, task))
        at = keys.number(key, 12) % len(reports)
        for report in reports[at:] + reports[:at]:
            if composed := _make(task, _Draw(record, report, keys.number(key, 13), other)):
                return composed
        # A choice or judgement for which no other exam has a text that differs.
        if not redraw and other(0) is not None:
            raise Unmade(record, task)
        left.remove(task)
    raise InputError(f"record {record.id!r} has no text to learn from; give it a report or answers")


def _draw_task(tasks: Sequence[str], weights: Mapping[str, float], key: int) -> str:
    shares = [float(weights.get(task, 0.0)) for task in tasks]
    if not any(shares):
        shares = [1.0] * len(tasks)
    at = key / 2**64 * math.fsum(shares)
    for task, share in zip(tasks, shares, strict=True):
        at -= share
        if at < 0:
            return task
    return next(t for t, s in zip(tasks[::-1], shares[::-1], strict=True) if s)  # by rounding


def _possible(record: Record, task: str) -> Iterator[Report]:
    """The reports that a task can be made from; of a conversation, one empty stand-in."""
    if task == "conversation":
        if any(turn.role == "assistant" and turn.text.strip() for turn in record.turns):
            yield Report(_language(record.turns))
        return
    for report in record.reports:
        if task == "report":
            found = _text(report, "findings") and _text(report, "impression")
        elif task == "question":
            found = _questions(report)
        elif task in ("choice", "choice_restate"):
            found = _fields(report) or _questions(report, options=True)
        elif task == "judge":
            found = _fields(report)
        else:
            found = _text(report, task)
        if found:
            yield report


def _make(task: str, draw: _Draw) -> Composed | None:
    record, report, key = draw.record, draw.report, draw.key
    if task == "conversation":
        return Composed(task, report.language, record.turns)
    if task == "question":
        pair = _ask_question(draw)
    elif task in ("choice", "choice_restate"):
        pair = _ask_choice(draw, restate=task == "choice_restate")
    elif task == "judge":
        pair = _ask_judgement(draw)
    else:
        answer = (
            join_report(report.findings, report.impression, report.language)
            if task == "report"
            else _text(report, task)
        )
        pair = wording(task, report.language, record.media, key), answer
    if pair is None:
        return None
    system = system_prompt(report.language, key)
    turns = () if system is None else (Turn("system", system),)
    turns += (Turn("user", pair[0]), Turn("assistant", pair[1]))
    return Composed(task, report.language, turns)


def _ask_question(draw: _Draw) -> tuple[str, str]:
    """A question that came with the exam. Its options, if any, are listed in an order by key."""
    questions = _questions(draw.report)
    chosen = questions[keys.number(draw.key, 21) % len(questions)]
    text, answer = chosen.question.strip(), _one_line(chosen.answer)
    language, media = draw.report.language, draw.record.media
    if not chosen.options:
        text = wording("question", language, media, draw.key, question=text)
        return text, chosen.answer.strip()
    listed, _ = _list_options(answer, _wrong_options(chosen), draw.key)
    text = wording("own_options_words", language, media, draw.key, question=text)
    return f"{text}\n{listed}", answer


def _ask_choice(draw: _Draw, *, restate: bool) -> tuple[str, str] | None:
    """One of several statements about exams of this organ is about this one; or an own question."""
    language, media, ending = draw.report.language, draw.record.media, "_restate" * restate
    own, fields = _questions(draw.report, options=True), _fields(draw.report)
    made = None
    if fields and not (own and keys.number(draw.key, 22) % 2):
        made = _statements(draw, _OPTIONS - 1)
    if made is not None:
        field, right, wrong = made
        text = wording(f"choice{ending}", language, media, draw.key, kind=_kind(field))
    elif own:
        chosen = own[keys.number(draw.key, 21) % len(own)]
        right, wrong = _one_line(chosen.answer), _wrong_options(chosen)
        text = chosen.question.strip()
        text = wording(f"own_options{ending}", language, media, draw.key, question=text)
    else:
        return None
    listed, letter = _list_options(right, wrong, draw.key)
    return f"{text}\n{listed}", f"{letter}. {right}" if restate else letter


def _ask_judgement(draw: _Draw) -> tuple[str, str] | None:
    """Half of the time this exam's own statement, half another's of the same organ.

    Where no other exam's differs there is no judgement, not even a true one: the halves would no
    longer be halves.
    """
    made = _statements(draw, 1)
    if made is None:
        return None
    field, right, wrong = made
    true = bool(keys.number(draw.key, 23) & 1)
    language = draw.report.language
    text = wording("judge", language, draw.record.media, draw.key, kind=_kind(field))
    return f"{text}\n{right if true else wrong[0]}", YES_NO[language][0 if true else 1]


def _statements(draw: _Draw, most: int) -> tuple[str, str, list[str]] | None:
    """A field of the report, its text, and up to `most` texts that other exams have there.

    The others are exams of the same organ in the same language, of another patient where that is
    known, and with another conclusion: of two normal exams, each one's description is true of the
    other. All texts differ, in more than spaces and punctuation. None where no other is found.
    """
    report, fields = draw.report, _fields(draw.report)
    field = fields[keys.number(draw.key, 24) % len(fields)]
    right = _one_line(_text(report, field))
    seen, wrong = {_bare(right)}, []
    conclusion = _conclusion(report)
    for i in range(_TRIES):
        found = draw.other(keys.number(draw.key, 25, i) % 2**31)
        if found is None:
            break
        if found.group and found.group == draw.record.group:
            continue
        for theirs in found.reports:
            text = _one_line(_text(theirs, field))
            if theirs.language != report.language or not text or _bare(text) in seen:
                continue
            if any(conclusion) and conclusion == _conclusion(theirs):
                continue
            seen.add(_bare(text))
            wrong.append(text)
            break
        if len(wrong) == most:
            break
    return (field, right, wrong) if wrong else None


def _list_options(right: str, wrong: Sequence[str], key: int) -> tuple[str, str]:
    """The lettered list, and the letter of the right one, which is uniform by key."""
    wrong = [w for _, w in sorted((keys.number(key, 26, i), w) for i, w in enumerate(wrong))]
    at = keys.number(key, 27) % (len(wrong) + 1)
    options = [*wrong[:at], right, *wrong[at:]]
    lines = [f"{letter}. {text}" for letter, text in zip(_LETTERS, options, strict=False)]
    return "\n".join(lines), _LETTERS[at]


def _questions(report: Report, *, options: bool = False) -> list[Question]:
    """Those with a question and an answer; with `options`, those that offer a choice as well."""
    return [
        q
        for q in report.questions
        if q.question.strip() and q.answer.strip() and (not options or _wrong_options(q))
    ]


def _wrong_options(question: Question) -> list[str]:
    """The options but the right one, each once; at most as many as there are letters for."""
    found = dict.fromkeys(_one_line(option) for option in question.options if option.strip())
    found.pop(_one_line(question.answer), None)
    return list(found)[: len(_LETTERS) - 1]


def _fields(report: Report) -> list[str]:
    """The fields that statements can be taken from."""
    return [field for field in (*_DESCRIPTIONS, *_CONCLUSIONS) if _text(report, field)]


def _conclusion(report: Report) -> tuple[str, ...]:
    return tuple(_bare(_text(report, field)) for field in _CONCLUSIONS)


def _kind(field: str) -> str:
    return "description" if field in _DESCRIPTIONS else "conclusion"


def _text(report: Report, field: str) -> str:
    return str(getattr(report, field)).strip()


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _bare(text: str) -> str:
    """What must differ for two texts to differ: letters and digits, in small letters."""
    return re.sub(r"[\W_]+", "", text.casefold())


def _language(turns: Sequence[Turn]) -> str:
    """'zh' where an answer has a Chinese character."""
    return language_of("".join(turn.text for turn in turns if turn.role == "assistant"))
