"""An image file to what a dataset stores: encoded pictures without a word about the patient.

PNG and JPEG keep their compressed bytes, less every part that is not needed to draw the picture
(EXIF, comments, text, profiles, thumbnails, whatever follows the end). All else becomes PNG: frames
of loops, other kinds of files, and values of more than eight bits. What is burnt into the pixels
stays there.
"""

import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from echovlm_jax.data.quarantine import Refused
from echovlm_jax.data.record import Medium
from echovlm_jax.errors import InputError
from echovlm_jax.processing.dicom import NOT_CROPPED, Crop, read_loop
from echovlm_jax.processing.files import ExtraMissing, file_kind, read_bytes, shown
from echovlm_jax.processing.images import MAX_ASPECT_RATIO, load_media
from echovlm_jax.processing.stills import (
    MAX_FILE_BYTES,
    PNG_START,
    decode_image,
    decode_stills,
    png_chunks,
)

_PNG_DEPTH = 24  # where a PNG states the bits of a value
_PNG_PARTS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
# Frames (SOFn), tables (DHT, DAC, DQT, DRI) and scans (SOS).
_JPEG_PARTS = {*range(0xC0, 0xD0), 0xDB, 0xDD, 0xDA} - {0xC8}
_IN_A_SCAN = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # what ends one: not stuffing, not RSTn


# What may be said about a picture that is kept: its count's name, and what it means.
NOTES = {
    "rescaled": "its values don't fit into 8 bits: the smallest became 0, the largest 255",
    "not_cropped": "it was to be cropped, and is no DICOM file whose ultrasound regions all can be"
    " used",
    "burned_in": "its DICOM header says that the pixels themselves name the patient",
}


class Encoded(NamedTuple):
    images: tuple[bytes, ...]  # PNG or JPEG: one, or each frame of a video
    medium: Medium
    notes: tuple[str, ...] = ()  # of NOTES


def read_medium(path: Path, *, num_frames: int, crop: Crop) -> Encoded:
    """Reads an image file.

    Args:
      path: a file that `load_media` reads.
      num_frames: a longer loop is sampled to so many frames.
      crop: crops of DICOM frames to their ultrasound regions; "require" refuses the others.

    Raises:
      Refused: it can't be used; the detail does not quote the file's content.
    """
    said: list[str] = []
    notes: list[str] = []
    try:
        kind, cropped, images = file_kind(path), False, None
        if kind == "dicom":
            # Without "require": there the file is to be refused for this reason, not as damaged.
            loop = read_loop(path, num_frames=num_frames, crop=bool(crop))
            frames, cropped = loop.frames, loop.cropped
            notes += ["burned_in"] * loop.burned_in
        elif kind in ("png", "jpeg"):
            data, name = read_bytes(path, MAX_FILE_BYTES), shown(path)
            frames = decode_stills(io.BytesIO(data), name, num_frames, say=said.append)
            images = (_clean(data, frames[0]),) if len(frames) == 1 else None
        else:
            found = load_media(path, num_frames=num_frames, say=said.append)
            frames = found if found.ndim == 4 else found[None]
        medium = Medium(len(frames) if len(frames) > 1 else 0, *frames.shape[1:3])
        images = images or tuple(_to_png(frame) for frame in frames)
    except InputError as error:
        detail = str(error)
        large = any(sign in detail for sign in ("is over the limit", "claims more", "larger than"))
        reason = "extra not installed" if isinstance(error, ExtraMissing) else "unreadable image"
        raise Refused("image too large" if large else reason, detail) from None
    sides = sorted(medium[1:])
    if sides[1] > MAX_ASPECT_RATIO * sides[0]:
        raise Refused("unusable shape", f"{shown(path)}: {medium.height} x {medium.width} pixels")
    if crop and not cropped:
        if crop == "require":
            raise Refused("not cropped", f"{shown(path)}: {NOT_CROPPED}")
        notes.append("not_cropped")
    return Encoded(images, medium, (*notes, *["rescaled"] * bool(said)))


def _clean(data: bytes, pixels: np.ndarray) -> bytes:
    """`data` without metadata, or a PNG of `pixels` where that would draw another picture."""
    is_png = data.startswith(PNG_START)
    if is_png and data[_PNG_DEPTH] == 16:
        return _to_png(pixels)
    stripped = strip_png(data) if is_png else strip_jpeg(data)
    if stripped == data:
        return data
    try:
        # Metadata may have turned the picture, or taken a part in its colours.
        if stripped and np.array_equal(decode_image(stripped, ""), pixels):
            return stripped
    except InputError:
        pass
    return _to_png(pixels)


def _to_png(pixels: np.ndarray) -> bytes:
    """uint8 RGB [H, W, 3] as PNG; as grey where it is grey, which reads as the same RGB."""
    grey = (pixels == pixels[..., :1]).all()
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels)).save(out, "PNG")
    return out.getvalue()


def strip_png(data: bytes) -> bytes | None:
    """Only the chunks that draw the picture, byte for byte; None where the file is irregular."""
    return png_chunks(data, _PNG_PARTS.__contains__)


def strip_jpeg(data: bytes) -> bytes | None:
    """Only the segments that draw the picture, byte for byte; None where the file is irregular.

    JFIF's and Adobe's markers say how colours are stored; they stay, without thumbnail.
    """
    parts, at = [b"\xff\xd8"], 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xD9:
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : end]
        if end > len(data) or end < at + 4:
            return None
        if marker in _JPEG_PARTS:
            parts.append(data[at:end])
        elif marker == 0xE0 and body[:5] == b"JFIF\0" and len(body) >= 14:
            parts.append(b"\xff\xe0\x00\x10" + body[:12] + b"\0\0")
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) == 12:
            parts.append(data[at:end])
        at = end
        if marker == 0xDA:
            found = _IN_A_SCAN.search(data, at)
            if found is None:
                return None
            parts.append(data[at : found.start()])
            at = found.end() - 2
    return b"".join([*parts, b"\xff\xd9"]) if data[at : at + 2] == b"\xff\xd9" else None
