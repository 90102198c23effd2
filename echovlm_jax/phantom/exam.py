"""What a phantom exam is: parameters drawn from one whole number, from which all else follows."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from echovlm_jax.data.keys import mix, uniform

T = TypeVar("T")
HEARTBEAT = 800.0  # ms: the length of a loop

# Exams of each region in the paper's data (arXiv 2509.14977), in the order of record.ORGANS.
PAPER_COUNTS = (13000, 66492, 47061, 16388, 18043, 21969, 4320)


class Profile(NamedTuple):
    """What a diagnosis may look like: each attribute is drawn from its tuple."""

    sizes: tuple[int | float, ...]  # mm: of a lesion, or of what is too thick or wide
    echoes: tuple[str, ...] = ()  # empty: nothing focal, only `sizes` counts
    shapes: tuple[str, ...] = ("oval",)
    margins: tuple[str, ...] = ("clear",)
    posteriors: tuple[str, ...] = ("none",)
    calcifications: tuple[str, ...] = ("none",)
    places: tuple[str, ...] = ("",)
    orientations: tuple[str, ...] = ("",)


_TABLE: dict[str, dict[str, dict[str, list[Any]]]] = json.loads(
    Path(__file__).with_name("profiles.json").read_text("utf-8")
)
# A closed set of five for each organ, drawn equally often: guessing is right once in five times.
DIAGNOSES = {organ: tuple(profiles) for organ, profiles in _TABLE.items()}
PROFILES = {
    (organ, diagnosis): Profile(**{key: tuple(values) for key, values in profile.items()})
    for organ, profiles in _TABLE.items()
    for diagnosis, profile in profiles.items()
    if profile
}


class Lesion(NamedTuple):
    """One focal finding; the words are keys of `words.ATTRIBUTES`."""

    echo: str
    shape: str
    margin: str
    posterior: str
    calcification: str
    place: str
    orientation: str  # "wider" or "taller" (than the other way); "" where nobody says so
    key: int  # of its outline and inside


class View(NamedTuple):
    """One image, or one loop of frames, of an exam."""

    frames: int  # 0: an image
    height: int
    width: int
    plane: str  # "first" shows everything the report states; "second" is another cut
    key: int  # of its pose, gain and speckle


@dataclass(frozen=True)
class Exam:
    key: int
    organ: str  # one of record.ORGANS
    diagnosis: str  # one of DIAGNOSES[organ]
    size: int | float  # mm; 0: nothing to measure
    lesion: Lesion | None
    views: tuple[View, ...]


def stream(*parts: int) -> Iterator[float]:
    """Endless numbers in [0, 1), the same for the same parts for ever."""
    block = 0
    while True:
        yield from uniform(mix(*parts, np.arange(block, block + 32))).tolist()
        block += 32


def pick(draws: Iterator[float], options: Sequence[T]) -> T:
    return options[int(next(draws) * len(options))]


def between(draws: Iterator[float], low: float, high: float) -> float:
    return low + (high - low) * next(draws)


_MEDIA, _LESION, _VIEW = 1, 2, 3  # which numbers of an exam's key a stream is for
SIDES = (168, 336)  # px: shortest and longest side of an image
# How many views: most exams are short.
_VIEWS = (1, 1, 1, 2, 2, 3, 4)
MOST_VIEWS = max(_VIEWS)


def make_exam(
    key: int, organ: str, *, cine: float = 0.25, cine_frames: int = 8, views: int = MOST_VIEWS
) -> Exam:
    """An exam's parameters.

    Args:
      key: seed of everything; the same key and organ give the same exam.
      cine: the share of heart exams whose first view is a loop.
      cine_frames: its frames, one heartbeat.
      views: maximum number; the first shows all that the report says.
    """
    draws = stream(key, _LESION)
    diagnosis = pick(draws, DIAGNOSES[organ])
    profile = PROFILES.get((organ, diagnosis))
    size = pick(draws, profile.sizes) if profile else 0
    lesion = _lesion(draws, profile, key) if profile and profile.echoes else None
    return Exam(key, organ, diagnosis, size, lesion, _views(key, organ, cine, cine_frames)[:views])


def _lesion(draws: Iterator[float], profile: Profile, key: int) -> Lesion:
    words = [pick(draws, options) for options in profile[1:]]
    lesion = Lesion(*words, key=int(mix(key, _LESION, 0)))
    # Sound doesn't pass a coarse calcification.
    return lesion._replace(posterior="shadow") if lesion.calcification == "coarse" else lesion


def _views(key: int, organ: str, cine: float, cine_frames: int) -> tuple[View, ...]:
    draws = stream(key, _MEDIA)
    count = pick(draws, _VIEWS)
    # One machine, one window: the images of an exam are of one size.
    short = int(between(draws, SIDES[0], 281))
    long = min(int(short * between(draws, 1.0, 1.3)), SIDES[1])
    upright = next(draws) < 0.3
    height, width = (long, short) if upright else (short, long)
    loop = organ == "heart" and cine_frames > 0 and next(draws) < cine
    views = []
    for i in range(count):
        plane = "first" if i == 0 or next(draws) < 0.5 else "second"
        frames = cine_frames if loop and i == 0 else 0
        views.append(View(frames, height, width, plane, int(mix(key, _VIEW, i))))
    return tuple(views)
