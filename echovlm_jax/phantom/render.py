"""From an exam's parameters to its pictures."""

import functools
from collections.abc import Callable

import numpy as np

from echovlm_jax.data.keys import mix
from echovlm_jax.phantom.abdominal import (
    kidney_probe,
    liver_probe,
    paint_kidney,
    paint_liver,
    paint_pelvis,
    pelvis_probe,
)
from echovlm_jax.phantom.acoustics import (
    Probe,
    beam_levels,
    empty_tissue,
    scan_convert,
    scan_table,
    to_grey,
)
from echovlm_jax.phantom.exam import Exam, View, between, stream
from echovlm_jax.phantom.heart import heart_probe, paint_heart
from echovlm_jax.phantom.superficial import (
    breast_probe,
    paint_breast,
    paint_thyroid,
    paint_vessel,
    thyroid_probe,
    vessel_probe,
)

HEADER = 11  # px: the black strip on top, which says what this is
RULER = 7  # px: the black strip on the right, with a mark for every 10 mm of depth

_ORGANS: dict[str, tuple[Callable[[int, int, int], Probe], Callable[..., None]]] = {
    "breast": (breast_probe, paint_breast),
    "gynaecology": (pelvis_probe, paint_pelvis),
    "heart": (heart_probe, paint_heart),
    "kidney": (kidney_probe, paint_kidney),
    "liver": (liver_probe, paint_liver),
    "thyroid": (thyroid_probe, paint_thyroid),
    "vessel": (vessel_probe, paint_vessel),
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
