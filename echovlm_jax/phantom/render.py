"""From an exam's parameters to its pictures."""

import functools
from collections.abc import Callable

import numpy as np

from echovlm_jax.data.keys import mix
from echovlm_jax.phantom import abdominal, heart, superficial
from echovlm_jax.phantom.acoustics import (
    Probe,
    beam_levels,
    empty_tissue,
    scan_convert,
    scan_table,
    to_grey,
)
from echovlm_jax.phantom.exam import Exam, View, between, stream

HEADER = 11  # px: the black strip on top, which says what this is
RULER = 7  # px: the black strip on the right, with a mark for every 10 mm of depth

_ORGANS: dict[str, tuple[Callable[[int, int, int], Probe], Callable[..., None]]] = {
    "breast": (superficial.breast_probe, superficial.paint_breast),
    "gynaecology": (abdominal.pelvis_probe, abdominal.paint_pelvis),
    "heart": (heart.heart_probe, heart.paint_heart),
    "kidney": (abdominal.kidney_probe, abdominal.paint_kidney),
    "liver": (abdominal.liver_probe, abdominal.paint_liver),
    "thyroid": (superficial.thyroid_probe, superficial.paint_thyroid),
    "vessel": (superficial.vessel_probe, superficial.paint_vessel),
}


def render(exam: Exam, view: View) -> np.ndarray:
    """One view's picture, uint8 RGB: [H, W, 3], or [T, H, W, 3] of a loop (one heartbeat)."""
    if not view.frames:
        phase = next(stream(view.key, 72)) * 0.3  # stills are frozen near the end of filling
        return _picture(exam, view, phase)
    return np.stack([_picture(exam, view, t / view.frames) for t in range(view.frames)])


def _picture(exam: Exam, view: View, phase: float) -> np.ndarray:
    height, width = view.height - HEADER, view.width - RULER
    view_inside = view._replace(height=height, width=width)
    make_probe, paint = _ORGANS[exam.organ]
    probe = make_probe(exam.key, height, width)  # one setting for the whole exam
    tissue = empty_tissue(probe, height, width)
    paint(tissue, exam, view_inside, *([phase] if exam.organ == "heart" else []))
    # Blood and noise change from frame to frame; tissue keeps its scatterers.
    level = beam_levels(tissue, probe, int(mix(view.key, 73)))
    grey = to_grey(level, between(stream(view.key, 74), -2.5, 2.5))
    top, scale = 0.0, height / probe.depth
    if probe.half_angle:
        scan = scan_table(probe, height, width)
        grey, top, scale = scan_convert(grey, scan, height, width), scan.top, scan.scale
    out = np.zeros((view.height, view.width), np.uint8)
    out[HEADER:, :width] = (grey + np.float32(0.5)).astype(np.uint8)
    _mark(out, top, scale, probe.depth)
    return np.repeat(out[:, :, None], 3, axis=2)


def _mark(picture: np.ndarray, top: float, scale: float, depth: float) -> None:
    """Writes the label and the ruler into the black strips, in place."""
    label = _label()
    picture[3 : 3 + label.shape[0], 4 : 4 + label.shape[1]] = label
    for i in range(int(depth / 10) + 1):
        row = HEADER + int(top + i * 10 * scale)
        if HEADER <= row < len(picture):
            picture[row, -RULER + 2 + (0 if i % 5 == 0 else 2) :] = 200


# 5 rows of 3 px, top to bottom.
_LETTERS = {
    "S": "###|#..|###|..#|###", "Y": "#.#|#.#|.#.|.#.|.#.", "N": "#.#|###|###|###|#.#",
    "T": "###|.#.|.#.|.#.|.#.", "H": "#.#|#.#|###|#.#|#.#", "E": "###|#..|##.|#..|###",
    "I": "###|.#.|.#.|.#.|###", "C": "###|#..|#..|#..|###",
}  # fmt: skip


@functools.cache
def _label() -> np.ndarray:
    """SYNTHETIC in small letters, uint8 [5, 35]."""
    rows = [""] * 5
    for letter in "SYNTHETIC":
        for i, row in enumerate(_LETTERS[letter].split("|")):
            rows[i] += row + "."
    return np.array([[200 if c == "#" else 0 for c in row] for row in rows], np.uint8)
