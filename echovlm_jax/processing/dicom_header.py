"""A DICOM file's header: what it says about its pixels, and where they begin.

pydicom parses it. Only the elements that describe pixels are asked for, so names, dates and free
text are never kept, and a long private sequence is walked past instead of read.
"""

import os
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

from pydicom import uid
from pydicom.datadict import tag_for_keyword
from pydicom.filereader import read_dataset, read_partial

from echovlm_jax.errors import InputError
from echovlm_jax.processing.files import is_dicom, with_preamble

MAX_HEADER_BYTES = 4 * 2**20  # read (not skipped) before the pixels; palettes need 400 kB at most
MAX_HEADER_READS = 2**16  # each element or item read costs pydicom a kilobyte, however short it is
MAX_SKIPPED = 2**22  # elements and items of private sequences
MAX_INFLATED_BYTES = 2**28  # a deflated data set lies in memory as a whole
UNDEFINED = 0xFFFFFFFF
NATIVE = {uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian}

_PALETTES = [
    f"{colour}PaletteColorLookupTable{part}"
    for colour in ("Red", "Green", "Blue")
    for part in ("Descriptor", "Data")
]
_TAGS = [
    tag_for_keyword(keyword)
    for keyword in (
        *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
        *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PlanarConfiguration"),
        *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "RescaleSlope"),
        *("RescaleIntercept", "ModalityLUTSequence", "SequenceOfUltrasoundRegions"),
        *("BurnedInAnnotation", *_PALETTES),
        *("FrameTime", "FrameTimeVector", "CineRate", "RecommendedDisplayFrameRate"),
    )
]
_COLOURS = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"}
GREYS = {"MONOCHROME1", "MONOCHROME2"}
_LENGTH_OF_FOUR = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR"}
_LENGTH_OF_FOUR |= {b"UT", b"UV"}  # of four bytes, behind two that say nothing (PS3.5 7.1.2)


@dataclass(frozen=True)
class PixelHeader:
    """What a DICOM header says about its pixels, checked."""

    syntax: str
    rows: int
    columns: int
    frames: int
    samples: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    planar: int
    photometric: str
    little_endian: bool

    @property
    def frame_bytes(self) -> int:
        """Bytes of one uncompressed frame."""
        if self.photometric == "YBR_FULL_422" and self.syntax in NATIVE:
            return self.rows * self.columns * 2  # colour kept for every second column only
        return self.rows * self.columns * self.samples * self.bits_allocated // 8

    @property
    def is_palette(self) -> bool:
        return self.photometric == "PALETTE COLOR"


class Opened(NamedTuple):
    dataset: Any  # pydicom's, with the elements of _TAGS that are there
    header: PixelHeader
    file: BinaryIO  # the file itself, or a deflated one's content
    start: int  # of the pixels' value in `file`
    length: int  # of it, or UNDEFINED where it is in fragments
    vr: str | None  # None: implicit


def read_header(file: BinaryIO) -> Opened:
    """Parses a DICOM file up to its pixels, with or without preamble and file meta information.

    Raises:
      InputError: what is wrong, without the file's name; no value of a text is quoted.
    """
    if not is_dicom(file.read(132)):
        raise InputError("is not a DICOM file, whatever its name says")
    file = with_preamble(file)
    found = _PixelElement(file)
    try:
        dataset = read_partial(
            found.file,  # type: ignore[arg-type] - it has the three methods that are used
            found,
            force=True,
            specific_tags=_TAGS,  # type: ignore[arg-type]
        )
        syntax = str(dataset.file_meta.get("TransferSyntaxUID", "") or "")
        little = dataset.original_encoding[1] is not False
    except _Deflated as deflated:
        file = BytesIO(_inflate(file, deflated.start))
        found = _PixelElement(file)
        dataset = read_dataset(found.file, False, True, stop_when=found, specific_tags=_TAGS)  # type: ignore[arg-type]
        syntax, little = str(uid.ExplicitVRLittleEndian), True
    if found.start is None:
        raise InputError(found.strange or "holds no pixel data")
    if not syntax:
        if found.length == UNDEFINED:
            raise InputError("its pixels are compressed and it names no transfer syntax")
        syntax = str(uid.ExplicitVRLittleEndian)
    if syntax in NATIVE:  # whatever the file meta information says: the data set was read so
        implicit = uid.ImplicitVRLittleEndian if not found.explicit else uid.ExplicitVRLittleEndian
        syntax = str(implicit if little else uid.ExplicitVRBigEndian)
    header = _pixel_header(dataset, syntax, little)
    return Opened(dataset, header, file, found.start, found.length, found.vr)


class _PixelElement:
    """What tells pydicom where to stop; remembers what it was told of the pixels' element.

    On the way it walks past elements of undefined length that nobody wants. They may hold
    megabytes, which pydicom would read and keep: it is left their end alone to read.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = _BoundedReader(file)
        self.explicit = False  # whether elements state their VR
        self.start: int | None = None
        self.length, self.vr = 0, None
        self.strange, self._last = "", 0  # why no pixels are found, it may be; the last tag
        self._raw, here = file, file.tell()
        self._end = file.seek(0, os.SEEK_END)
        file.seek(here)
        self._wanted = set(_TAGS)

    def __call__(self, tag: int, vr: str | None, length: int) -> bool:
        stated = vr is not None and len(vr) == 2 and "AA" <= vr <= "ZZ"
        if self.strange and tag <= self._last:  # they ascend
            raise InputError(self.strange)
        if self.explicit and not stated and not self.strange:
            # pydicom takes its VR and length for one length, as an implicit element's.
            name = f"its element ({tag >> 16:04X},{tag & 0xFFFF:04X})"
            self.strange = f"{name} has no valid VR, so that what follows it can't be found"
        self.explicit, self._last = self.explicit or stated, tag
        if tag >= 0x7FE00008:
            if tag == 0x7FE00010:
                self.start, self.length, self.vr = self._raw.tell(), length, vr
            return tag in (0x7FE00008, 0x7FE00009, 0x7FE00010)
        if length != UNDEFINED and length > self._end - self._raw.tell():
            raise InputError(self.strange or "is truncated within its header")
        if length == UNDEFINED and tag not in self._wanted:
            _skip_items(self._raw, implicit=not self.explicit)
        return False


class _Deflated(Exception):
    """A deflated data set begins at `start`."""

    def __init__(self, start: int) -> None:
        self.start = start


class _BoundedReader:
    """The file as pydicom sees it while it parses the header: so many bytes and no more."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._bytes, self._reads = MAX_HEADER_BYTES, MAX_HEADER_READS

    def read(self, size: int = -1) -> bytes:
        if size is None or size < 0:  # only a deflated data set is read to its end
            raise _Deflated(self._file.tell())
        if size > self._bytes or not self._reads:
            raise InputError(f"its header holds more than {MAX_HEADER_BYTES} bytes or is damaged")
        data = self._file.read(size)
        self._bytes -= len(data)
        self._reads -= 1
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _inflate(file: BinaryIO, start: int) -> bytes:
    """A deflated data set (PS3.5 A.5), or InputError where it is damaged or too large."""
    file.seek(start)
    inflater, parts, size = zlib.decompressobj(-zlib.MAX_WBITS), [], 0
    try:
        while (packed := file.read(2**20)) and not inflater.eof:
            while packed:
                parts.append(inflater.decompress(packed, 2**24))
                packed, size = inflater.unconsumed_tail, size + len(parts[-1])
                if size > MAX_INFLATED_BYTES:
                    raise InputError(f"inflates to more than {MAX_INFLATED_BYTES} bytes")
    except zlib.error:
        raise InputError("its deflated data set is damaged") from None
    if not inflater.eof:
        raise InputError("its deflated data set is truncated")
    return b"".join(parts)


def _skip_items(file: BinaryIO, *, implicit: bool) -> None:
    """Walks from the first item of an element of undefined length to the delimiter that ends it.

    Sequences nest, and an item may state VRs or not whatever is around it (PS3.5 6.2.2), but inside
    an implicit data set nothing does. Only heads are read.
    """
    tag = file.read(4)
    file.seek(-len(tag), os.SEEK_CUR)
    end = ">" if tag[:2] == b"\xff\xfe" else "<"
    inside = [("items", implicit)]  # of what is open: its kind, and whether it is implicit
    for _ in range(MAX_SKIPPED):
        kind, implicit = inside[-1]
        head = file.read(8)
        if len(head) < 8:
            raise InputError("is truncated within its header")
        group, element, length = struct.unpack(end + "HHL", head)
        if (group, element) == (0xFFFE, 0xE0DD if kind == "items" else 0xE00D):
            inside.pop()
            if not inside:
                file.seek(-8, os.SEEK_CUR)
                return
            continue
        if kind == "items":
            if (group, element) != (0xFFFE, 0xE000):
                raise InputError("a sequence in its header is damaged")
            if length == UNDEFINED:
                first = file.read(6)
                file.seek(-len(first), os.SEEK_CUR)
                inside.append(("elements", implicit or not b"AA" <= first[4:6] <= b"ZZ"))
                continue
        else:
            vr = head[4:6]
            if not implicit and b"AA" <= vr <= b"ZZ":
                (length,) = struct.unpack(end + "H", head[6:])
                if vr in _LENGTH_OF_FOUR:
                    (length,) = struct.unpack(end + "L", file.read(4))
            if length == UNDEFINED:
                inside.append(("items", implicit))
                continue
        file.seek(length, os.SEEK_CUR)
    raise InputError(f"a sequence in its header holds more than {MAX_SKIPPED} elements")


def _pixel_header(dataset: Any, syntax: str, little: bool) -> PixelHeader:
    samples = whole(dataset, "SamplesPerPixel")
    allocated = whole(dataset, "BitsAllocated")
    stored = whole(dataset, "BitsStored")
    photometric = dataset.get("PhotometricInterpretation")
    known = _COLOURS | GREYS | {"PALETTE COLOR"}
    if photometric not in known:
        raise InputError(f"its photometric interpretation is none of {', '.join(sorted(known))}")
    colour = photometric in _COLOURS
    if samples != (3 if colour else 1):
        raise InputError(f"{samples} samples a pixel don't fit its photometric interpretation")
    header = PixelHeader(
        syntax=syntax,
        rows=whole(dataset, "Rows"),
        columns=whole(dataset, "Columns"),
        frames=whole(dataset, "NumberOfFrames", 1) or 1,  # some writers state 0 for a still
        samples=samples,
        bits_allocated=allocated,
        bits_stored=stored,
        signed=whole(dataset, "PixelRepresentation") == 1,
        planar=whole(dataset, "PlanarConfiguration") if samples > 1 else 0,
        photometric=str(photometric),
        little_endian=little,
    )
    if allocated not in ((8,) if colour else (8, 16)):
        raise InputError(f"{allocated} bits allocated a sample are not supported")
    if not 1 <= stored <= allocated or header.planar not in (0, 1):
        raise InputError("its bits stored or planar configuration are invalid")
    if (high := whole(dataset, "HighBit", stored - 1)) != stored - 1:
        raise InputError(f"its HighBit {high} does not fit its BitsStored {stored}")
    if whole(dataset, "PixelRepresentation") not in (0, 1):
        raise InputError("its pixel representation is neither 0 nor 1")
    if colour and (header.signed or stored != 8):
        raise InputError("its colours have a sign or less than 8 bits stored")
    if photometric == "YBR_FULL_422" and syntax in NATIVE and header.columns % 2:
        raise InputError("its YBR_FULL_422 pixels have an odd number of columns")
    return header


def whole(dataset: Any, keyword: str, default: int | None = None) -> int:
    """An element as a whole number; an empty one counts as missing. Raises InputError."""
    value = dataset.get(keyword)
    if value is None or value == "":
        if default is None:
            raise InputError(f"the element {keyword} is missing, so it holds no image")
        return default
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"the element {keyword} is not a whole number") from None
