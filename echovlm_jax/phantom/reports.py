"""Reports of phantom exams: each sentence follows from the parameters, two wordings each."""

from collections.abc import Sequence

from echovlm_jax.data.keys import number
from echovlm_jax.data.record import Report
from echovlm_jax.phantom import words
from echovlm_jax.phantom.exam import Exam, Lesion
from echovlm_jax.phantom.questions import questions

_WORDING = 4  # which numbers of an exam's key choose wordings


def reports(exam: Exam) -> tuple[Report, ...]:
    """What is written about an exam, in Chinese and in English."""
    return tuple(_report(exam, language) for language in ("zh", "en"))


def _report(exam: Exam, language: str) -> Report:
    at = 0 if language == "en" else 1
    return Report(
        language=language,
        findings=_findings(exam, at),
        impression=_impression(exam, at),
        caption=_caption(exam, at),
        diagnosis=words.DIAGNOSES[exam.organ][exam.diagnosis][at],
        questions=questions(exam, language),
    )


def _choose(exam: Exam, what: int, at: int, options: Sequence[str]) -> str:
    return options[number(exam.key, _WORDING, what, at) % len(options)]


def _word(lesion: Lesion, key: str, at: int) -> str:
    return words.ATTRIBUTES[key][getattr(lesion, key)][at]


def _findings(exam: Exam, at: int) -> str:
    scene = _choose(exam, 0, at, [pair[at] for pair in words.SCENES[exam.organ]])
    if exam.lesion is None:
        diffuse = words.DIFFUSE[exam.organ][exam.diagnosis][at].format(size=f"{exam.size:g}")
        return _join([scene, diffuse], at)
    focal = (
        _plaque(exam, exam.lesion, at) if exam.organ == "vessel" else _focal(exam, exam.lesion, at)
    )
    return _join([scene, *focal, words.OTHERWISE[exam.organ][at]], at)


def _focal(exam: Exam, lesion: Lesion, at: int) -> list[str]:
    """Sentences on a lesion: what, where and how large; outline; what is behind and inside it."""
    told = {key: _word(lesion, key, at) for key in ("echo", "shape", "margin")}
    told |= {"noun": words.noun(exam.organ, exam.diagnosis)[at], "size": f"{exam.size:g}"}
    told["place"] = _word(lesion, "place", at) if lesion.place else ("gland", "乳腺腺体内")[at]
    told["a"] = "An" if told["echo"][0] in "aeiou" else "A"
    first = (
        (
            "{a} {echo} {noun} of about {size} mm is seen in the {place}.",
            "{a} {echo} {noun} is seen in the {place}, about {size} mm in size.",
        ),
        (
            "{place}可见一{echo}{noun}，大小约{size} mm。",
            "{place}见{echo}{noun}，大小约{size} mm。",
        ),
    )
    out = [_choose(exam, 1, at, first[at]).format(**told)]
    if lesion.echo == "hyperechoic" and lesion.calcification == "coarse":  # a stone
        return [*out, words.BEHIND[lesion.posterior][at]]
    told["turned"] = ""
    if lesion.orientation:
        told["turned"] = (" and ", "，")[at] + _word(lesion, "orientation", at)
    second = "It is {shape}{turned} with {margin} margins.", "呈{shape}{turned}，边界{margin}。"
    out.append(second[at].format(**told))
    out.append(words.BEHIND[lesion.posterior][at])
    if exam.organ in ("breast", "thyroid", "gynaecology"):
        out.append(words.CALCIUM[lesion.calcification][at])
    return out


def _plaque(exam: Exam, lesion: Lesion, at: int) -> list[str]:
    told = {key: _word(lesion, key, at) for key in ("echo", "shape", "place")}
    told |= {"size": f"{exam.size:g}", "a": "An" if told["echo"][0] in "aeiou" else "A"}
    first = (
        (
            "{a} {echo} plaque is seen on the {place}, about {size} mm thick.",
            "On the {place} there is a {echo} plaque about {size} mm thick.",
        ),
        ("{place}可见一{echo}斑块，厚约{size} mm。", "{place}见{echo}斑块，厚约{size} mm。"),
    )
    second = "Its surface is {shape}.", "斑块呈{shape}。"
    return [
        _choose(exam, 1, at, first[at]).format(**told),
        second[at].format(**told),
        words.BEHIND[lesion.posterior][at],
    ]


def _impression(exam: Exam, at: int) -> str:
    """One wording only: what two exams conclude is the same exactly where the texts are."""
    name, advice = words.DIAGNOSES[exam.organ][exam.diagnosis][at], words.ADVICE[exam.diagnosis][at]
    name = name[0].upper() + name[1:]
    if exam.lesion is not None and exam.lesion.place:
        place = _word(exam.lesion, "place", at)
        name = f"{name}, {place}" if at == 0 else f"{name}（{place}）"
    return f"{name}: {advice}." if at == 0 else f"{name}，{advice}。"


def _caption(exam: Exam, at: int) -> str:
    """One sentence on what is seen, without a diagnosis."""
    organ = words.ORGANS[exam.organ][at]
    if exam.lesion is None:
        seen = words.SIGNS[exam.organ][exam.diagnosis][at].format(size=f"{exam.size:g}")
    else:
        echo = _word(exam.lesion, "echo", at)
        name = words.noun(exam.organ, exam.diagnosis)[at]
        place = ("gland", "腺体内")[at]
        if exam.lesion.place:
            place = _word(exam.lesion, "place", at)
        if at == 0:
            article = "an" if echo[0] in "aeiou" else "a"
            where = "on" if exam.organ == "vessel" else "in"
            seen = f"{article} {echo} {name} of about {exam.size:g} mm {where} the {place}"
        else:
            seen = f"{place}可见{echo}{name}，约{exam.size:g} mm"
    return f"Ultrasound of the {organ} with {seen}." if at == 0 else f"{organ}超声图像，{seen}。"


def _join(sentences: Sequence[str], at: int) -> str:
    return (" " if at == 0 else "").join(sentences)
