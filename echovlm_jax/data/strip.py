"""A PNG or JPEG less all that does not draw its picture; what stays keeps its bytes.

A kind of file in which more can hide than the picture shows is not taken: its pixels are to be
encoded anew.
"""

from __future__ import annotations

import functools
import io
import re
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from echovlm_jax.processing.stills import png_chunks

_IEND = b"\0\0\0\0IEND\xaeB`\x82"
_CHANNELS = {b"\x08\0\0\0\0": 1, b"\x08\2\0\0\0": 3}  # 8 bits, grey or RGB, rows in order
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOF, _DHT, _SOS, _DQT = (0xC0, 0xC1), 0xC4, 0xDA, 0xDB
_COMPONENTS = (  # the names of a picture's planes
    *(b"\0", b"\1", b"\0\1\2", b"\1\2\3", b"RGB", b"\0\1\2\3", b"\1\2\3\4", b"CMYK"),
)
_APP = range(0xE0, 0xF0)
_COM = 0xFE
_IN_A_SCAN = re.compile(rb"\xff[^\x00]", re.DOTALL)  # what ends one: no stuffing
_JFIF, _ADOBE = b"JFIF\0\1\1\0\0\1\0\1\0\0", b"Adobe\0\x64\0\0\0\0"


def strip_png(data: bytes) -> bytes | None:
    """Only header and pixels. None for what can hold more: a palette, transparency, spare bits,
    bytes behind the last row."""
    bare = png_chunks(data, (b"IHDR", b"IDAT", b"IEND").__contains__) or b""
    channels = _CHANNELS.get(bare[24:29])
    if not channels or bare[8:16] != b"\0\0\0\rIHDR" or not bare.endswith(_IEND):
        return None
    rows, at = [], 33
    while at < len(bare) - len(_IEND):
        length, kind = struct.unpack_from(">I4s", bare, at)
        if kind != b"IDAT":
            return None
        rows.append(bare[at + 8 : at + 8 + length])
        at += 12 + length
    width, height = struct.unpack_from(">II", bare, 16)
    size, inflate = height * (1 + width * channels), zlib.decompressobj()
    try:
        found = len(inflate.decompress(b"".join(rows), size + 1))
    except zlib.error:
        return None
    return bare if found == size and inflate.eof and not inflate.unused_data else None


def strip_jpeg(data: bytes) -> bytes | None:
    """Only what a baseline picture of one scan is decoded from: how its colours are stored, its
    frame, the tables that it uses, its scan. None for another kind, what is irregular, and tables
    that are not libjpeg's: the numbers of a table can spell a name, whatever they draw."""
    parts = [_SOI]
    frame: bytes | None = None
    tables: dict[tuple[int, int], bytes] = {}
    for marker, body, at in _segments(data):
        if marker in _SOF and frame is None:
            frame = _segment(marker, body)
        elif marker in (_DQT, _DHT):
            if not _read_tables(marker, body, tables):
                return None
        elif marker == _SOS:
            end, used = _IN_A_SCAN.search(data, at), _used(frame, body, tables)
            if end is None or end[0] != _EOI or used is None:
                return None
            scan = data[at : end.start()]
            return b"".join([*parts, *used, _segment(_SOS, body), scan, _EOI])
        elif body[:5] == b"JFIF\0" and marker == _APP[0]:
            parts.append(_segment(marker, _JFIF))
        elif body[:5] == b"Adobe" and len(body) == 12 and marker == _APP[14]:
            parts.append(_segment(marker, _ADOBE + body[11:]))
        elif marker not in _APP and marker != _COM:  # progressive, arithmetic, restarts, …
            return None
    return None


def jpeg_without_its_end(data: bytes) -> bytes:
    """Of what `strip_jpeg` gave: without the scan's last four bytes, which a picture needs."""
    return data[: -4 - len(_EOI)] + _EOI


def _segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """A JPEG's segments: marker, content, and where the next one begins."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        body, at = data[at + 4 : at + 2 + size], at + 2 + size
        yield marker, body, at


@functools.cache
def _usual_tables() -> frozenset[bytes]:
    """What libjpeg, and most that write JPEG, have for tables: quantization of each quality, and
    Huffman codes that no picture was counted for (T.81, annex K); without their numbers."""
    found: set[bytes] = set()
    for quality in range(1, 101):
        out = io.BytesIO()
        Image.new("RGB", (8, 8)).save(out, "JPEG", quality=quality)
        tables: dict[tuple[int, int], bytes] = {}
        for marker, body, _ in _segments(out.getvalue()):
            if marker in (_DQT, _DHT):
                _read_tables(marker, body, tables)
        found |= {table[1:] for table in tables.values()}
    return frozenset(found)


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body


def _read_tables(marker: int, body: bytes, tables: dict[tuple[int, int], bytes]) -> bool:
    """Adds a segment's tables by (marker, class and number); False where it is irregular, or has
    one anew."""
    at = 0
    while at < len(body):
        if marker == _DQT:
            key, size = body[at] & 15, 65 + 64 * (body[at] >> 4)
        else:
            key, size = body[at], 17 + sum(body[at + 1 : at + 17])
        if (marker, key) in tables or at + size > len(body):
            return False
        tables[marker, key] = body[at : at + size]
        at += size
    return True


def _used(
    frame: bytes | None, scan: bytes, tables: dict[tuple[int, int], bytes]
) -> list[bytes] | None:
    """The segments of a frame's tables and of the frame; None where it is not all in this scan."""
    count = scan[0] if scan else 0
    if (
        frame is None
        or frame[4:5] != b"\x08"
        or frame[9:10] != bytes([count])
        or len(frame) != 10 + 3 * count
        or len(scan) != 4 + 2 * count
        or frame[10::3] not in _COMPONENTS
        or scan[1 : 2 * count : 2] != frame[10::3]
        or scan[-3:] != b"\0\x3f\0"
    ):
        return None
    coders = scan[2 : 2 + 2 * count : 2]
    wanted = {(_DQT, n) for n in frame[12::3]}
    wanted |= {(_DHT, n) for both in coders for n in (both >> 4, 16 | both & 15)}
    if not all(tables.get(key, b"")[1:] in _usual_tables() for key in wanted):
        return None
    used = [
        (marker, _segment(marker, tables[marker, n]))
        for marker, n in tables
        if (marker, n) in wanted
    ]
    quant, coding = ([part for kind, part in used if kind == marker] for marker in (_DQT, _DHT))
    return [*quant, frame, *coding]
