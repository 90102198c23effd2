"""DICOM files to RGB frames, within bounded memory and without patient data in any message.

Every size a header or a codestream claims is checked before anything of that size is made. Frames
are read and decoded one at a time, and only the sampled ones.
"""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from pydicom.uid import UID

from echovlm_jax.errors import InputError
from echovlm_jax.processing.burned_in import Box
from echovlm_jax.processing.dicom_display import grey_to_rgb, palette_to_rgb
from echovlm_jax.processing.dicom_frames import VIDEO, CompressedFrames, FrameDecoder
from echovlm_jax.processing.dicom_header import GREYS, Opened, PixelHeader, read_header, whole
from echovlm_jax.processing.files import VIDEOS, kind_of_bytes, reading
from echovlm_jax.processing.levels import check_loop, picks
from echovlm_jax.processing.media import sampled, stated_seconds
from echovlm_jax.processing.video import Decoded, decode_video

# Region Spatial Format (PS3.3 C.8.5.5.1.1): 2-D, M-mode and spectral Doppler are images; none,
# waveform and graphics are not.
_SPATIAL_FORMATS, _OTHER_FORMATS = {1, 2, 3}, {0, 4, 5}
# A region may end this far outside the frame: so many pixels, or this share of the side.
_OUTSIDE_PIXELS, _OUTSIDE_SHARE = 4, 0.01

_LOGGERS = ("pydicom", "pylibjpeg", "openjpeg", "PIL", "libav")
_process_lock = threading.RLock()  # warnings and loggers belong to the process

Crop = bool | Literal["require"]
NOT_CROPPED = "can't be cropped: it states no ultrasound regions, or one that is not in its frame"


class Loop(NamedTuple):
    """A DICOM file's frames, and what became of the wish to crop them."""

    frames: np.ndarray  # uint8 [T, H, W, 3] RGB
    cropped: bool  # to all the regions that the file states
    burned_in: bool  # the file says that its pixels name somebody (BurnedInAnnotation)
    regions: tuple[Box, ...] = ()  # the spatial ones, in `frames`; none where one can't be used
    seconds: float | None = None  # from one of `frames` to the next; None where it doesn't say


def read_dicom(path: str | Path, *, num_frames: int = 16, crop: Crop = False) -> np.ndarray:
    """Reads a DICOM file's frames: those of `read_loop`."""
    return read_loop(path, num_frames=num_frames, crop=crop).frames


def read_loop(path: str | Path, *, num_frames: int = 16, crop: Crop = False) -> Loop:
    """Reads a DICOM file.

    Args:
      path: a DICOM file, with or without preamble and file meta information: RGB, YBR,
        PALETTE COLOR or MONOCHROME1/2; uncompressed, deflated, RLE, JPEG, JPEG-LS, JPEG 2000, or
        MPEG-2, H.264 or HEVC with the extra `video`.
      num_frames: a longer loop is sampled to this many frames, evenly from the first on.
      crop: cut to the union of the spatial ultrasound regions. What can't be cut so is left whole,
        or cut to those regions that can be used, and `cropped` is false; "require" refuses it.

    Raises:
      InputError: one line with the file and what is wrong; never a value of a patient or text tag.
    """
    if num_frames < 1:
        raise InputError(f"num_frames must be at least 1, found {num_frames}")
    # Exception: parsers and decoders raise nearly anything, and may quote what they read.
    with quietly(), reading(path, "is a damaged or truncated DICOM file", (Exception,)) as file:
        return _read(file, num_frames, crop)


def read_region(path: str | Path) -> tuple[int, int, int, int] | None:
    """Where in its frames a DICOM file's ultrasound is: what `crop` cuts to.

    Returns:
      (top, bottom, left, right) in pixels, ends excluded: the union of the spatial regions that can
      be used. None where it states none.

    Raises:
      InputError: one line with the file and what is wrong; never a value of a patient or text tag.
    """
    with quietly(), reading(path, "is a damaged or truncated DICOM file", (Exception,)) as file:
        opened = read_header(file)
        return _union(_regions(opened.dataset, opened.header)[0])


def _read(file: BinaryIO, num_frames: int, crop: Crop) -> Loop:
    opened = read_header(file)
    dataset, header = opened.dataset, opened.header
    count = min(num_frames, header.frames)
    check_loop(header.frames, header.rows, header.columns, count, sequential=False)
    boxes, all_used = _regions(dataset, header)
    box, cropped = (_union(boxes), all_used) if crop else (None, False)
    if crop == "require" and not cropped:
        raise InputError(NOT_CROPPED)
    top, bottom, left, right = box or (0, header.rows, 0, header.columns)
    cut = np.s_[top:bottom, left:right]
    moved = [Box(b.top - top, b.bottom - top, b.left - left, b.right - left) for b in boxes]
    said = (cropped, _burned_in(dataset), tuple(moved) if all_used else ())
    seconds = _seconds(dataset, header.frames)
    if header.syntax in VIDEO:
        video = _video(opened, num_frames)
        own = sampled(video.seconds if seconds is None else seconds, video.frames, len(video[0]))
        return Loop(video.pixels[:, *cut], *said, own)
    colour = palette_to_rgb(header, dataset) if header.is_palette else np.copy
    with FrameDecoder(opened) as decode:
        # A copy each, so that a crop lets go of the whole frame.
        frames = np.stack([colour(decode(i)[cut]) for i in picks(header.frames, count)])
    if header.photometric in GREYS:
        frames = grey_to_rgb(frames, dataset, header)
    return Loop(frames, *said, sampled(seconds, header.frames, count))


def _seconds(dataset: Any, frames: int) -> float | None:
    """Seconds from one frame of a cine to the next, on average; None where the file doesn't say.

    What was measured comes before what is recommended for showing: FrameTime and FrameTimeVector
    in milliseconds, the vector's first being 0 (PS3.3 C.7.6.5), CineRate and
    RecommendedDisplayFrameRate in frames a second. A value that can't be says nothing.
    """
    vector = _numbers(dataset, "FrameTimeVector")
    steps = vector[1:] if len(vector) == frames and all(step >= 0 for step in vector) else []
    names = ("CineRate", "RecommendedDisplayFrameRate")
    rates = (_numbers(dataset, key, only=1) for key in names)
    found = [time / 1000 for time in _numbers(dataset, "FrameTime", only=1)]
    found += [sum(steps) / len(steps) / 1000] if steps else []
    found += [1 / rate for of_key in rates for rate in of_key if rate > 0]
    return next(filter(None, map(stated_seconds, found)), None)


def _numbers(dataset: Any, keyword: str, *, only: int | None = None) -> list[float]:
    """An element's numbers; none where it is missing, is not of numbers, or is not of `only` so
    many. Bytes, which a file may store in the place of text, are no numbers."""
    try:
        value = dataset.get(keyword)
        listed = [value] if isinstance(value, int | float | str) else list(value or [])
        found = [] if isinstance(value, bytes) else [float(one) for one in listed]
        return found if only in (None, len(found)) else []
    except Exception:  # as pydicom raises for what it can't read; the pixels don't depend on it
        return []


def _burned_in(dataset: Any) -> bool:
    return str(dataset.get("BurnedInAnnotation") or "").strip().upper() == "YES"


def _video(opened: Opened, num_frames: int) -> Decoded:
    header = opened.header
    data = CompressedFrames(opened).video()
    container = kind_of_bytes(data[:4096])
    if container not in VIDEOS:  # a bare stream, of the coding that the transfer syntax names
        container = VIDEO[UID(header.syntax)]
    video = decode_video(BytesIO(data), container, num_frames=num_frames, stated=header.frames)
    height, width = video.pixels.shape[1:3]
    if (height, width) != (header.rows, header.columns):
        raise InputError(
            f"its video has {height} x {width} pixels where its header says"
            f" {header.rows} x {header.columns}"
        )
    return video


@contextmanager
def quietly() -> Iterator[None]:
    """Keeps pydicom and its decoders from logging or warning: their messages quote values."""
    names = [n for n in logging.root.manager.loggerDict if n.split(".")[0] in _LOGGERS]
    with _process_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loggers = [logging.getLogger(name) for name in {*_LOGGERS, *names}]
        before = [logger.disabled for logger in loggers]
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger, disabled in zip(loggers, before, strict=True):
                logger.disabled = disabled


def _regions(dataset: Any, header: PixelHeader) -> tuple[list[Box], bool]:
    """The spatial regions that can be used, and whether there are any and that are all.

    A region that reaches far outside describes some other frame size (files that were scaled down
    keep such): cut to the frame it would show what it was to hide. One that reaches out by a few
    pixels is rounded or counted otherwise, and is cut to the frame.
    """
    boxes, unused = [], 0
    for item in dataset.get("SequenceOfUltrasoundRegions") or []:
        if (format := whole(item, "RegionSpatialFormat", -1)) in _OTHER_FORMATS:
            continue
        left, top, right, bottom = (
            whole(item, f"RegionLocation{edge}", -1)
            for edge in ("MinX0", "MinY0", "MaxX1", "MaxY1")
        )
        # Some makers state the last pixel, some the one after it; take both as given.
        fits = (
            0 <= start < min(end, side)
            and end <= side + max(_OUTSIDE_PIXELS, _OUTSIDE_SHARE * side)
            for start, end, side in ((left, right, header.columns), (top, bottom, header.rows))
        )
        if format in _SPATIAL_FORMATS and all(fits):
            ends = min(bottom + 1, header.rows), min(right + 1, header.columns)
            boxes.append(Box(top, ends[0], left, ends[1]))
        else:
            unused += 1
    return boxes, bool(boxes) and not unused


def _union(boxes: list[Box]) -> Box | None:
    if not boxes:
        return None
    tops, bottoms, lefts, rights = zip(*boxes, strict=True)
    return Box(min(tops), max(bottoms), min(lefts), max(rights))
