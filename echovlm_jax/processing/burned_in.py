"""Text that is burnt into pixels and may name a patient: found, masked or refused.

Three things tell of it: the header of a DICOM file (BurnedInAnnotation), what is drawn outside the
ultrasound regions that it states, and text that OCR finds in the picture (the extra `ocr`; its
models are in its package, and no picture leaves this machine). What a text says is looked at in
`_boxes` and goes nowhere: never log, raise or return it.
"""

import functools
import os
import re
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from echovlm_jax.errors import InputError

Choice = Literal["report", "mask", "refuse"]
CHOICES: tuple[Choice, ...] = ("report", "mask", "refuse")

_ROUNDS = 3  # of masking and looking again
_CONTRAST = 32  # of 255: what is drawn differs by more from its ground
_MARGIN = 4  # px around a region: a lossy picture runs over its edge
# A whole scan is taken for a letter or two at times, or for text that can't be read. What machines
# write is smaller: px, share.
_TALLEST, _TALLEST_SHARE = 80, 1 / 8
_COVERED = 0.5  # share of a box that is masked already: nothing can be read there

_WINDOW, _ABOVE = 31, 0.5  # px; standard deviations: what stands out of speckle around it

_MAKING = threading.Lock()  # functools.cache alone makes one for each thread that comes early

# What is no name, no date and no number of anybody: a number of a scale (up to three digits before
# the point), numbers with units or a mark of the machine, a unit, one Latin letter (a mark of
# orientation), strokes, and the phantoms' label. A number alone that is written as an id or as a
# day and a month is none of a scale.
_NUMBER = r"[-+±<>~]?\d{1,3}(?:[.,]\d{1,3})?"
_ID = r"\d{3}[.,]\d{3}|(?:0[1-9]|[12]\d|3[01])[.,](?:0[1-9]|1[0-2])"
_UNITS = r"[cm]m|[kM]?Hz|dB|fps|bpm|[cm]?m/s|%|°C|W/cm2"
_HARMLESS = re.compile(
    rf"(?!(?:{_ID})\Z){_NUMBER}°?|(?:{_NUMBER}(?:{_UNITS}|m?s|min|m|ml)|(?:MI|TI[SBC]?)[:=]?{_NUMBER})+"
    rf"|{_UNITS}|[A-Z]|[^\w\s]+|SY[NM]THETIC",
    re.IGNORECASE,
)


class Box(NamedTuple):
    """A part of a picture, in pixels; ends excluded."""

    top: int
    bottom: int
    left: int
    right: int


class Read(NamedTuple):
    """What OCR says of a picture."""

    boxes: np.ndarray | None = None  # [N, 4, 2], the corners (x, y) of each text that it sees
    texts: Sequence[str] | None = None  # "" where it can't read one; None: it reads none


class Checked(NamedTuple):
    """What became of a picture."""

    frames: np.ndarray  # uint8 RGB [T, H, W, 3], masked where that was asked for
    notes: tuple[str, ...]  # of burned_in, drawn_outside, text_found, text_unchecked, masked
    refused: str = ""  # why the picture may not be kept; "" where it may


def engine() -> str:
    """The OCR packages with their releases: "rapidocr 3.10.0, onnxruntime 1.32.0".

    Raises:
      InputError: one of them is not installed.
    """
    try:
        return ", ".join(f"{name} {version(name)}" for name in ("rapidocr", "onnxruntime"))
    except PackageNotFoundError:
        raise InputError(
            "finding text in pictures needs OCR packages, which are not installed;"
            " pip install 'echovlm-jax[ocr]'"
        ) from None


def found(image: np.ndarray) -> list[Box]:
    """Where a picture has text that may be a name, a date or a number of somebody.

    Numbers of scales, units and single letters are left out. May be called from several threads;
    they wait for one another.

    Args:
      image: uint8 RGB [H, W, 3], or [T, H, W, 3], of which each frame is looked at.

    Returns:
      Boxes of all frames together, from top to bottom; those that overlap by half are one.

    Raises:
      InputError: the OCR packages are not installed, can't be used, or failed.
    """
    try:
        with _MAKING:
            read = _reader()
    except InputError:
        raise
    except Exception as error:  # a library of the system is missing, or a model is damaged
        why = f"the OCR packages can't be used ({type(error).__name__})"
        raise InputError(why) from None
    boxes: set[Box] = set()
    for frame in image if image.ndim == 4 else image[None]:
        try:
            boxes |= _boxes(read, frame)
        except Exception:  # its message may quote what was read
            raise InputError("the search for text in the picture failed") from None
    return _joined(boxes)


def drawn_outside(frames: np.ndarray, regions: Sequence[Box]) -> bool:
    """Whether anything is drawn outside all regions, by more than 4 px.

    Args:
      frames: uint8 RGB [T, H, W, 3].
      regions: boxes of the ultrasound; none where they are not known, and so nothing outside.
    """
    outside = _outside(frames, regions, _MARGIN)
    if not outside.any():
        return False
    ground = np.median(frames[0, outside], axis=0).astype(np.float32)
    # One frame at a time: a loop's copy in wider numbers takes gigabytes.
    return any(np.abs(frame[outside] - ground).max() > _CONTRAST for frame in frames)


def check(
    frames: np.ndarray,
    choice: Choice | None,
    *,
    stated: bool = False,
    regions: Sequence[Box] = (),
) -> Checked:
    """Does with a picture what is chosen for text in it.

    report: notes what was found. refuse: refuses a picture whose header says so, with something
    drawn outside its regions, or with text. mask: blackens all that is outside the regions, and
    the boxes of the text in every frame, and looks again; refuses where text stays, or where the
    header says that there is some and nothing was found. Both refuse what could not be looked at.

    Args:
      frames: uint8 RGB [T, H, W, 3]; each is looked at.
      choice: one of CHOICES; None: as report, but no text is looked for.
      stated: whether the file's header says that its pixels name somebody.
      regions: boxes of the ultrasound, where they are known.
    """
    drawn = drawn_outside(frames, regions)
    notes = ["burned_in"] * stated + ["drawn_outside"] * drawn
    if choice == "refuse" and (stated or drawn):
        why = "its header says that its pixels name somebody"
        return Checked(frames, (), why if stated else "something is drawn outside its regions")
    if choice is None:
        return Checked(frames, tuple(notes))
    try:
        if choice == "mask":
            return _masked(frames, notes, regions)
        boxes = found(frames)
    except InputError as error:
        why = str(error)
        return Checked(frames, (*notes, "text_unchecked"), "" if choice == "report" else why)
    if boxes and choice == "refuse":
        return Checked(frames, (), "text was found in it")
    return Checked(frames, (*notes, *["text_found"] * bool(boxes)))


def blacken(frames: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """A copy with all boxes black in every frame, and a fifth of their height around them.

    Args:
      frames: uint8 [T, H, W, C].
      boxes: parts of each frame.
    """
    return np.where(_grown(boxes, frames)[..., None], np.uint8(0), frames)


def _masked(frames: np.ndarray, notes: list[str], regions: Sequence[Box]) -> Checked:
    hidden = _outside(frames, regions)
    for _ in range(_ROUNDS):
        shown = np.where(hidden[..., None], np.uint8(0), frames)
        boxes = [box for box in found(shown) if hidden[_slices(box)].mean() < _COVERED]
        if not boxes:
            break
        hidden |= _grown(boxes, frames)
        if "text_found" not in notes:
            notes = [*notes, "text_found"]
    else:
        return Checked(frames, (), "text is still found after it was masked")
    if "burned_in" in notes and "text_found" not in notes:
        why = "its header says that its pixels name somebody, and no text was found to mask"
        return Checked(frames, (), why)
    changed = not np.array_equal(shown, frames)
    return Checked(shown, (*notes, *["masked"] * changed))


def _outside(frames: np.ndarray, regions: Sequence[Box], more: int = 0) -> np.ndarray:
    """bool [H, W]: what is in no region, each of which is larger by `more` px on all sides."""
    outside = np.full(frames.shape[1:3], bool(regions))
    for region in regions:
        outside[_slices(region, more)] = False
    return outside


def _grown(boxes: Sequence[Box], frames: np.ndarray) -> np.ndarray:
    """bool [H, W]: what is in a box, or as near to it as a fifth of its height."""
    inside = np.zeros(frames.shape[1:3], bool)
    for box in boxes:
        inside[_slices(box, max(2, (box.bottom - box.top) // 5))] = True
    return inside


def _joined(boxes: set[Box]) -> list[Box]:
    joined: list[Box] = []
    for box in sorted(boxes, key=_area, reverse=True):
        for n, other in enumerate(joined):
            top, left = max(box.top, other.top), max(box.left, other.left)
            bottom, right = min(box.bottom, other.bottom), min(box.right, other.right)
            if 2 * max(0, bottom - top) * max(0, right - left) >= _area(box):
                ends = zip(box, other, strict=True)
                joined[n] = Box(*((min, max)[i % 2](pair) for i, pair in enumerate(ends)))
                break
        else:
            joined.append(box)
    return sorted(joined)


def _area(box: Box) -> int:
    return (box.bottom - box.top) * (box.right - box.left)


def _slices(box: Box, more: int = 0) -> tuple[slice, slice]:
    top, bottom, left, right = box
    return np.s_[max(0, top - more) : bottom + more, max(0, left - more) : right + more]


def _boxes(read: Callable[[np.ndarray], Read], frame: np.ndarray) -> set[Box]:
    return _boxes_of(read(np.ascontiguousarray(frame[..., ::-1])), frame) | _boxes_of(
        read(_raised(frame)), frame
    )


def _raised(frame: np.ndarray) -> np.ndarray:
    """What is brighter than most around it, uint8 grey [H, W, 3]: text over speckle stands out of
    it, where OCR sees one texture."""
    levels = frame.max(axis=-1).astype(np.float64)
    mean = _mean(levels)
    least = mean + _ABOVE * np.sqrt(np.maximum(_mean(levels**2) - mean**2, 1))
    raised = np.clip((levels - least) / (256 - least) * 255, 0, 255)
    return np.repeat(raised.astype(np.uint8)[..., None], 3, axis=-1)


def _mean(levels: np.ndarray) -> np.ndarray:
    """The mean of the window around each value of [H, W]; the edge goes on outside."""
    sums = np.pad(levels, _WINDOW // 2, mode="edge")
    for axis in (0, 1):
        sums = np.insert(np.cumsum(sums, axis), 0, 0, axis)
        ends = np.take(sums, range(_WINDOW, sums.shape[axis]), axis)
        sums = ends - np.take(sums, range(sums.shape[axis] - _WINDOW), axis)
    return sums / _WINDOW**2


def _harmless(letters: str, tall: bool) -> bool:
    # Two characters can be a Chinese name: of those, one alone is left out for its size.
    taken = len(letters) <= (2 if letters.isascii() else 1)
    return bool(_HARMLESS.fullmatch(letters)) or (tall and taken)


def _boxes_of(result: Read, frame: np.ndarray) -> set[Box]:
    if result.boxes is None:
        return set()
    texts = result.texts or [None] * len(result.boxes)
    tallest = max(_TALLEST, _TALLEST_SHARE * min(frame.shape[:2]))
    boxes = set()
    for corners, text in zip(result.boxes, texts, strict=True):
        height = np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1).min()
        if text is not None and _harmless("".join(text.split()), height > tallest):
            continue
        left, top = np.floor(corners.min(axis=0)).astype(int).tolist()
        right, bottom = np.ceil(corners.max(axis=0)).astype(int).tolist()
        boxes.add(Box(top, bottom + 1, left, right + 1))
    return boxes


@functools.cache
def _reader() -> Callable[[np.ndarray], Read]:
    """OCR of a picture uint8 BGR [H, W, 3]. One thread: the same boxes on every machine, and
    `data build` has its own processes."""
    engine()
    # Since 1.29 its wheels for Linux report what they run to their maker (onnxruntime #27379), and
    # leave a file in the folder for temporary ones. It is read when the library is loaded.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import rapidocr  # pyright: ignore[reportMissingImports]
    from rapidocr.utils.process_img import (  # pyright: ignore[reportMissingImports]
        map_boxes_to_original,
    )

    models = Path(rapidocr.__path__[0]) / "models"
    params = {
        "Global.log_level": "critical",  # it says what it does in the terminal
        "Det.limit_side_len": 480,  # px that a smaller picture's shorter side is enlarged to
        "Global.use_cls": False,  # whether it is upside down
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    for part in ("det", "rec"):
        # Named, so that it does not look for them elsewhere: it would ask the net.
        path = next(iter(sorted(models.glob(f"*_{part}_*.onnx"))), None)
        if path is None:
            raise InputError("the package rapidocr has no models in it; install its wheel of PyPI")
        params[f"{part.capitalize()}.model_path"] = str(path)
    ocr, lock = rapidocr.RapidOCR(params=params), threading.Lock()

    def read(picture: np.ndarray) -> Read:
        with lock:
            # Not ocr(picture), which leaves out what is seen and can't be read.
            image, steps = ocr.preprocess_img(picture)
            seen, _, said, _ = ocr.run_ocr_steps(image, steps)
        if seen.boxes is None:
            return Read()
        boxes = map_boxes_to_original(seen.boxes, steps, *picture.shape[:2])
        return Read(boxes, said.txts)

    return read
