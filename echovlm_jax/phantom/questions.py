"""Questions on phantom exams; every answer follows from the parameters, none from the question.

What is asked about a lesion is only what differs between the lesions of its organ, and the options
are all that occur there.
"""

import functools
from collections.abc import Sequence

from echovlm_jax.data.keys import number
from echovlm_jax.data.record import ORGANS as ALL_ORGANS
from echovlm_jax.data.record import Question
from echovlm_jax.phantom.exam import DIAGNOSES, PROFILES, Exam
from echovlm_jax.phantom.words import ATTRIBUTES, ORGANS, QUESTIONS
from echovlm_jax.phantom.words import DIAGNOSES as NAMES

_ASKING = 5  # which numbers of an exam's key choose questions
TRUE_FALSE = (("True", "False"), ("正确", "错误"))
YES_NO = (("Yes", "No"), ("是", "否"))

_FIELDS = ("echo", "shape", "margin", "posterior", "calcification", "place", "orientation")


def questions(exam: Exam, language: str) -> tuple[Question, ...]:
    """Open questions, choices with options, and judgements (right as often as wrong)."""
    at = 0 if language == "en" else 1
    names = [name[at] for name in NAMES[exam.organ].values()]
    asked = [
        _choice(exam, at, "organ", ORGANS[exam.organ][at], _some_organs(exam, at)),
        _choice(exam, at, "diagnosis", NAMES[exam.organ][exam.diagnosis][at], names),
        _judgement(exam, at),
        _choice(exam, at, "lesion", YES_NO[at][0 if exam.lesion else 1], YES_NO[at]),
    ]
    if exam.size:
        unit = f"about {exam.size:g} mm" if at == 0 else f"约{exam.size:g} mm"
        asked.append(Question(_wording(exam, at, "size"), unit))
    if exam.lesion is not None:
        for field, options in _varying(exam.organ).items():
            words = ATTRIBUTES[field]
            answer = words[getattr(exam.lesion, field)][at]
            asked.append(
                _choice(exam, at, field, answer, [words[option][at] for option in options])
            )
            if field in ("echo", "margin", "place"):
                asked.append(Question(_wording(exam, at, field, 1), answer))
    return tuple(asked)


def _wording(exam: Exam, at: int, what: str, shift: int = 0) -> str:
    draw = number(exam.key, _ASKING, list(QUESTIONS).index(what), at)
    return QUESTIONS[what][(draw + shift) % 2][at]


def _choice(exam: Exam, at: int, what: str, answer: str, options: Sequence[str]) -> Question:
    """Options in an order by key, so that their order says nothing."""
    place = list(QUESTIONS).index(what)
    order = sorted(range(len(options)), key=lambda i: number(exam.key, _ASKING, 100 + place, i))
    return Question(_wording(exam, at, what), answer, tuple(options[i] for i in order))


def _some_organs(exam: Exam, at: int) -> list[str]:
    """Four organs, this one among them."""
    others = [organ for organ in ALL_ORGANS if organ != exam.organ]
    others.sort(key=lambda organ: number(exam.key, _ASKING, 200, ALL_ORGANS.index(organ)))
    return [ORGANS[organ][at] for organ in (exam.organ, *others[:3])]


def _judgement(exam: Exam, at: int) -> Question:
    """The diagnosis or, as often, another of the same organ: which of them, by key alone."""
    draw = number(exam.key, _ASKING, 300)
    true = bool(draw & 1)
    others = [d for d in DIAGNOSES[exam.organ] if d != exam.diagnosis]
    claimed = exam.diagnosis if true else others[(draw >> 1) % len(others)]
    text = _wording(exam, at, "judge").format(name=NAMES[exam.organ][claimed][at])
    return Question(text, TRUE_FALSE[at][0 if true else 1], TRUE_FALSE[at])


@functools.cache
def _varying(organ: str) -> dict[str, tuple[str, ...]]:
    """The attributes that differ between an organ's lesions, with all that each may be."""
    found: dict[str, dict[str, None]] = {field: {} for field in _FIELDS}
    for (of, _), profile in PROFILES.items():
        if of == organ and profile.echoes:
            for field, values in zip(_FIELDS, profile[1:], strict=True):
                found[field].update(dict.fromkeys(values))
            if "coarse" in profile.calcifications:
                found["posterior"]["shadow"] = None
    return {field: tuple(values) for field, values in found.items() if len(values) > 1}
