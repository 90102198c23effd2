"""One exam as the rest of the data code knows it: its texts and sizes, without pixels."""

import re
from dataclasses import dataclass
from typing import NamedTuple

# The seven regions of the paper (arXiv 2509.14977). A dataset may hold others; these are the names
# that a region goes by where it is one of the seven.
ORGANS = ("breast", "gynaecology", "heart", "kidney", "liver", "thyroid", "vessel")
LANGUAGES = ("zh", "en")


def language_of(text: str) -> str:
    """'zh' where a text has a Chinese character."""
    return "zh" if re.search(r"[\u4e00-\u9fff]", text) else "en"


class Medium(NamedTuple):
    """An image, or a loop of frames, as it is stored: sizes in pixels."""

    frames: int  # 0: an image; n ≥ 1: a video of n frames
    height: int
    width: int
    # From one frame to the next, on average; None: not known, as in datasets from before 1.1.0.
    seconds: float | None = None


class Turn(NamedTuple):
    """One turn of a conversation. Marks of images are not in it: the media go in front."""

    role: str  # "system", "user" or "assistant"
    text: str


@dataclass(frozen=True)
class Question:
    """A question about an exam. Open where there are no options."""

    question: str
    answer: str  # one of the options, word for word, where there are any
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """The texts about an exam in one language; an empty text means there is none."""

    language: str  # one of LANGUAGES
    findings: str = ""
    impression: str = ""
    caption: str = ""
    diagnosis: str = ""  # a label
    questions: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Record:
    """An exam. Tasks are made from its reports; a conversation, where it has one, is used as is."""

    id: str
    organ: str
    media: tuple[Medium, ...] = ()
    turns: tuple[Turn, ...] = ()  # as given: system?, then user and assistant by turns
    reports: tuple[Report, ...] = ()
    source: str = ""  # where it is from: the stem of the file's name
    group: str = ""  # the patient or study, where known: a group is never in two splits
    synthetic: bool = False
