"""DICOM files to RGB frames, within bounded memory and without patient data in any message.

Only the elements that describe pixels are asked for, so names, dates and free text are never
kept. Every size a header or a codestream claims is checked before anything of that size is made.
Frames are read and decoded one at a time, and only the sampled ones.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from echovlm_jax.errors import InputError
from echovlm_jax.processing.dicom_frames import FrameDecoder, FrameReader, PixelHeader
from echovlm_jax.processing.files import open_file, shown

MAX_FRAME_PIXELS = 2**24  # 4096 x 4096, several times any ultrasound frame
MAX_SAMPLED_PIXELS = 2**26  # all sampled frames of one loop together: 200 MB as RGB
MAX_FRAMES = 2**17  # more than half an hour at 60 frames a second
MAX_HEADER_BYTES = 4 * 2**20  # read (not skipped) before the pixels; palettes need 400 kB at most

_TAGS = [
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation",
    "BitsAllocated", "BitsStored", "PixelRepresentation", "PlanarConfiguration", "WindowCenter",
    "WindowWidth", "RescaleSlope", "RescaleIntercept", "SequenceOfUltrasoundRegions",
    "RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData",
]  # fmt: skip
_COLOURS = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"}
_GREYS = {"MONOCHROME1", "MONOCHROME2"}
# Region Spatial Format (PS3.3 C.8.5.5.1.1): 2-D, M-mode and spectral Doppler are images;
# 4 waveform and 5 graphics are not.
_SPATIAL_FORMATS = {1, 2, 3}

_LOGGERS = ("pydicom", "pylibjpeg", "openjpeg", "PIL")
_process_lock = threading.RLock()  # warnings and loggers belong to the process


def read_dicom(path: str | Path, *, num_frames: int = 16, crop: bool = False) -> np.ndarray:
    """Reads a DICOM file's frames.

    Args:
      path: a DICOM Part 10 file: RGB, YBR, PALETTE COLOR or MONOCHROME1/2; uncompressed, RLE,
        JPEG, JPEG-LS or JPEG 2000.
      num_frames: a longer loop is sampled to this many frames, evenly from the first on.
      crop: cut to the union of the spatial ultrasound regions that lie inside the frame; a file
        that states none stays whole.

    Returns:
      uint8 [T, H, W, 3] RGB.

    Raises:
      InputError: one line with the file and what is wrong; never a value of a patient or text tag.
    """
    if num_frames < 1:
        raise InputError(f"num_frames must be at least 1, found {num_frames}")
    try:
        with _quietly(), open_file(path) as file:
            try:
                return _read(file, num_frames, crop)
            except InputError as error:
                raise InputError(f"{shown(path)}: {error}") from None
    except InputError:
        raise
    except InvalidDicomError:
        raise InputError(f"{shown(path)}: is not a DICOM file, whatever its name says") from None
    except OSError as error:
        raise InputError(f"{shown(path)}: can't be read ({error.strerror or 'I/O'})") from None
    except Exception:  # parsers and decoders raise nearly anything, and may quote what they read
        raise InputError(f"{shown(path)}: is a damaged or truncated DICOM file") from None


def _read(file: BinaryIO, num_frames: int, crop: bool) -> np.ndarray:
    guarded = _BoundedReader(file)
    dataset = pydicom.dcmread(guarded, stop_before_pixels=True, specific_tags=_TAGS)  # type: ignore[arg-type]
    header = _pixel_header(dataset)
    _refuse_absurd(header, min(num_frames, header.frames))
    reader = FrameReader(file, guarded.tell(), header)
    box = _region(dataset, header) if crop else None
    count = min(num_frames, header.frames)
    frames = []
    with FrameDecoder(header) as decode:
        for i in range(count):
            frame = decode(reader.frame(i * header.frames // count))
            if box is not None:
                top, bottom, left, right = box
                frame = frame[top:bottom, left:right]
            # A copy, so that a crop lets go of the whole frame.
            frames.append(_palette(frame, dataset) if header.is_palette else frame.copy())
    stacked = np.stack(frames)
    return _grey_to_rgb(stacked, dataset, header) if header.photometric in _GREYS else stacked


class _BoundedReader:
    """The file as pydicom sees it while it parses the header: so many bytes and no more."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = MAX_HEADER_BYTES

    def read(self, size: int = -1) -> bytes:
        if size is None or size < 0:  # only a deflated data set is read to its end
            raise InputError("deflated DICOM data sets are not supported; save it uncompressed")
        if size > self._left:
            raise InputError(f"its header holds more than {MAX_HEADER_BYTES} bytes or is damaged")
        data = self._file.read(size)
        self._left -= len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


@contextmanager
def _quietly() -> Iterator[None]:
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


def _pixel_header(dataset: Any) -> PixelHeader:
    meta = dataset.file_meta
    syntax = str(meta.get("TransferSyntaxUID", "") or "")
    if not syntax:
        raise InputError("its file meta information names no transfer syntax")
    samples = _whole(dataset, "SamplesPerPixel", 1)
    allocated = _whole(dataset, "BitsAllocated", None)
    photometric = dataset.get("PhotometricInterpretation")
    known = _COLOURS | _GREYS | {"PALETTE COLOR"}
    if photometric not in known:
        raise InputError(f"its photometric interpretation is none of {', '.join(sorted(known))}")
    header = PixelHeader(
        syntax=syntax,
        rows=_whole(dataset, "Rows", None),
        columns=_whole(dataset, "Columns", None),
        frames=_whole(dataset, "NumberOfFrames", 1),
        samples=samples,
        bits_allocated=allocated,
        bits_stored=_whole(dataset, "BitsStored", allocated),
        signed=_whole(dataset, "PixelRepresentation", 0) == 1,
        planar=_whole(dataset, "PlanarConfiguration", 0),
        photometric=str(photometric),
        little_endian=syntax != ExplicitVRBigEndian,
        implicit=syntax == ImplicitVRLittleEndian,
    )
    colour = photometric in _COLOURS
    if samples != (3 if colour else 1):
        raise InputError(f"{samples} samples a pixel don't fit its photometric interpretation")
    if allocated not in ((8,) if colour else (8, 16)):
        raise InputError(f"{allocated} bits allocated a sample are not supported")
    if not 1 <= header.bits_stored <= allocated or header.planar not in (0, 1):
        raise InputError("its bits stored or planar configuration are invalid")
    return header


def _whole(dataset: Any, keyword: str, default: int | None) -> int:
    value = dataset.get(keyword)
    if value is None or value == "":
        if default is None:
            raise InputError(f"the element {keyword} is missing, so it holds no image")
        return default
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"the element {keyword} is not a whole number") from None


def _refuse_absurd(header: PixelHeader, count: int) -> None:
    rows, columns, frames = header.rows, header.columns, header.frames
    if rows < 1 or columns < 1 or frames < 1:
        raise InputError(f"claims {rows} rows, {columns} columns and {frames} frames")
    if rows * columns > MAX_FRAME_PIXELS:
        raise InputError(
            f"{rows} x {columns} pixels a frame is over the limit of {MAX_FRAME_PIXELS} pixels"
        )
    if frames > MAX_FRAMES:
        raise InputError(f"{frames} frames is over the limit of {MAX_FRAMES}")
    if rows * columns * count > MAX_SAMPLED_PIXELS:
        raise InputError(
            f"{count} frames of {rows} x {columns} pixels are over the limit of"
            f" {MAX_SAMPLED_PIXELS} pixels; sample fewer frames"
        )


def _region(dataset: Any, header: PixelHeader) -> tuple[int, int, int, int] | None:
    """The union of the spatial regions: (top, bottom, left, right), ends excluded, or None.

    A region that reaches outside the frame describes some other frame size (files that were
    scaled down keep such): it is passed over rather than cut to something meaningless.
    """
    boxes = []
    for item in dataset.get("SequenceOfUltrasoundRegions") or []:
        if item.get("RegionSpatialFormat") not in _SPATIAL_FORMATS:
            continue
        left, top, right, bottom = (
            _whole(item, f"RegionLocation{edge}", -1)
            for edge in ("MinX0", "MinY0", "MaxX1", "MaxY1")
        )
        # Some makers state the last pixel, some the one after it; take both as given.
        if 0 <= left < right <= header.columns and 0 <= top < bottom <= header.rows:
            boxes.append((top, min(bottom + 1, header.rows), left, min(right + 1, header.columns)))
    if not boxes:
        return None
    tops, bottoms, lefts, rights = zip(*boxes, strict=True)
    return min(tops), max(bottoms), min(lefts), max(rights)


def _palette(frame: np.ndarray, dataset: Any) -> np.ndarray:
    """Indices [H, W] through the red, green and blue tables: uint8 [H, W, 3]."""
    if "RedPaletteColorLookupTableData" not in dataset:
        raise InputError("is PALETTE COLOR without plain lookup tables")
    rgb = apply_color_lut(frame, dataset)
    return rgb if rgb.dtype == np.uint8 else (rgb >> 8).astype(np.uint8)


def _grey_to_rgb(frames: np.ndarray, dataset: Any, header: PixelHeader) -> np.ndarray:
    """Stored values [T, H, W] to displayed grey, as uint8 [T, H, W, 3].

    The window of the header where there is one (linear, PS3.3 C.11.2.1.2); else 8-bit data as it
    is; else the sampled frames' own range, one for all frames so that a loop doesn't flicker.
    """
    slope, intercept = (
        _number(dataset, "RescaleSlope", 1.0),
        _number(dataset, "RescaleIntercept", 0.0),
    )
    centre, width = _number(dataset, "WindowCenter", None), _number(dataset, "WindowWidth", None)
    if centre is not None and width is not None and width >= 1:
        low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    elif header.bits_stored <= 8 and not header.signed:
        low, high, slope, intercept = 0.0, float(2**header.bits_stored - 1), 1.0, 0.0
    else:
        ends = [float(end) * slope + intercept for end in (frames.min(), frames.max())]
        low, high = min(ends), max(ends)
    stored = np.arange(int(frames.min()), int(frames.max()) + 1)
    shown_as = (stored * slope + intercept - low) / max(high - low, 1e-9) * 255
    table = np.clip(np.round(shown_as), 0, 255).astype(np.uint8)
    if header.photometric == "MONOCHROME1":  # its lowest value is white
        table = 255 - table
    grey = table[frames.astype(np.int32) - int(stored[0])]
    return np.repeat(grey[..., None], 3, axis=-1)


def _number(dataset: Any, keyword: str, default: float | None) -> Any:
    value = dataset.get(keyword)
    if isinstance(value, list | MultiValue):
        value = value[0] if value else None
    if value is None or value == "":
        return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"the element {keyword} is not a number") from None
    if not np.isfinite(number):
        raise InputError(f"the element {keyword} is not a finite number")
    return number
