"""NIfTI and MetaImage files to RGB frames, within bounds.

Both hold numbers on a grid, the first axis fastest. The first axis runs along a row of the picture,
the second down its rows, and the third, where there is one, through the frames of a loop, be they
moments (as in CAMUS) or slices. Pixels stay in the order that they are stored in: the orientation
that a header states is not applied. Values go by `levels.to_levels`.
"""

import contextlib
import gzip
import math
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from echovlm_jax.errors import InputError
from echovlm_jax.processing.files import (
    ExtraMissing,
    file_kind,
    locate_beside,
    open_file,
    reading,
    shown,
)
from echovlm_jax.processing.levels import Say, check_loop, picks, silent, to_levels

_MAX_HEADER_BYTES = 2**16  # of a MetaImage
_MAX_NIFTI_HEADER = 2**24  # with its extensions
_DAMAGED = "is damaged or truncated"
_TYPES = {  # MetaImage's names of the types that are read
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2",
    "MET_INT": "i4", "MET_UINT": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip


class _Grid(NamedTuple):
    """Where the numbers of a volume lie in its file, and how."""

    width: int
    height: int
    frames: int
    channels: int  # 1, or 3: red, green and blue of a pixel together
    dtype: np.dtype
    offset: int  # bytes before the first number
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def frame_bytes(self) -> int:
        return self.width * self.height * self.channels * self.dtype.itemsize


def read_volume(path: str | Path, kind: str, *, num_frames: int, say: Say = silent) -> np.ndarray:
    """The sampled frames of a NIfTI or MetaImage file, uint8 RGB [T, H, W, 3].

    A MetaImage's numbers may lie in another file (ElementDataFile), of the same folder or below it:
    like the header itself it may not leave the folder that paths are relative to.

    Args:
      path: the file.
      kind: "nifti" or "metaimage".
      num_frames: a longer loop is sampled to this many frames.
      say: callback for one line with the range of scaled values.

    Raises:
      ExtraMissing: NIfTI is read by nibabel, which is not installed.
      InputError: one line with the file and what is wrong.
    """
    read = _read_nifti if kind == "nifti" else _read_meta
    damaged = (OSError, EOFError, zlib.error, ValueError, OverflowError)
    with reading(path, _DAMAGED, damaged) as file:
        frames = read(file, path, num_frames)
        return _to_rgb(frames, lambda line: say(f"{shown(path)}: {line}"))


def data_file(path: str | Path) -> Path | None:
    """The other file that a MetaImage's numbers lie in, for whoever digests what a picture is made
    of; None where there is none. Raises InputError as `read_volume`, less the file's name."""
    with open_file(path) as file:
        header, _ = _meta_header(file.read(_MAX_HEADER_BYTES))
    return _data_file(path, header)


def picture_files(path: Path) -> list[Path]:
    """Every file that a picture is made of: itself, and where it is a MetaImage its data file."""
    try:
        other = data_file(path) if file_kind(path) == "metaimage" else None
    except InputError:  # a picture that can't be used is refused where it is read
        other = None
    return [path] if other is None else [path, other]


def _to_rgb(frames: np.ndarray, say: Say) -> np.ndarray:
    levels = to_levels(frames, say, colour=frames.shape[-1] == 3)
    return levels if levels.shape[-1] == 3 else np.repeat(levels, 3, axis=-1)


def _frames(file: Any, grid: _Grid, num_frames: int) -> np.ndarray:
    """The sampled frames [T, H, W, 1 or 3]; the file is read forward only, as gzip has to be."""
    place, frames = 0, []
    _skip(file, grid.offset)
    for pick in picks(grid.frames, num_frames):
        _skip(file, (pick - place) * grid.frame_bytes)
        data = file.read(grid.frame_bytes)
        if len(data) != grid.frame_bytes:
            raise InputError(f"{_DAMAGED}: it claims {grid.frames} frames and ends in {pick + 1}")
        place = pick + 1
        values = np.frombuffer(data, grid.dtype).reshape(grid.height, grid.width, grid.channels)
        if (grid.slope, grid.intercept) != (1.0, 0.0):
            values = values * grid.slope + grid.intercept
        frames.append(values.astype(values.dtype.newbyteorder("=")))
    # To the end: a file that is cut short, or holds more, says so whichever frames are taken.
    _skip(file, (grid.frames - place) * grid.frame_bytes)
    if file.read(1):
        raise InputError("holds more values than its header says; save it again")
    return np.stack(frames)


def _skip(file: Any, count: int) -> None:
    while count > 0:
        data = file.read(min(count, 2**20))
        if not data:
            raise InputError(f"{_DAMAGED}: it ends before its last frame")
        count -= len(data)


def _check(grid: _Grid, num_frames: int) -> _Grid:
    check_loop(grid.frames, grid.height, grid.width, num_frames)
    if not (math.isfinite(grid.slope) and math.isfinite(grid.intercept)):
        raise InputError("its scaling is no finite number")
    return grid


def _plane(sizes: list[int]) -> tuple[int, int, int]:
    """Width, height and frames of a grid; axes of one step say nothing."""
    if len(sizes) < 2 or min(sizes) < 1:
        raise InputError(f"its axes {sizes} make no picture")
    width, height, *rest = sizes
    loops = [size for size in rest if size > 1]
    if len(loops) > 1:
        raise InputError(
            f"has {' x '.join(map(str, sizes))} values: volumes in time are not read; save the"
            " plane that is meant"
        )
    return width, height, loops[0] if loops else 1


def _read_nifti(file: BinaryIO, path: str | Path, num_frames: int) -> np.ndarray:
    try:
        from nibabel.nifti1 import Nifti1Header
        from nibabel.nifti2 import Nifti2Header
        from nibabel.spatialimages import HeaderDataError
        from nibabel.wrapstruct import WrapStructError
    except ImportError:
        raise ExtraMissing("is NIfTI", "nifti") from None
    zipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    with gzip.GzipFile(fileobj=file) if zipped else contextlib.nullcontext(file) as opened:
        head = opened.read(540)
        if head[344:347] == b"ni1" or head[4:7] == b"ni2":
            raise InputError("is the header of a NIfTI pair; save it as one .nii or .nii.gz file")
        second = head[4:7] == b"n+2"
        kind: Any = Nifti2Header if second else Nifti1Header
        size = 540 if second else 348
        try:
            header = kind(head[:size], check=False)
            slope, intercept = header.get_slope_inter()
            grid = _nifti_grid(header, slope, intercept)
        except (HeaderDataError, WrapStructError, KeyError):  # KeyError: of an unknown type
            raise InputError("its NIfTI header is damaged") from None
        opened.seek(0)
        return _frames(opened, _check(grid, num_frames), num_frames)


def _nifti_grid(header: Any, slope: float | None, intercept: float | None) -> _Grid:
    width, height, frames = _plane([int(size) for size in header.get_data_shape()])
    dtype, channels = header.get_data_dtype(), 1
    if dtype.names == ("R", "G", "B"):
        dtype, channels = np.dtype("u1"), 3
    if dtype.names or dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise InputError(
            f"its values are of the kind {header.get_value_label('datatype')}, which"
            " is not read; save it as whole numbers or floats"
        )
    offset = int(header.get_data_offset())
    if not 0 <= offset <= _MAX_NIFTI_HEADER:
        raise InputError("its NIfTI header is damaged")
    return _Grid(
        *(width, height, frames, channels, dtype, offset),
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
    )


def _read_meta(file: BinaryIO, path: str | Path, num_frames: int) -> np.ndarray:
    header, end = _meta_header(file.read(_MAX_HEADER_BYTES))
    grid = _check(_meta_grid(header), num_frames)
    beside = _data_file(path, header)
    if beside is None:
        return _meta_frames(file, end, grid, header, num_frames)
    try:
        data = open_file(beside)
    except InputError as error:
        raise InputError(f"its ElementDataFile {error}") from None
    with data:
        return _meta_frames(data, 0, grid, header, num_frames)


def _data_file(path: str | Path, header: dict[str, str]) -> Path | None:
    """Where a MetaImage's numbers lie, if not behind its header."""
    name = header["elementdatafile"]
    if name.upper() == "LOCAL":
        return None
    if name.upper().startswith("LIST") or "%" in name:
        raise InputError("its frames are files of their own; save them as one file")
    try:
        return locate_beside(path, name)
    except InputError as error:
        raise InputError(f"its ElementDataFile {error}") from None


def _meta_header(data: bytes) -> tuple[dict[str, str], int]:
    """The header's values by key, in small letters, and where it ends: behind ElementDataFile."""
    header: dict[str, str] = {}
    at = 0
    while at < len(data):
        end = data.find(b"\n", at)
        end = len(data) if end < 0 else end
        key, equals, value = data[at:end].decode("utf-8", "replace").partition("=")
        key = key.strip().casefold()
        if not equals and key:
            raise InputError("its MetaImage header has a line that is no KEY = VALUE")
        if key in header:
            raise InputError(f"its MetaImage header has {shown(key)} twice; keep one of the two")
        header[key] = value.strip()
        at = end + 1
        if key == "elementdatafile":
            return header, at
    raise InputError("its MetaImage header has no ElementDataFile")


def _meta_grid(header: dict[str, str]) -> _Grid:
    sizes = [_whole(word, "DimSize") for word in header.get("dimsize", "").split()]
    if len(sizes) != _whole(header.get("ndims", ""), "NDims"):
        raise InputError("NDims and DimSize disagree in its MetaImage header")
    width, height, frames = _plane(sizes)
    kind = header.get("elementtype", "")
    if kind.endswith("_ARRAY"):
        kind = kind.removesuffix("_ARRAY")
    if kind not in _TYPES:
        raise InputError(f"its ElementType is none of {', '.join(_TYPES)}")
    channels = _whole(header.get("elementnumberofchannels", "1"), "ElementNumberOfChannels")
    if channels not in (1, 3):
        raise InputError(f"{channels} values a pixel are not read; save it as grey or as RGB")
    order = header.get("binarydatabyteordermsb", header.get("elementbyteordermsb", "False"))
    if not _flag(header.get("binarydata", "True"), "BinaryData"):
        raise InputError("its values are written as text; save it with BinaryData = True")
    if header.get("headersize", "0") not in ("0", "-1"):
        raise InputError("its HeaderSize is not 0; save it without")
    dtype = np.dtype((">" if _flag(order, "BinaryDataByteOrderMSB") else "<") + _TYPES[kind])
    return _Grid(width, height, frames, channels, dtype, 0)


def _meta_frames(
    file: BinaryIO, offset: int, grid: _Grid, header: dict[str, str], num_frames: int
) -> np.ndarray:
    file.seek(offset)
    inflated = _flag(header.get("compresseddata", "False"), "CompressedData")
    return _frames(_Inflated(file) if inflated else file, grid, num_frames)


class _Inflated:
    """What a zlib stream holds, read forward, never more than is asked for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._inflate, self._rest = file, zlib.decompressobj(), b""

    def read(self, count: int) -> bytes:
        out: list[bytes] = []
        while count and not self._inflate.eof:
            data = self._rest or self._file.read(2**16)
            piece = self._inflate.decompress(data, count)  # of no data: what it held back
            self._rest = self._inflate.unconsumed_tail
            if not data and not piece:
                break
            out.append(piece)
            count -= len(piece)
        return b"".join(out)


def _whole(text: str, key: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InputError(f"{key} is no whole number in its MetaImage header")
    return int(text)


def _flag(text: str, key: str) -> bool:
    found = {"true": True, "1": True, "false": False, "0": False}.get(text.casefold())
    if found is None:
        raise InputError(f"{key} must be True or False in its MetaImage header")
    return found
