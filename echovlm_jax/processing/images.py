"""Images and video frames to patches, equal to Hugging Face's Qwen2-VL image processor.

Everything stays uint8 until the last steps: resizing works on 8-bit pixels (as PIL does), and
rescaling maps each of the 256 values, so it is one table.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from echovlm_jax.errors import InputError
from echovlm_jax.processing.files import STILLS, VIDEOS, VOLUMES, file_kind, shown
from echovlm_jax.processing.levels import Say, silent
from echovlm_jax.processing.media import Media
from echovlm_jax.processing.stills import decode_image as decode_image
from echovlm_jax.processing.stills import decode_pil, read_stills

MAX_RESIZED_PIXELS = 2**26  # for min_pixels and max_pixels; Qwen2-VL's own maximum is under 2**24
MAX_BLOCK = 64  # for the patch, merge and temporal sizes; Qwen2-VL's are 14, 2 and 2
MAX_ASPECT_RATIO = 200  # Qwen2-VL's own limit


@dataclass(frozen=True)
class ImageConfig:
    """How pixels become patches: the keys of preprocessor_config.json, Qwen2-VL's defaults."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    resample: int = int(Image.Resampling.BICUBIC)
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    do_convert_rgb: bool = True

    @property
    def factor(self) -> int:
        """Sides are multiples of this: one merged token's width in pixels."""
        return self.patch_size * self.merge_size


_WHOLE = {  # and the largest value taken: each sets the size of what is allocated
    "min_pixels": MAX_RESIZED_PIXELS,
    "max_pixels": MAX_RESIZED_PIXELS,
    "patch_size": MAX_BLOCK,
    "temporal_patch_size": MAX_BLOCK,
    "merge_size": MAX_BLOCK,
}
_FLAGS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")


def image_config(raw: Mapping[str, Any], source: str = "preprocessor_config.json") -> ImageConfig:
    """Reads the content of a preprocessor_config.json; silent keys take Qwen2-VL's defaults.

    `min_pixels` and `max_pixels` win over `size.shortest_edge` and `size.longest_edge`, which mean
    the same. Raises InputError naming the key of an invalid value.
    """
    size = raw.get("size") or {}
    if not isinstance(size, Mapping):
        raise InputError(f"{source}: size must be an object with shortest_edge and longest_edge")
    values: dict[str, Any] = {}
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        for found in (raw.get(key), size.get(edge), size.get(key)):
            if found is not None:
                values[key] = found
                break
    for key in (*_WHOLE, *_FLAGS, "image_mean", "image_std", "rescale_factor", "resample"):
        if key not in values and raw.get(key) is not None:
            values[key] = raw[key]
    for key, most in _WHOLE.items():
        value = values.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise InputError(f"{source}: {key} must be a whole number from 1 to {most}")
    for key in _FLAGS:
        if not isinstance(values.get(key, True), bool):
            raise InputError(f"{source}: {key} must be true or false, not {values[key]!r}")
    for key in ("image_mean", "image_std"):
        if key in values:
            values[key] = _three(values[key], key, source)
    if not all(values.get("image_std", (1.0,))):
        raise InputError(f"{source}: image_std must not contain 0")
    if "rescale_factor" in values and not _is_number(values["rescale_factor"]):
        raise InputError(f"{source}: rescale_factor must be a number")
    if values.get("resample", 3) not in list(Image.Resampling):
        raise InputError(f"{source}: resample must be one of PIL's filters, 0 to 5")
    config = ImageConfig(**values)
    if config.min_pixels > config.max_pixels:
        raise InputError(
            f"{source}: min_pixels {config.min_pixels} exceeds max_pixels {config.max_pixels}"
        )
    with np.errstate(all="ignore"):
        table = _rescaled(config.rescale_factor if config.do_rescale else None)
        tables = [_normalized(table, config, channel) for channel in range(3)]
        if not np.isfinite(tables).all():
            raise InputError(
                f"{source}: image_mean, image_std and rescale_factor together take a pixel's value"
                " beyond float32; mend the extreme one"
            )
    return config


def _is_number(value: Any) -> bool:
    """Within float32. math.isfinite would raise on an int beyond float64."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= float(np.finfo(np.float32).max)


def _three(value: Any, key: str, source: str) -> tuple[float, ...]:
    """A mean or deviation: three numbers, or one for all channels."""
    listed = [value] * 3 if _is_number(value) else value
    if not isinstance(listed, list | tuple) or len(listed) != 3 or not all(map(_is_number, listed)):
        raise InputError(f"{source}: {key} must be three numbers")
    return tuple(float(v) for v in listed)


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size (height, width) an image is resized to (source: Qwen2-VL's processor).

    Both sides become multiples of `factor`, the area goes between `min_pixels` and `max_pixels`
    where the factor permits, and the aspect ratio is kept as nearly as the factor permits.
    """
    if min(height, width) < 1 or max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise InputError(
            f"image of {height} x {width} pixels: the long side may be at most"
            f" {MAX_ASPECT_RATIO} times the short one"
        )
    new_h, new_w = round(height / factor) * factor, round(width / factor) * factor
    if new_h * new_w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_h = max(factor, math.floor(height / shrink / factor) * factor)
        new_w = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_h * new_w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_h = math.ceil(height * grow / factor) * factor
        new_w = math.ceil(width * grow / factor) * factor
    return new_h, new_w


def to_patches(
    frames: np.ndarray, config: ImageConfig, out: np.ndarray | None = None
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Resizes, normalises and cuts one image or one video.

    Args:
      frames: uint8 [H, W, 3] (an image, whose one frame is repeated) or [T, H, W, 3] (a video;
        where T is not a multiple of temporal_patch_size the last frame is repeated).
      out: float32, C-contiguous: its first t·h·w rows are written; a new array by default.

    Returns:
      patches float32 [t·h·w, 3·temporal·patch·patch] and the grid (t, h, w). Rows go by time step,
      then 2×2 merge blocks row by row, then row by row inside a block; a row is (channel, time,
      y, x) flattened.
    """
    if frames.dtype != np.uint8 or frames.ndim not in (3, 4) or frames.shape[-1] != 3:
        raise InputError(
            "an image must be a uint8 array [H, W, 3] or [T, H, W, 3],"
            f" found {frames.dtype} {list(frames.shape)}"
        )
    if 0 in frames.shape:
        raise InputError(f"an image of shape {list(frames.shape)} has no pixels")
    if frames.ndim == 3:
        frames = frames[None]
    if _is_grey(frames):  # as most ultrasound is: one channel is a third of the work
        frames = frames[..., :1]
    return _cut(np.stack([_resize(frame, config) for frame in frames]), config, out)


def _is_grey(frames: np.ndarray) -> bool:
    if frames.strides[-1] == 0:  # one channel, seen three times: as grey files are decoded
        return True
    red, green, blue = (frames[..., channel] for channel in range(3))
    return bool(np.array_equal(red, green) and np.array_equal(green, blue))


def _resize(frame: np.ndarray, config: ImageConfig) -> np.ndarray:
    """[H, W, 3] or, all channels being equal, [H, W, 1]: PIL resizes each channel by itself."""
    height, width, channels = frame.shape
    if not config.do_resize:
        if height % config.factor or width % config.factor:
            raise InputError(
                f"image of {height} x {width} pixels: do_resize is false in the preprocessor"
                f" configuration, so both sides must be multiples of {config.factor}"
            )
        return frame
    new_h, new_w = smart_resize(height, width, config.factor, config.min_pixels, config.max_pixels)
    image = Image.fromarray(np.ascontiguousarray(frame[..., 0] if channels == 1 else frame))
    resized = image.resize((new_w, new_h), resample=Image.Resampling(config.resample))
    return np.asarray(resized).reshape(new_h, new_w, channels)


def _cut(
    frames: np.ndarray, config: ImageConfig, out: np.ndarray | None
) -> tuple[np.ndarray, tuple[int, int, int]]:
    p, m, s = config.patch_size, config.merge_size, config.temporal_patch_size
    count, height, width, channels = frames.shape
    t, h, w = -(-count // s), height // p, width // p
    split = frames.reshape(count, h // m, m, p, w // m, m, p, channels)
    blocks = split.transpose(0, 7, 1, 4, 2, 5, 3, 6).reshape(count, channels, h * w, p * p)
    if out is None:
        out = np.empty((t * h * w, 3 * s * p * p), np.float32)
    patches = out[: t * h * w]
    places = patches.reshape(t, h * w, 3, s, p * p)
    table = _rescaled(config.rescale_factor if config.do_rescale else None)
    for frame in range(count):
        # The last frame stands for those that a whole time step lacks.
        until = s if frame == count - 1 else frame % s + 1
        for channel in range(3):
            if channel < channels:
                values = table.take(blocks[frame, channel])
            one = _normalized(values, config, channel)
            places[frame // s, :, channel, frame % s : until] = one[:, None]
    return patches, (t, h, w)


@functools.lru_cache(maxsize=8)
def _rescaled(factor: float | None) -> np.ndarray:
    """What each 8-bit value becomes before normalisation, float32 [256], rounded as HF rounds."""
    values = np.arange(256, dtype=np.float64)
    return (values if factor is None else values * factor).astype(np.float32)


def _normalized(values: np.ndarray, config: ImageConfig, channel: int) -> np.ndarray:
    """Rescaled values [...] of a channel."""
    if not config.do_normalize:
        return values
    out = values - np.float32(config.image_mean[channel])
    out /= np.float32(config.image_std[channel])
    return out


def load_media(item: Any, **how: Any) -> np.ndarray:
    """The pixels alone of `read_media`: uint8 RGB [H, W, 3], or [T, H, W, 3] of a loop."""
    return read_media(item, **how).pixels


def read_media(
    item: Any,
    *,
    num_frames: int = 16,
    crop: bool | Literal["require"] = False,
    convert_rgb: bool = True,
    say: Say = silent,
) -> Media:
    """One image or video.

    Args:
      item: a path, a PIL image, a uint8 array [H, W, 3] or [T, H, W, 3], or a `Media` of one, which
        says how long its frames are apart. What a file is, its content tells (see
        `files.file_kind`). One that holds several frames (a DICOM, a video, an animated GIF, WebP
        or PNG, a TIFF of equal pages, NIfTI or MetaImage) is a video of up to `num_frames`, taken
        evenly; DICOM and video files tell its time.
      crop: cut DICOM frames to their ultrasound regions. What can't be cut so, as whatever is no
        DICOM file, is said; "require" refuses it.
      convert_rgb: False refuses a still image in any other mode than RGB.
      say: told, in one line each, what was done to values that eight bits don't hold, and what
        could not be cropped.

    Raises:
      InputError: one line with the file and what is wrong.
    """
    if crop and not (isinstance(item, str | Path) and file_kind(item) == "dicom"):
        name = shown(item) if isinstance(item, str | Path) else "the image"
        line = f"{name}: can't be cropped: only DICOM files state ultrasound regions"
        if crop == "require":
            raise InputError(line)
        say(line)
    if isinstance(item, Image.Image):
        return Media(decode_pil(item, "the image", convert_rgb, say))
    if isinstance(item, str | Path):
        if num_frames < 1:
            raise InputError(f"num_frames must be at least 1, found {num_frames}")
        kind, seconds = file_kind(item), None
        if kind in STILLS:
            frames = read_stills(item, num_frames=num_frames, convert_rgb=convert_rgb, say=say)
        elif kind in VOLUMES:
            from echovlm_jax.processing.volumes import read_volume

            frames = read_volume(item, kind, num_frames=num_frames, say=say)
        elif kind in VIDEOS:
            from echovlm_jax.processing.video import read_video

            video = read_video(item, kind, num_frames=num_frames, say=say)
            frames, seconds = video.pixels, video.seconds
        else:
            # Here: pydicom and its decoders take longer to import than all else that images need,
            # which every data worker would wait for.
            from echovlm_jax.processing.dicom import NOT_CROPPED, read_loop

            loop = read_loop(item, num_frames=num_frames, crop=crop)
            frames, seconds = loop.frames, loop.seconds
            if crop and not loop.cropped:
                say(f"{shown(item)}: {NOT_CROPPED}")
        return Media(frames[0]) if len(frames) == 1 else Media(frames, seconds)
    array, seconds = (item.pixels, item.seconds) if isinstance(item, Media) else (item, None)
    array = np.asarray(array)
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3:
        raise InputError(
            "an image must be a path, a PIL image or a uint8 array [H, W, 3] or [T, H, W, 3],"
            f" found {type(item).__name__} {array.dtype} {list(array.shape)}"
        )
    return Media(array, seconds)


def images_to_patches(
    items: Iterable[np.ndarray], config: ImageConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Several images (or several videos): patches [ΣP, 1176] float32 and grids [N, 3] int64."""
    patches, grids = zip(*(to_patches(item, config) for item in items), strict=True)
    return np.concatenate(patches), np.array(grids, np.int64)
