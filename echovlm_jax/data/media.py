"""An image file to what a dataset stores: encoded pictures without a word about the patient.

A plain PNG or JPEG keeps its compressed bytes, less every part that is not needed to draw the
picture (EXIF, comments, text, profiles, thumbnails, whatever follows the end). All else becomes
PNG: frames of loops, other kinds of files, values of more than eight bits, and kinds of PNG and
JPEG with room for more than the picture (palettes, several scans, tables that few files have). What
is burnt into the pixels stays there, unless `burned_in` has it masked.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from echovlm_jax.data.quarantine import Refused
from echovlm_jax.data.record import Medium
from echovlm_jax.data.strip import jpeg_without_its_end, strip_jpeg, strip_png
from echovlm_jax.errors import InputError
from echovlm_jax.processing.burned_in import Choice, check
from echovlm_jax.processing.dicom import NOT_CROPPED, Crop, read_loop
from echovlm_jax.processing.files import ExtraMissing, file_kind, read_bytes, shown
from echovlm_jax.processing.images import MAX_ASPECT_RATIO, read_media
from echovlm_jax.processing.stills import (
    MAX_FILE_BYTES,
    PNG_START,
    decode_image,
    decode_stills,
)

# What may be said about a picture that is kept: its count's name, and what it means.
NOTES = {
    "rescaled": "its values don't fit into 8 bits: the smallest became 0, the largest 255",
    "not_cropped": "it was to be cropped, and is no DICOM file whose ultrasound regions all can be"
    " used",
    "burned_in": "its DICOM header says that the pixels themselves name the patient",
    "drawn_outside": "something is drawn outside the ultrasound regions of its DICOM header",
    "text_found": "OCR found text in it that may be a name, a date or a number of the patient",
    "text_unchecked": "OCR failed",
    "masked": "what was found, and what is outside the regions, is black in what is stored",
}


class Encoded(NamedTuple):
    images: tuple[bytes, ...]  # PNG or JPEG: one, or each frame of a video
    medium: Medium
    notes: tuple[str, ...] = ()  # of NOTES


def read_medium(
    path: Path, *, num_frames: int, crop: Crop, burned_in: Choice | None = None
) -> Encoded:
    """Reads an image file.

    Args:
      path: a file that `read_media` reads.
      num_frames: a longer loop is sampled to so many frames.
      crop: crops of DICOM frames to their ultrasound regions; "require" refuses the others.
      burned_in: treatment of text in the pixels, as of `processing.burned_in.check`.

    Raises:
      Refused: it can't be used; the detail does not quote the file's content.
    """
    said: list[str] = []
    try:
        kind, cropped, images, stated, regions = file_kind(path), False, None, False, ()
        seconds: float | None = None
        if kind == "dicom":
            # Without "require": there the file is to be refused for this reason, not as damaged.
            loop = read_loop(path, num_frames=num_frames, crop=bool(crop))
            frames, cropped, stated, regions, seconds = loop
        elif kind in ("png", "jpeg"):
            data, name = read_bytes(path, MAX_FILE_BYTES), shown(path)
            frames = decode_stills(io.BytesIO(data), name, num_frames, say=said.append)
            images = (_clean(data, frames[0]),) if len(frames) == 1 else None
        else:
            found = read_media(path, num_frames=num_frames, say=said.append)
            frames = found.pixels if found.pixels.ndim == 4 else found.pixels[None]
            seconds = found.seconds
        (height, width), many = frames.shape[1:3], len(frames) > 1
        medium = Medium(len(frames) * many, height, width, seconds if many else None)
    except InputError as error:
        detail = str(error)
        large = any(sign in detail for sign in ("is over the limit", "claims more", "larger than"))
        reason = "extra not installed" if isinstance(error, ExtraMissing) else "unreadable image"
        raise Refused("image too large" if large else reason, detail) from None
    sides = sorted((medium.height, medium.width))
    if sides[1] > MAX_ASPECT_RATIO * sides[0]:
        raise Refused("unusable shape", f"{shown(path)}: {medium.height} x {medium.width} pixels")
    if crop == "require" and not cropped:
        raise Refused("not cropped", f"{shown(path)}: {NOT_CROPPED}")
    checked = check(frames, burned_in, stated=stated, regions=regions)
    if checked.refused:
        raise Refused("burned-in text", f"{shown(path)}: {checked.refused}")
    if images is None or "masked" in checked.notes:
        images = tuple(_to_png(frame) for frame in checked.frames)
    notes = ["not_cropped"] * (bool(crop) and not cropped) + ["rescaled"] * bool(said)
    return Encoded(images, medium, (*checked.notes, *notes))


def _clean(data: bytes, pixels: np.ndarray) -> bytes:
    """`data` without metadata, or a PNG of `pixels` where that would draw another picture."""
    is_png = data.startswith(PNG_START)
    stripped = strip_png(data) if is_png else strip_jpeg(data)
    if (
        stripped
        # Metadata may have turned the picture, or taken a part in its colours.
        and (stripped == data or _draws(stripped, pixels))
        # A scan that does without its end has more than the picture there.
        and (is_png or not _draws(jpeg_without_its_end(stripped), pixels))
    ):
        return stripped
    return _to_png(pixels)


def _draws(data: bytes, pixels: np.ndarray) -> bool:
    try:
        return np.array_equal(decode_image(data, ""), pixels)
    except InputError:
        return False


def _to_png(pixels: np.ndarray) -> bytes:
    """uint8 RGB [H, W, 3] as PNG; as grey where it is grey, which reads as the same RGB."""
    grey = (pixels == pixels[..., :1]).all()
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels)).save(out, "PNG")
    return out.getvalue()
