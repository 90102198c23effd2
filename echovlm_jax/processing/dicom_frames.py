"""Finds a frame's bytes in a DICOM file and decodes it, after checking what the bytes claim."""

import json
import math
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import uid
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder

from echovlm_jax.errors import InputError
from echovlm_jax.processing.dicom_codestreams import J2K, check_codestream
from echovlm_jax.processing.dicom_header import NATIVE, UNDEFINED, Opened

MAX_FRAGMENTS = 2**18
MAX_VIDEO_BYTES = 2**28
CHILD_SECONDS = 10  # of processor time for a frame, and a second more for every
CHILD_BYTES_PER_SECOND = 2**20  # decoded bytes; OpenJPEG makes ten times as many in a second
MAX_WAIT_SECONDS = 300  # for it, however busy the machine

# Video, and FFmpeg's name of its bare stream.
VIDEO = {
    syntax: "hevc" if "HEVC" in syntax.name else "h264" if "MPEG-4" in syntax.name else "mpegvideo"
    for syntax in uid.MPEGTransferSyntaxes
}
# Which decoder takes which syntax: the first one installed, and only that one. A frame that it
# can't decode is damaged; trying every other library on damaged bytes only widens the surface.
# JPEG 2000 and whatever gdcm decodes run in a process of their own: on some damaged frames the
# first (pydicom's reading of JP2 boxes) never ends, and the second aborts.
# until: pydicom 3.1
_PLUGINS = {
    uid.JPEGBaseline8Bit: ("pillow", "gdcm"),
    uid.JPEGExtended12Bit: ("pillow", "gdcm"),
    uid.JPEGLossless: ("gdcm",),
    uid.JPEGLosslessSV1: ("gdcm",),
    uid.JPEGLSLossless: ("gdcm",),
    uid.JPEGLSNearLossless: ("gdcm",),
    uid.RLELossless: ("pydicom",),
    **{syntax: ("pylibjpeg", "pillow", "gdcm") for syntax in J2K},
}


class CompressedFrames:
    """The fragments of compressed pixels, found by walking their heads only."""

    def __init__(self, opened: Opened) -> None:
        self._file, self._header = opened.file, opened.header
        if opened.length != UNDEFINED:
            raise InputError(
                "its pixels are not in fragments, where its transfer syntax says compressed"
            )
        self._size = self._file.seek(0, 2)
        self._file.seek(opened.start)
        self._frames = self._find_frames()

    def frame(self, index: int) -> bytes:
        """The stored bytes of one frame."""
        # No compression in use makes a frame twice as large; more is a lie or another frame.
        return self._read(self._frames[index], 2 * self._header.frame_bytes + 2**16)

    def video(self) -> bytes:
        """All of a video's stream."""
        return self._read(self._frames[0], MAX_VIDEO_BYTES)

    def _read(self, fragments: list[tuple[int, int]], limit: int) -> bytes:
        if sum(length for _, length in fragments) > limit:
            raise InputError(f"the compressed bytes of a frame exceed the limit of {limit}")
        parts = []
        for start, length in fragments:
            self._file.seek(start)
            parts.append(self._file.read(length))
        return b"".join(parts)

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
        if self._header.syntax in VIDEO:
            return [fragments]
        if frames == 1:
            self._refuse_more_frames(first // 4, fragments)
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
                f"{len(fragments)} fragments of pixels don't make the {frames} frames that its"
                " header states"
            )
        return [fragments[a:b] for a, b in zip(cuts, [*cuts[1:], len(fragments)], strict=True)]

    def _refuse_more_frames(self, named: int, fragments: list[tuple[int, int]]) -> None:
        begun = sum(self._begins_frame(start) for start, _ in fragments)
        if self._header.syntax == uid.RLELossless:
            begun = len(fragments)  # each is a frame
        if max(named, begun) > 1:
            raise InputError(
                f"its pixel data holds {max(named, begun)} frames where its header says 1"
            )

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

    Called with a frame's number it gives its samples: uint8 [H, W, 3] RGB for colour, stored values
    [H, W] otherwise. It raises InputError when the header disagrees with what is stored, and
    whatever a decoder raises on damaged bytes.
    """

    def __init__(self, opened: Opened) -> None:
        self._opened, self._header = opened, opened.header
        header = self._header
        self._child: subprocess.Popen[bytes] | None = None
        self._plugin = ""
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
        if header.syntax in NATIVE:
            _check_length(opened)
            self._options["number_of_frames"] = header.frames
            if opened.vr:  # 8 bits in big-endian words come in pairs the wrong way round
                self._options["pixel_vr"] = opened.vr
            return
        if header.syntax not in _PLUGINS:
            raise InputError("its transfer syntax is not supported")
        syntax = uid.UID(header.syntax)
        available = get_decoder(syntax).available_plugins
        installed = [plugin for plugin in _PLUGINS[syntax] if plugin in available]
        if not installed:
            raise InputError(
                f"no decoder for {syntax.name} is installed; install {_PLUGINS[syntax][0]}"
            )
        self._plugin = installed[0]
        self._compressed = CompressedFrames(opened)

    def __enter__(self) -> "FrameDecoder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()

    def __call__(self, index: int) -> np.ndarray:
        header, colour = self._header, self._header.samples == 3
        array, photometric = self._decode(index)
        if colour and photometric != "RGB":
            raise InputError("its colours can't be converted to RGB")
        shape = (header.rows, header.columns, 3)[: 3 if colour else 2]
        if array.shape != shape or (colour and array.dtype != np.uint8):
            raise InputError("its decoded frame has another size than the header says")
        if not colour:
            span = 2**header.bits_stored
            low, high = (-span // 2, span // 2 - 1) if header.signed else (0, span - 1)
            if array.min() < low or array.max() > high:
                raise InputError(f"its pixels exceed the {header.bits_stored} bits stored")
        return array

    def _decode(self, index: int) -> tuple[np.ndarray, Any]:
        syntax, source, options = self._header.syntax, self._opened.file, self._options
        if not self._plugin:
            source.seek(self._opened.start)
            array, properties = get_decoder(syntax).as_array(source, index=index, **options)
            return array, properties.get("photometric_interpretation")
        data = self._compressed.frame(index)
        check_codestream(data, self._header)
        if self._plugin == "gdcm" or syntax in J2K:
            return self._in_child(data)
        array, properties = get_decoder(syntax).as_array(
            encapsulate([data], has_bot=False), index=0, decoding_plugin=self._plugin, **options
        )
        return array, properties.get("photometric_interpretation")

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


def _check_length(opened: Opened) -> None:
    """Uncompressed pixels are as long as the header says, and as long as their element says."""
    header, length = opened.header, opened.length
    if length == UNDEFINED:
        raise InputError("its pixels are in fragments, where its transfer syntax says uncompressed")
    needed = header.frames * header.frame_bytes
    there = min(length, opened.file.seek(0, 2) - opened.start)
    swapped = opened.vr == "OW" and not header.little_endian and header.bits_allocated == 8
    if swapped and there % 2:
        raise InputError(
            f"its pixels are big-endian words of 16 bits, and {there} bytes are no whole number"
            " of them"
        )
    rest = there - needed
    # An even length takes one byte whatever it is. More of them are zeros, and fewer than a frame:
    # one more black frame would be one that the header does not state.
    if 0 <= rest <= needed % 2:
        return
    last = needed % 2 if swapped else 0  # the last pixel stands behind its word's spare byte
    opened.file.seek(opened.start + needed + last)
    if 0 <= rest < header.frame_bytes and not opened.file.read(rest - last).strip(b"\0"):
        return
    what = "is truncated" if there < needed else "holds more pixels than its header says"
    raise InputError(
        f"{what}: {header.frames} frames of {header.rows} x {header.columns} pixels,"
        f" {header.samples} x {header.bits_allocated} bits each, take {needed} bytes, there are"
        f" {there}"
    )
