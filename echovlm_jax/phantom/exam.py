"""What a phantom exam is: parameters drawn from one whole number, from which all else follows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from echovlm_jax.data.keys import mix, uniform

T = TypeVar("T")

# Exams of each region in the paper's data (arXiv 2509.14977), in the order of record.ORGANS.
PAPER_COUNTS = (13000, 66492, 47061, 16388, 18043, 21969, 4320)

NORMAL = "normal"
# A closed set of five for each organ, drawn equally often: guessing is right once in five times.
DIAGNOSES = {
    "breast": (NORMAL, "cyst", "fibroadenoma", "suspicious", "ducts"),
    "gynaecology": (NORMAL, "fibroid", "cyst", "complex", "endometrium"),
    "heart": (NORMAL, "effusion", "hypertrophy", "dilated", "mass"),
    "kidney": (NORMAL, "cyst", "stone", "hydronephrosis", "mass"),
    "liver": (NORMAL, "cyst", "haemangioma", "suspicious", "fatty"),
    "thyroid": (NORMAL, "cyst", "benign", "suspicious", "diffuse"),
    "vessel": (NORMAL, "intima", "soft", "calcified", "occlusion"),
}


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


_ROUNDISH = ("round", "oval")
_BAD = ("ill-defined", "spiculated")
_OVARIES = ("right ovary", "left ovary")
_POLES = ("upper pole", "lower pole")
_LIVER = ("near", "deep")
_LOBES = ("right lobe", "left lobe")
_WALLS = ("near wall", "far wall")
_ATRIA = ("left atrium", "right atrium")
PROFILES: dict[tuple[str, str], Profile] = {
    ("breast", "cyst"): Profile((8, 10, 12, 15), ("anechoic",), _ROUNDISH,
        posteriors=("enhancement",), orientations=("wider",)),
    ("breast", "fibroadenoma"): Profile((10, 12, 15), ("hypoechoic",), ("oval",),
        calcifications=("none", "none", "coarse"), orientations=("wider",)),
    ("breast", "suspicious"): Profile((10, 12, 15), ("hypoechoic",), ("irregular",), _BAD,
        ("shadow", "shadow", "none"), ("none", "punctate"), orientations=("taller", "wider")),
    ("breast", "ducts"): Profile((3, 4)),
    ("gynaecology", "fibroid"): Profile((25, 30, 35), ("hypoechoic",), _ROUNDISH,
        posteriors=("none", "shadow"), places=("anterior wall", "posterior wall")),
    ("gynaecology", "cyst"): Profile((30, 40, 50), ("anechoic",), _ROUNDISH,
        posteriors=("enhancement",), places=_OVARIES),
    ("gynaecology", "complex"): Profile((40, 50, 60), ("mixed",), ("irregular",),
        ("ill-defined",), places=_OVARIES),
    ("gynaecology", "endometrium"): Profile((16, 18, 20)),
    ("heart", "effusion"): Profile((10, 15, 20)),
    ("heart", "hypertrophy"): Profile((16, 18, 20)),
    ("heart", "dilated"): Profile((62, 66, 70)),
    ("heart", "mass"): Profile((20, 25, 30), ("hyperechoic",), ("oval",), places=_ATRIA),
    ("kidney", "cyst"): Profile((25, 30, 40), ("anechoic",), ("round",),
        posteriors=("enhancement",), places=_POLES),
    ("kidney", "stone"): Profile((8, 10, 12, 15), ("hyperechoic",), posteriors=("shadow",),
        calcifications=("coarse",), places=("upper calyx", "middle calyx", "lower calyx")),
    ("kidney", "hydronephrosis"): Profile((15, 20, 25)),
    ("kidney", "mass"): Profile((30, 35, 40), ("hypoechoic", "hyperechoic"),
        ("round", "irregular"), ("clear", "ill-defined"), places=_POLES),
    ("liver", "cyst"): Profile((25, 30, 40), ("anechoic",), _ROUNDISH,
        posteriors=("enhancement",), places=_LIVER),
    ("liver", "haemangioma"): Profile((25, 30, 40), ("hyperechoic",), _ROUNDISH, places=_LIVER),
    ("liver", "suspicious"): Profile((35, 40, 50), ("hypoechoic",), ("irregular",),
        ("ill-defined",), ("none", "shadow"), places=_LIVER),
    ("liver", "fatty"): Profile((0,)),
    ("thyroid", "cyst"): Profile((10, 12, 15), ("anechoic",), _ROUNDISH,
        posteriors=("enhancement",), places=_LOBES, orientations=("wider",)),
    ("thyroid", "benign"): Profile((10, 12, 15), ("isoechoic", "hyperechoic"), ("oval",),
        places=_LOBES, orientations=("wider",)),
    ("thyroid", "suspicious"): Profile((10, 12, 15), ("hypoechoic",), ("irregular",), _BAD,
        ("none", "shadow"), ("punctate", "punctate", "none"), _LOBES, ("taller", "wider")),
    ("thyroid", "diffuse"): Profile((0,)),
    ("vessel", "intima"): Profile((1.4, 1.6, 1.8)),
    ("vessel", "soft"): Profile((2.5, 3, 3.5), ("hypoechoic",), ("regular", "irregular"),
        places=_WALLS),
    ("vessel", "calcified"): Profile((2.5, 3, 3.5), ("hyperechoic",), ("regular", "irregular"),
        posteriors=("shadow",), calcifications=("coarse",), places=_WALLS),
    ("vessel", "occlusion"): Profile((0,)),
}  # fmt: skip


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
      key: what everything is drawn from; the same key and organ give the same exam.
      cine: the share of heart exams whose first view is a loop.
      cine_frames: its frames, one heartbeat.
      views: at most so many; the first shows all that the report says.
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
