"""Picture files (PNG, JPEG, BMP, TIFF, WebP, GIF, JPEG 2000) to RGB, by Pillow, within bounds.

What a file claims is checked before any pixel is decoded. A file of several frames is a loop: an
animated GIF, WebP or PNG, and a TIFF whose pages are all of one size.
"""

import io
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from echovlm_jax.errors import InputError
from echovlm_jax.processing.files import open_file, shown
from echovlm_jax.processing.levels import Say, check_loop, picks, silent, to_levels

MAX_PIXELS_IN_FILE = 2**26  # a 64-megapixel picture; beyond that it is a bomb, not an image
MAX_FILE_BYTES = 2**28  # a PNG or JPEG; the largest that decodes is about as large as pixels
PNG_START = b"\x89PNG\r\n\x1a\n"
_FORMS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000")
STORED = ("PNG", "JPEG")  # in a dataset; each is one frame
_LOOPS = ("PNG", "TIFF", "WEBP", "GIF")
_SIDE_DATA = (b"iCCP", b"tEXt", b"zTXt", b"iTXt")  # of PNG: colour profile and texts
_WITH_ALPHA = {"LA", "PA", "RGBA", "RGBa"}
_WIDE_MODES = ("I", "F")  # and I;16, I;16B, …
# Pillow's names of the ways that 16-bit colours lie in a file; the other way round, the byte that
# it keeps is the other one.
# until: pillow 14
_OTHER_BYTE = {
    "LA;16B": "RGBA",
    **{f"{c};16{a}": f"{c};16{b}" for c in ("RGB", "RGBX", "RGBA") for a, b in ("BL", "LB")},
    **{f"{c};16N": f"{c};16{'BL'[sys.byteorder != 'little']}" for c in ("RGB", "RGBX", "RGBA")},
}
# TIFF's tags. Photometric interpretation 0: the lowest value is white.
_BITS, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 262, 284, 339

_warnings_lock = threading.Lock()  # warnings.catch_warnings changes the whole process


class _Picture(NamedTuple):
    values: np.ndarray  # uint8 [H, W, 3]; or wider values, [H, W] or [H, W, 3]
    opacity: np.ndarray | None = None  # of wider values: float32 [H, W] from 0 to 1
    inverted: bool = False  # of wider values: whether the lowest is white


def read_stills(
    path: str | Path, *, num_frames: int, convert_rgb: bool = True, say: Say = silent
) -> np.ndarray:
    """The frames of a picture file, uint8 RGB [T, H, W, 3]; see `images.load_media`."""
    with open_file(path) as file:
        return np.array(decode_stills(file, shown(path), num_frames, convert_rgb, say), order="C")


def decode_image(data: bytes, name: str) -> np.ndarray:
    """The bytes of a stored PNG or JPEG as uint8 RGB [H, W, 3], as `load_media` reads its file.

    Read-only; a grey picture's three channels are one in memory.

    Raises:
      InputError: beginning with `name`; they are damaged, no image, or claim too many pixels.
    """
    return decode_stills(io.BytesIO(data), name, 1, forms=STORED)[0]


def decode_stills(
    file: BinaryIO,
    name: str,
    num_frames: int,
    convert_rgb: bool = True,
    say: Say = silent,
    forms: tuple[str, ...] = _FORMS,
) -> np.ndarray:
    """The frames of an open picture file, uint8 RGB [T, H, W, 3], maybe read-only; of STORED forms
    the first."""

    def told(line: str) -> None:
        say(f"{name}: {line}")

    try:
        try:
            return _decode(file, num_frames, convert_rgb, told, forms)
        except InputError:
            raise
        except ValueError:  # as Pillow raises for side data that is larger than it takes
            if (bare := _without_side_data(file)) is None:
                raise
            return _decode(io.BytesIO(bare), num_frames, convert_rgb, told, forms)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except Image.DecompressionBombError:
        raise InputError(
            f"{name}: claims more than {MAX_PIXELS_IN_FILE} pixels; refused unread"
        ) from None
    except UnidentifiedImageError:
        raise InputError(f"{name}: is damaged, truncated or of a form that is not read") from None
    except Exception:  # decoders raise nearly anything on broken bytes
        raise InputError(f"{name}: is damaged or truncated, it doesn't decode") from None


def decode_pil(image: Image.Image, name: str, convert_rgb: bool, say: Say = silent) -> np.ndarray:
    """A PIL image as uint8 RGB [H, W, 3], by the rules for files."""
    try:
        frames = _to_rgb([_picture(image, convert_rgb)], lambda line: say(f"{name}: {line}"))
        return np.array(frames[0], order="C")
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _decode(
    file: BinaryIO, num_frames: int, convert_rgb: bool, say: Say, forms: tuple[str, ...]
) -> np.ndarray:
    with _open(file, forms) as image:
        width, height = image.size
        if width * height > MAX_PIXELS_IN_FILE:
            raise InputError(
                f"{height} x {width} pixels is over the limit of {MAX_PIXELS_IN_FILE} pixels"
            )
        with _quietly():
            frames = getattr(image, "n_frames", 1) if image.format in _LOOPS else 1
        if frames == 1 or forms == STORED:
            return _to_rgb([_page(file, image, convert_rgb)], say)
        # A PNG may have a picture before the loop, for programs that know of none.
        first = 1 if image.info.get("default_image") else 0
        check_loop(frames - first, height, width, num_frames)
        pictures, wanted = [], {first + n for n in picks(frames - first, num_frames)}
        for frame in range(frames):
            with _quietly():
                image.seek(frame)
            if image.size != (width, height):
                raise InputError(
                    f"its {frames} pages differ in size; save the page that is meant as a file of"
                    " its own"
                )
            if frame in wanted:
                pictures.append(_page(file, image, convert_rgb))
        return _to_rgb(pictures, say)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps Pillow's warnings about a file's metadata from the terminal: they may quote it."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(file: BinaryIO, forms: tuple[str, ...]) -> ImageFile.ImageFile:
    file.seek(0)
    with _quietly():
        opened = Image.open(file, formats=forms)
    assert isinstance(opened, ImageFile.ImageFile)
    return opened


def _page(file: BinaryIO, image: ImageFile.ImageFile, convert_rgb: bool) -> _Picture:
    """The page that `image` is at."""
    args = image.tile[0].args if image.tile else ""
    raw = args if isinstance(args, str) else args[0] if isinstance(args, tuple) and args else ""
    if not isinstance(raw, str):
        raw = ""
    tags = getattr(image, "tag_v2", {})
    bits = max(np.atleast_1d(tags.get(_BITS, 8)))
    if raw in _OTHER_BYTE and image.tell() == 0 and tags.get(_PLANES, 1) == 1:
        return _wide_colours(file, image, raw)
    if (bits > 8 and not image.mode.startswith(_WIDE_MODES)) or ";16" in raw[3:]:
        raise InputError(f"{bits} bits a colour are not read in this form; save it as 8 bits")
    picture = _picture(_upright(image), convert_rgb)
    unsigned = bits == 32 and 1 in np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1))
    if picture.values.dtype == np.int32 and unsigned:
        picture = picture._replace(values=picture.values.view(np.uint32))  # Pillow knows int32 only
    return picture._replace(inverted=tags.get(_PHOTOMETRIC) == 0)


def _wide_colours(file: BinaryIO, image: ImageFile.ImageFile, raw: str) -> _Picture:
    """Colours of 16 bits. Pillow keeps a byte of each: so it decodes twice, once for each byte."""
    if raw == "LA;16B":
        # Four bytes a pixel, grey and opacity: as if they were four colours.
        both = np.asarray(_upright(_as_raw(file, image, "RGBA"))).astype(np.uint16)
        grey, opacity = (both[..., k] << 8 | both[..., k + 1] for k in (0, 2))
        return _Picture(grey, (opacity / 65535).astype(np.float32))
    low = np.asarray(_upright(_as_raw(file, image, _OTHER_BYTE[raw])))
    high = np.asarray(_upright(image)).astype(np.uint16)
    colours = high << 8 | low
    if colours.shape[-1] == 4:
        return _Picture(colours[..., :3], (colours[..., 3] / 65535).astype(np.float32))
    clear = image.info.get("transparency")
    opacity = None if clear is None else (colours != clear).any(-1).astype(np.float32)
    return _Picture(colours, opacity)


def _as_raw(file: BinaryIO, image: ImageFile.ImageFile, raw: str) -> Image.Image:
    """The file once more, its bytes taken for what `raw` names; `image` stays as it is."""
    position = file.tell()
    again = _open(file, (image.format or "",))
    args = [tile.args for tile in again.tile]
    swapped = [(raw, *a[1:]) if isinstance(a, tuple) else raw for a in args]
    again.tile = [tile._replace(args=a) for tile, a in zip(again.tile, swapped, strict=True)]
    again.load()
    file.seek(position)
    return again


def _upright(image: Image.Image) -> Image.Image:
    if image.format != "TIFF":  # which reads tags, and warns of them, even here
        image.load()  # outside: it is what takes long, and threads wait for each other inside
    with _quietly():
        return ImageOps.exif_transpose(image)


def _picture(image: Image.Image, convert_rgb: bool) -> _Picture:
    """An 8-bit picture as RGB, by the rules of Hugging Face's processors: transparency is laid over
    white. A wider one as its values: those processors would clip it at 255."""
    mode, clear = image.mode, image.info.get("transparency")
    if mode != "RGB" and not convert_rgb:
        raise InputError(f"has colour mode {mode}, and do_convert_rgb is false; save it as RGB")
    if mode.startswith(_WIDE_MODES):
        values = np.asarray(image)
        values = values.astype(values.dtype.newbyteorder("="))
        opaque = (values != clear).astype(np.float32) if isinstance(clear, int) else None
        return _Picture(values, opaque)
    if mode == "L" and clear is None:
        grey = np.asarray(image)
        return _Picture(np.broadcast_to(grey[..., None], (*grey.shape, 3)))
    try:
        if mode in _WITH_ALPHA or clear is not None:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return _Picture(np.asarray(image.convert("RGB")))
    except ValueError:  # a mode that Pillow has no way from
        raise InputError(f"has colour mode {mode}, which is not read; save it as RGB") from None


def _to_rgb(pictures: list[_Picture], say: Say) -> np.ndarray:
    """Frames of one file, uint8 [T, H, W, 3]; wider values share one range."""
    first = pictures[0]
    if len({(p.values.shape, p.values.dtype, p.inverted) for p in pictures}) > 1:
        raise InputError("its pages differ in kind; save the page that is meant as its own file")
    values = first.values[None] if len(pictures) == 1 else np.stack([p.values for p in pictures])
    if values.dtype == np.uint8 and values.ndim == 4:
        return values
    levels = to_levels(values, say, colour=values.ndim == 4)
    if first.inverted:
        levels = 255 - levels
    if levels.ndim == 3:
        levels = np.repeat(levels[..., None], 3, axis=-1)
    for frame, picture in zip(levels, pictures, strict=True):
        if (opacity := picture.opacity) is not None:
            laid = 255 - (255 - frame.astype(np.float32)) * opacity[..., None]
            frame[:] = np.rint(laid).astype(np.uint8)
    return levels


# until: pillow 14
def _without_side_data(file: BinaryIO) -> bytes | None:
    """A PNG without its colour profile and texts; None where the file is none, or irregular."""
    file.seek(0)
    data = file.read(MAX_FILE_BYTES)
    return png_chunks(data, lambda kind: kind not in _SIDE_DATA)


def png_chunks(data: bytes, keep: Callable[[bytes], bool]) -> bytes | None:
    """A PNG with the chunks whose kind is to `keep`, byte for byte, and nothing behind its end;
    None where the file is irregular."""
    if not data.startswith(PNG_START):
        return None
    parts, at = [PNG_START], len(PNG_START)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            return None
        if keep(kind):
            if zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                return None
            parts.append(data[at:end])
        if kind == b"IEND":
            return b"".join(parts)
        at = end
    return None
