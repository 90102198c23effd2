"""What a compressed frame claims of itself, compared with the DICOM header before it is decoded.

A decoder allocates what a codestream's head says, fills up with grey what is cut off, and says
nothing about a second image behind the first.
"""

import itertools
import re
import struct
from typing import NamedTuple

from pydicom import uid

from echovlm_jax.errors import InputError
from echovlm_jax.processing.dicom_header import PixelHeader

MAX_TILES = 4096  # of a JPEG 2000 frame; each costs the decoder kilobytes before any pixel
J2K = {uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K}
_JPEG_LS = {uid.JPEGLSLossless, uid.JPEGLSNearLossless}
# The start-of-frame markers that each syntax may hold (ISO 10918-1, table B.1).
_START_OF_FRAME = {
    uid.JPEGBaseline8Bit: {0xC0, 0xC1},
    uid.JPEGExtended12Bit: {0xC0, 0xC1},
    uid.JPEGLossless: {0xC3},
    uid.JPEGLosslessSV1: {0xC3},
    uid.JPEGLSLossless: {0xF7},
    uid.JPEGLSNearLossless: {0xF7},
}
# What ends a scan: a marker that is neither stuffing nor a restart. JPEG-LS stuffs a bit, not a
# byte (ISO 14495-1 9.1), so that there whatever is below 0x80 behind 0xff is data.
_AFTER_SCAN = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
_AFTER_LS_SCAN = re.compile(rb"\xff+[\x80-\xcf\xd8-\xfe]")
_PADDING = b"\0\xff"


class _Claim(NamedTuple):
    rows: int
    columns: int
    samples: int
    bits: int
    mixed: bool = False  # coded as if brightness and colour, without a word that they are


def check_codestream(data: bytes, header: PixelHeader) -> None:
    """Raises InputError where a compressed frame and the header disagree, or it is cut off."""
    if header.syntax == uid.RLELossless:
        return _check_rle(data, header)
    if header.syntax == uid.JPEGExtended12Bit and header.bits_stored != 8:
        raise InputError("12-bit JPEG Extended is not supported; save it uncompressed")
    claim = _j2k_claim(data) if header.syntax in J2K else _jpeg_claim(data, header.syntax)
    if claim is None:
        raise InputError("a compressed frame of it is damaged: its codestream has no valid head")
    rows, columns, samples, bits, mixed = claim
    if (rows, columns, samples) != (header.rows, header.columns, header.samples):
        raise InputError(
            f"a compressed frame claims {rows} x {columns} x {samples} samples where the header"
            f" says {header.rows} x {header.columns} x {header.samples}"
        )
    if bits > header.bits_allocated:
        raise InputError(
            f"a compressed frame claims {bits} bits a sample where the header allocates"
            f" {header.bits_allocated}"
        )
    if mixed and header.photometric == "RGB":
        raise InputError("its header says RGB, a compressed frame has fewer samples of two colours")


def _check_rle(data: bytes, header: PixelHeader) -> None:
    """Each segment must unpack to one byte of every pixel (PS3.5 annex G), but for its padding."""
    count, *offsets = struct.unpack("<16L", data[:64].ljust(64, b"\0"))
    needed = header.samples * header.bits_allocated // 8
    if count != needed or len(data) < 64:
        raise InputError(f"a compressed frame of it has {count} RLE segments in place of {needed}")
    ends = [*offsets[1:count], len(data)]
    if offsets[0] != 64 or any(a > b for a, b in itertools.pairwise([*offsets[:count], len(data)])):
        raise InputError("a compressed frame of it is damaged: its RLE segments overlap")
    for start, end in zip(offsets, ends, strict=False):
        size = _rle_size(data[start:end])
        pixels = header.rows * header.columns
        if size < pixels:
            raise InputError("a compressed frame of it unpacks to less than the frame's size")
        if size > pixels + 2:
            raise InputError("a compressed frame of it unpacks to more than the frame's size")


def _rle_size(segment: bytes) -> int:
    """Bytes that an RLE segment unpacks to: two bytes can stand for 128."""
    at = size = 0
    while at < len(segment):
        code = segment[at]
        if code < 128:
            size += min(code + 1, len(segment) - at - 1)
            at += code + 2
        else:
            size += (257 - code) % 129 if at + 1 < len(segment) else 0
            at += 2 - (code == 128)
    return size


def _j2k_claim(data: bytes) -> _Claim | None:
    """A JPEG 2000 codestream's SIZ segment (ISO 15444-1 A.5.1), all its tile-parts being there."""
    start = 0 if data[:4] == b"\xff\x4f\xff\x51" else data.find(b"\xff\x4f\xff\x51", 0, 4096)
    siz = data[start : start + 43] if start >= 0 else b""
    if len(siz) < 43:
        return None
    right, bottom, left, top, tile_w, tile_h, tile_x, tile_y = struct.unpack(">8L", siz[8:40])
    (components,) = struct.unpack(">H", siz[40:42])
    if right <= left or bottom <= top or not tile_w or not tile_h:
        return None
    tiles = -(-(right - min(tile_x, left)) // tile_w) * -(-(bottom - min(tile_y, top)) // tile_h)
    if tiles > MAX_TILES:
        raise InputError(f"a compressed frame of it claims {tiles} tiles, over {MAX_TILES}")
    end = _j2k_end(data, start + 2)
    if end is None:
        raise InputError("a compressed frame of it is cut off")
    if data.find(b"\xff\x4f\xff\x51", end) >= 0:
        raise InputError("a compressed frame of it holds more than one image")
    return _Claim(bottom - top, right - left, components, (siz[42] & 127) + 1)


def _j2k_end(data: bytes, at: int) -> int | None:
    """Where a codestream ends, by its markers from `at` on; None where it is cut off."""
    while at + 4 <= len(data):
        marker, length = struct.unpack(">HH", data[at : at + 4])
        if marker == 0xFFD9:
            return at + 2
        if marker != 0xFF90:  # not the start of a tile-part: a segment of the main head
            at += 2 + length
            continue
        if at + 10 > len(data):
            return None
        (part,) = struct.unpack(">L", data[at + 6 : at + 10])
        if part == 0:  # the last one: as long as the data
            end = data.rfind(b"\xff\xd9")
            return end + 2 if end > at else None
        if part < 14:
            return None
        at += part
    # Some writers leave the end marker out.
    return at if at <= len(data) and not data[at:].strip(b"\xff\xd9\0") else None


def _jpeg_claim(data: bytes, syntax: str) -> _Claim | None:
    """The one frame header in a JPEG or JPEG-LS stream, all of which is there."""
    if data[:2] != b"\xff\xd8":
        return None
    scan = _AFTER_LS_SCAN if syntax in _JPEG_LS else _AFTER_SCAN
    at, found, named = 2, None, False
    while at + 2 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xD9:
            if data[at + 2 :].strip(_PADDING):
                raise InputError("a compressed frame of it goes on after the end of its image")
            return found and found._replace(mixed=found.mixed and not named)
        if marker in _START_OF_FRAME[uid.UID(syntax)]:
            if found is not None or at + 10 > len(data):
                return None
            bits, rows, columns, samples = struct.unpack(">BHHB", data[at + 4 : at + 10])
            factors = set(data[at + 11 : at + 10 + 3 * samples : 3])
            found = _Claim(rows, columns, samples, bits, mixed=len(factors) > 1)
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None  # a frame of another kind than the transfer syntax says
        elif data[at + 4 : at + 8] in (b"JFIF", b"Adob"):
            named = True
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:  # the scan is data, up to the next marker
            after = scan.search(data, at)
            at = after.end() - 2 if after else len(data)
    raise InputError("a compressed frame of it is cut off")
