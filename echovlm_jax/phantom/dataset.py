"""Phantom exams as a `Dataset`: made when they are asked for, nothing on disk."""

import hashlib
import json
import math

import numpy as np

from echovlm_jax.data.keys import mix, text_key
from echovlm_jax.data.record import ORGANS, Medium, Record
from echovlm_jax.errors import InputError
from echovlm_jax.phantom.exam import HEARTBEAT, PAPER_COUNTS, Exam, make_exam
from echovlm_jax.phantom.render import render
from echovlm_jax.phantom.reports import reports

SIZES = {"train": 4096, "validation": 256, "test": 512}  # exams, where no size is given
# Part of every fingerprint: to be raised by whoever changes pictures or texts.
VERSION = 1
_GOLDEN = 0x9E3779B97F4A7C15


def organ_of(key: int, number: np.ndarray, balanced: bool) -> np.ndarray:
    """The organs of exams by number, as indices into ORGANS: int16.

    Any run of numbers has the organs' shares to within an exam or two (steps of the golden ratio
    round the unit circle, cut into arcs of these lengths), whatever the size of the data set.
    """
    counts = (1,) * len(ORGANS) if balanced else PAPER_COUNTS
    # Whole numbers: exact, and so the same everywhere.
    ends = np.array([sum(counts[: i + 1]) * 2**32 // sum(counts) for i in range(len(counts) - 1)])
    with np.errstate(over="ignore"):
        at = number.astype(np.uint64) * np.uint64(_GOLDEN) + np.asarray(mix(key, 0))
    return np.searchsorted(ends.astype(np.uint64), at >> np.uint64(32), side="right").astype(
        np.int16
    )


class PhantomDataset:
    """Synthetic exams of a split. The splits share none; exam i doesn't depend on the size.

    Args:
      split: "train", "validation" or "test".
      size: exams; None = 4096, 256 and 512.
      balanced: organs equally often; else as often as in the paper's data.
      cine: the share of heart exams that have a loop.
      cine_frames: its frames.

    Raises:
      InputError: no such split, or a number out of its range.
    """

    def __init__(
        self,
        split: str = "train",
        size: int | None = None,
        *,
        balanced: bool = False,
        cine: float = 0.25,
        cine_frames: int = 8,
    ) -> None:
        if split not in SIZES:
            raise InputError(f"phantom has no split {split!r}; it has {', '.join(SIZES)}")
        size = SIZES[split] if size is None else size
        if size < 1:
            raise InputError(f"size must be at least 1 exam, found {size}")
        if not 0 <= cine <= 1 or not math.isfinite(cine) or cine_frames < 1:
            raise InputError("cine must be a share from 0 to 1, with cine_frames of at least 1")
        self._split, self._key = split, text_key(f"phantom/{split}")
        self._cine, self._cine_frames = cine, cine_frames
        self.organ_names: tuple[str, ...] = ORGANS
        self.num_frames: int | None = cine_frames
        self.organs = organ_of(self._key, np.arange(size), balanced)
        content = json.dumps([VERSION, split, size, balanced, cine, cine_frames])
        self.fingerprint = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.organs)

    def exam(self, i: int) -> Exam:
        """The parameters of exam `i`, which texts and pixels follow from."""
        if not 0 <= i < len(self.organs):
            raise IndexError(f"exam {i} of {len(self.organs)}")
        return make_exam(
            int(mix(self._key, 1, i)),
            ORGANS[self.organs[i]],
            cine=self._cine,
            cine_frames=self._cine_frames,
        )

    def record(self, i: int) -> Record:
        """Texts and sizes; nothing is rendered."""
        exam, name = self.exam(i), f"phantom-{self._split}-{i:06d}"
        media = [
            Medium(v.frames, v.height, v.width, HEARTBEAT / 1000 / v.frames if v.frames else None)
            for v in exam.views
        ]
        return Record(
            id=name,
            organ=exam.organ,
            media=tuple(media),
            reports=reports(exam),
            source="phantom",
            group=name,
            synthetic=True,
        )

    def media(self, i: int) -> list[np.ndarray]:
        """Pixels, as `record(i).media` says: uint8 RGB [H, W, 3], of a loop [T, H, W, 3]."""
        exam = self.exam(i)
        return [render(exam, view) for view in exam.views]
