"""A picture or a loop with what is known of its time, as everything after reading takes it."""

import math
from dataclasses import dataclass

import numpy as np

from echovlm_jax.errors import InputError

DEFAULT_FPS = 24  # what Hugging Face's processor takes a video for of which nothing is known
# Seconds between frames, and of a whole loop: what files state beyond is a mistake.
_SHORTEST, _LONGEST, _LONGEST_LOOP = 1e-5, 1e3, 43200.0


@dataclass(frozen=True, eq=False)
class Media:
    """What is seen, and how fast.

    Attributes:
      pixels: uint8 RGB [H, W, 3], or [T, H, W, 3] of a loop.
      seconds: from one frame of a loop to the next, on average; None where that isn't known.
    """

    pixels: np.ndarray
    seconds: float | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.seconds, int | float | np.integer | np.floating)
        if self.seconds is None or (number and 0 < self.seconds < math.inf):
            return
        raise InputError(
            f"the seconds between frames must be a number above 0, or None, found {self.seconds!r}"
        )


def stated_seconds(value: float | None) -> float | None:
    """What a file states as the seconds between frames; None where it can't be."""
    if value is None or not math.isfinite(value) or not _SHORTEST <= value <= _LONGEST:
        return None
    return value


def sampled(seconds: float | None, frames: int, taken: int) -> float | None:
    """Seconds between `taken` of a loop's `frames`, which lie evenly over it; None where they are
    not known, or make a loop longer than any is."""
    if seconds is None or seconds * frames > _LONGEST_LOOP:
        return None
    return seconds * (frames / taken)


def second_per_grid(seconds: float | None, temporal_patch_size: int) -> float:
    """Seconds that one time step of a loop's grid lasts; frames that were taken of unknown time
    count as DEFAULT_FPS a second."""
    return temporal_patch_size * (1 / DEFAULT_FPS if seconds is None else seconds)
