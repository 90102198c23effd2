"""Finds a frame's bytes in a DICOM file and decodes it, after checking what the bytes claim."""

from __future__ import annotations

import itertools
import json
import math
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydicom import uid
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder

from echovlm_jax.errors import InputError

MAX_FRAGMENTS = 2**18
MAX_TILES = 4096  # of a JPEG 2000 frame; each costs the decoder kilobytes before any pixel
CHILD_SECONDS = 10  # of processor time for a frame, and a second more for every
CHILD_BYTES_PER_SECOND = 2**20  # decoded bytes; OpenJPEG makes ten times as many in a second
MAX_WAIT_SECONDS = 300  # for it, however busy the machine
UNDEFINED = 0xFFFFFFFF

_NATIVE = {uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian}
_J2K = {uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K}
# Which decoder takes which syntax: the first one installed, and only that one. A frame that it
# can't decode is damaged; trying every other library on damaged bytes only widens the surface.
# JPEG 2000 and whatever gdcm decodes run in a process of their own: on some damaged frames the
# first (pydicom's reading of JP2 boxes) never ends, and the second aborts.
_PLUGINS = {
    uid.JPEGBaseline8Bit: ("pillow", "gdcm"),
    uid.JPEGExtended12Bit: ("pillow", "gdcm"),
    uid.JPEGLossless: ("gdcm",),
    uid.JPEGLosslessSV1: ("gdcm",),
    uid.JPEGLSLossless: ("gdcm",),
    uid.JPEGLSNearLossless: ("gdcm",),
    uid.RLELossless: ("pydicom",),
    **{syntax: ("pylibjpeg", "pillow", "gdcm") for syntax in _J2K},
}
# The start-of-frame markers that each syntax may hold (ISO 10918-1, table B.1).
_START_OF_FRAME = {
    uid.JPEGBaseline8Bit: {0xC0, 0xC1},
    uid.JPEGExtended12Bit: {0xC0, 0xC1},
    uid.JPEGLossless: {0xC3},
    uid.JPEGLosslessSV1: {0xC3},
    uid.JPEGLSLossless: {0xF7},
    uid.JPEGLSNearLossless: {0xF7},
}


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
    implicit: bool

    @property
    def frame_bytes(self) -> int:
        """Bytes of one uncompressed frame."""
        if self.photometric == "YBR_FULL_422" and self.samples == 3:
            return self.rows * self.columns * 2  # colour kept for every second column only
        return self.rows * self.columns * self.samples * self.bits_allocated // 8

    @property
    def is_palette(self) -> bool:
        return self.photometric == "PALETTE COLOR"


class FrameReader:
    """Reads single frames of the PixelData element that starts at `offset`."""

    def __init__(self, file: BinaryIO, offset: int, header: PixelHeader) -> None:
        self._file, self._header = file, header
        if header.syntax not in _NATIVE and header.syntax not in _PLUGINS:
            raise InputError("its transfer syntax (a video stream, or private) is not supported")
        file.seek(0, 2)
        self._size = file.tell()
        length = self._pixel_data_length(offset)
        start = file.tell()
        if header.syntax in _NATIVE:
            needed = header.frames * header.frame_bytes
            if length == UNDEFINED or length < needed or start + needed > self._size:
                raise InputError(
                    f"is truncated: {header.frames} frames need {needed} bytes of pixels"
                )
            self._frames = None
            self._start = start
        else:
            if length != UNDEFINED:
                raise InputError("its compressed pixels are not in fragments")
            self._frames = self._find_frames()

    def frame(self, index: int) -> bytes:
        """The stored bytes of one frame."""
        if self._frames is None:
            self._file.seek(self._start + index * self._header.frame_bytes)
            return self._file.read(self._header.frame_bytes)
        fragments = self._frames[index]
        # No compression in use makes a frame twice as large; more is a lie or another frame.
        if sum(length for _, length in fragments) > 2 * self._header.frame_bytes + 2**16:
            raise InputError(f"the compressed bytes of frame {index + 1} exceed the frame's size")
        parts = []
        for start, length in fragments:
            self._file.seek(start)
            parts.append(self._file.read(length))
        return b"".join(parts)

    def _pixel_data_length(self, offset: int) -> int:
        """Reads the element's head at `offset` and leaves the file at its value."""
        end = "<" if self._header.little_endian else ">"
        self._file.seek(offset)
        head = self._file.read(8)
        if len(head) < 8 or struct.unpack(end + "HH", head[:4]) != (0x7FE0, 0x0010):
            raise InputError("holds no pixel data")
        # Some writers leave the VR out against their own transfer syntax.
        if self._header.implicit or head[4:] == b"\xff\xff\xff\xff":
            return struct.unpack(end + "L", head[4:])[0]
        long = self._file.read(4)
        if head[4:6] not in (b"OB", b"OW", b"UN") or len(long) < 4:
            raise InputError("its pixel data element is damaged")
        return struct.unpack(end + "L", long)[0]

    def _find_frames(self) -> list[list[tuple[int, int]]]:
        """For each frame its fragments (offset, length), by walking item heads only."""
        table, first = self._next_item()
        self._file.seek(table)
        offsets = self._file.read(first if first == 4 * self._header.frames else 0)
        self._file.seek(table + first)
        base, fragments = table + first, []
        while item := self._next_item_or_end():
            fragments.append(item)
            if len(fragments) > MAX_FRAGMENTS:
                raise InputError(f"its pixels lie in more than {MAX_FRAGMENTS} fragments")
            self._file.seek(sum(item))
        frames = self._header.frames
        if not fragments:
            raise InputError("its pixel data holds no fragment")
        if frames == 1:
            return [fragments]
        if len(fragments) == frames:
            return [[fragment] for fragment in fragments]
        starts = [base + o for o in struct.unpack(f"<{len(offsets) // 4}L", offsets)]
        heads = {start - 8: i for i, (start, _) in enumerate(fragments)}
        if starts and all(s in heads for s in starts) and starts == sorted(set(starts)):
            cuts = [heads[s] for s in starts]
        else:  # no usable offset table: a new codestream begins a new frame
            cuts = [i for i, (start, _) in enumerate(fragments) if self._begins_frame(start)]
        if len(cuts) != frames or cuts[0] != 0:
            raise InputError(
                f"{len(fragments)} fragments of pixels don't make {frames} frames; it is damaged"
            )
        return [fragments[a:b] for a, b in zip(cuts, [*cuts[1:], len(fragments)], strict=True)]

    def _begins_frame(self, start: int) -> bool:
        self._file.seek(start)
        return self._file.read(2) in (b"\xff\xd8", b"\xff\x4f")

    def _next_item(self) -> tuple[int, int]:
        item = self._next_item_or_end()
        if item is None:
            raise InputError("its pixel data holds no fragment")
        return item

    def _next_item_or_end(self) -> tuple[int, int] | None:
        head = self._file.read(8)
        if not head:
            return None  # some writers leave the end mark out
        if len(head) < 8:
            raise InputError("is truncated within its compressed pixels")
        group, element, length = struct.unpack("<HHL", head)
        if (group, element) == (0xFFFE, 0xE0DD):
            return None
        start = self._file.tell()
        if (group, element) != (0xFFFE, 0xE000) or length == UNDEFINED:
            raise InputError("the fragments of its pixel data are damaged")
        if start + length > self._size:
            raise InputError("is truncated within its compressed pixels")
        return start, length


class FrameDecoder:
    """Decodes frames of one file; a context, because some run in a process of their own.

    Called with a frame's bytes it gives its samples: uint8 [H, W, 3] RGB for colour, stored values
    [H, W] otherwise. It raises InputError when the codestream's own head disagrees with the DICOM
    header, and whatever a decoder raises on damaged bytes.
    """

    def __init__(self, header: PixelHeader) -> None:
        self._header = header
        self._child: subprocess.Popen[bytes] | None = None
        self._plugin = ""
        if header.syntax not in _NATIVE:
            syntax = uid.UID(header.syntax)
            available = get_decoder(syntax).available_plugins
            installed = [plugin for plugin in _PLUGINS[syntax] if plugin in available]
            if not installed:
                raise InputError(
                    f"no decoder for {syntax.name} is installed; install {_PLUGINS[syntax][0]}"
                )
            self._plugin = installed[0]
        self._options: dict[str, Any] = {
            "rows": header.rows,
            "columns": header.columns,
            "number_of_frames": 1,
            "samples_per_pixel": header.samples,
            "bits_allocated": header.bits_allocated,
            "bits_stored": header.bits_stored,
            "pixel_representation": int(header.signed),
            "photometric_interpretation": header.photometric,
            "pixel_keyword": "PixelData",
        }
        if header.samples > 1:
            self._options["planar_configuration"] = header.planar

    def __enter__(self) -> FrameDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()

    def __call__(self, data: bytes) -> np.ndarray:
        header, colour = self._header, self._header.samples == 3
        if header.syntax not in _NATIVE:
            _check_codestream(data, header)
        if self._plugin == "gdcm" or header.syntax in _J2K:
            array, photometric = self._in_child(data)
        else:
            array, properties = get_decoder(header.syntax).as_array(
                encapsulate([data], has_bot=False) if self._plugin else data,
                index=0,
                decoding_plugin=self._plugin,
                **self._options,
            )
            photometric = properties.get("photometric_interpretation")
        if colour and photometric != "RGB":
            raise InputError("its colours can't be converted to RGB")
        shape = (header.rows, header.columns, 3)[: 3 if colour else 2]
        if array.shape != shape or (colour and array.dtype != np.uint8):
            raise InputError("its decoded frame has another size than the header says")
        return array

    def _in_child(self, data: bytes) -> tuple[np.ndarray, str]:
        job = {
            "syntax": self._header.syntax,
            "plugin": self._plugin,
            "options": self._options,
            "seconds": CHILD_SECONDS + self._header.frame_bytes // CHILD_BYTES_PER_SECOND,
        }
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).with_name("dicom_child.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._send(json.dumps(job).encode() + b"\n")
        child = self._child
        assert child.stdout is not None
        watch = threading.Timer(MAX_WAIT_SECONDS, child.kill)
        watch.start()
        try:
            self._send(struct.pack("<Q", len(data)) + data)
            reply = child.stdout.readline()
            if not reply:
                raise InputError("a compressed frame of it is damaged: it doesn't decode")
            about = json.loads(reply)
            dtype, shape = np.dtype(about["dtype"]), about["shape"]
            pixels = child.stdout.read(dtype.itemsize * math.prod(shape))
        finally:
            watch.cancel()
        return np.frombuffer(pixels, dtype).reshape(shape), about["photometric"]

    def _send(self, data: bytes) -> None:
        assert self._child is not None and self._child.stdin is not None
        try:
            self._child.stdin.write(data)
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # it ended; its missing answer says so


def _check_codestream(data: bytes, header: PixelHeader) -> None:
    """Compares the size a compressed frame claims with the header's, before decoding it."""
    if header.syntax == uid.RLELossless:
        if _rle_size(data) > header.frame_bytes + 64:  # room for padding
            raise InputError("a compressed frame of it unpacks to more than the frame's size")
        return
    if header.syntax == uid.JPEGExtended12Bit and header.bits_stored != 8:
        raise InputError("12-bit JPEG Extended is not supported; save it uncompressed")
    claim = _j2k_size(data) if header.syntax in _J2K else _jpeg_size(data, header.syntax)
    if claim is None:
        raise InputError("a compressed frame of it is damaged: its codestream has no valid head")
    rows, columns, samples = claim
    if (rows, columns, samples) != (header.rows, header.columns, header.samples):
        raise InputError(
            f"a compressed frame claims {rows} x {columns} x {samples} samples where the header"
            f" says {header.rows} x {header.columns} x {header.samples}"
        )


def _rle_size(data: bytes) -> int:
    """Bytes that an RLE frame unpacks to (PS3.5 annex G): two bytes can stand for 128."""
    if len(data) < 64:
        raise InputError("a compressed frame of it is damaged: its codestream has no valid head")
    count, *offsets = struct.unpack("<16L", data[:64])
    size = 0
    for start, end in itertools.pairwise([*offsets[: min(count, 15)], len(data)]):
        at = start
        while at < min(end, len(data)):
            code = data[at]
            size += code + 1 if code < 128 else (257 - code) % 129
            at += code + 2 if code < 128 else 2 - (code == 128)
    return size


def _j2k_size(data: bytes) -> tuple[int, int, int] | None:
    """(rows, columns, components) of a JPEG 2000 codestream's SIZ segment (ISO 15444-1 A.5.1)."""
    start = 0 if data[:4] == b"\xff\x4f\xff\x51" else data.find(b"\xff\x4f\xff\x51", 0, 4096)
    siz = data[start : start + 42] if start >= 0 else b""
    if len(siz) < 42:
        return None
    right, bottom, left, top, tile_w, tile_h, tile_x, tile_y = struct.unpack(">8L", siz[8:40])
    (components,) = struct.unpack(">H", siz[40:42])
    if right <= left or bottom <= top or not tile_w or not tile_h:
        return None
    tiles = -(-(right - min(tile_x, left)) // tile_w) * -(-(bottom - min(tile_y, top)) // tile_h)
    if tiles > MAX_TILES:
        raise InputError(f"a compressed frame of it claims {tiles} tiles, over {MAX_TILES}")
    return bottom - top, right - left, components


def _jpeg_size(data: bytes, syntax: str) -> tuple[int, int, int] | None:
    """(rows, columns, components) of the one frame header in a JPEG or JPEG-LS stream."""
    if data[:2] != b"\xff\xd8":
        return None
    at, found = 2, None
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _START_OF_FRAME[uid.UID(syntax)]:
            if found is not None or at + 10 > len(data):
                return None
            rows, columns, samples = struct.unpack(">HHB", data[at + 5 : at + 10])
            found = rows, columns, samples
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None  # a frame of another kind than the transfer syntax says
        elif marker == 0xDA:  # start of scan: the head is over
            return found
        at += 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
    return None
