"""The sizes of an exam's images: within each image's limit, and small enough to fit a row.

`max_image_patches` is the processor's limit of an image, which holds as far as its resizing keeps
to it: slivers, and images below the least size, may get some patches more. They get them here too,
so that an image is the same in training and wherever the model is asked.

An exam is never split over rows. One that is too long is shortened, by this rule: first loops get
fewer frames, all of them half as many at a time, down to 2 (one time step); then all images and
frames get smaller, to the largest common limit of pixels that fits, no lower than the processor's
own minimum; if that doesn't do, the exam is too long. Text is never cut.
"""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from echovlm_jax.data.record import Medium
from echovlm_jax.errors import InputError
from echovlm_jax.processing.images import (
    MAX_RESIZED_PIXELS,
    ImageConfig,
    smart_resize,
    to_patches,
)
from echovlm_jax.processing.media import sampled, second_per_grid

NO_LIMIT = 2**40


class Grid(NamedTuple):
    """The size of one image or loop after resizing: t · h · w patches."""

    t: int  # time steps, of temporal_patch_size frames
    h: int  # patches
    w: int
    frames: int  # of a loop: so many, evenly spaced; 0: an image
    max_pixels: int  # the limit that gives this size

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w


class Need(NamedTuple):
    """The least budgets that an exam fits into as it is, with no image smaller for the row."""

    seq_len: int
    max_patches: int


def training_images(config: ImageConfig, max_image_patches: int, max_patches: int) -> ImageConfig:
    """How training turns a picture into patches: the model's own way, at training's own limit.

    A run states it in its preprocessor_config.json, so that its pictures have the same size
    wherever it is asked. The limit takes the place of the model's, be that larger or smaller.

    Args:
      config: the model's.
      max_image_patches: limit of an image, or of one time step of a loop.
      max_patches: capacity of a row; 0: no images.
    """
    most = min(max_image_patches, max_patches or max_image_patches) * config.patch_size**2
    most = min(most, MAX_RESIZED_PIXELS)
    # Pictures come from a dataset as RGB, whatever mode they were stored in.
    least = min(config.min_pixels, most)
    return dataclasses.replace(config, max_pixels=most, min_pixels=least, do_convert_rgb=True)


def fit(
    media: Sequence[Medium],
    text_tokens: int,
    seq_len: int,
    max_patches: int,
    max_image_patches: int,
    config: ImageConfig,
) -> tuple[Grid, ...] | None:
    """The sizes that an exam's media get, or None where it is too long even at the smallest.

    Args:
      media: the sizes as stored.
      text_tokens: the sample's tokens but for those that stand for patches.
      seq_len, max_patches: capacity of a row; a merged block of patches takes a token.
      max_image_patches: limit of an image, or of one time step of a loop.

    Raises:
      InputError: an image's sides are too unequal, or of sizes that don't divide where the
        configuration forbids resizing.
    """
    unit = config.merge_size**2
    room = min(max_patches, (seq_len - text_tokens) * unit)
    if room < 0:
        return None
    most = min(config.max_pixels, max_image_patches * config.patch_size**2)
    least = min(most, max(config.min_pixels, config.factor**2))

    def tried(frames: Sequence[int], limit: int) -> tuple[Grid, ...] | None:
        grids = tuple(
            _grid(medium.height, medium.width, n, limit, config)
            for medium, n in zip(media, frames, strict=True)
        )
        return grids if sum(grid.patches for grid in grids) <= room else None

    frames = [medium.frames for medium in media]
    grids = tried(frames, most)
    while grids is None and any(n > 2 for n in frames):
        frames = [n if n <= 2 else max(2, (n + 1) // 2) for n in frames]
        grids = tried(frames, most)
    if grids is not None or not config.do_resize:
        return grids
    # The largest limit, in steps of a merged block, that fits. Sizes go up with the limit but for
    # slivers of images, so what is found is checked, and may not be the very largest for those.
    block = config.factor**2
    grids, low, high = tried(frames, least), least // block, most // block
    while grids is not None and high - low > 1:
        middle = (low + high) // 2
        found = tried(frames, middle * block)
        grids, low, high = (grids, low, middle) if found is None else (found, middle, high)
    return grids


def whole(media: Sequence[Medium], max_image_patches: int, config: ImageConfig) -> tuple[Grid, ...]:
    """The sizes that media get where a row has room for anything.

    Raises:
      InputError: as `fit`.
    """
    grids = fit(media, 0, NO_LIMIT, NO_LIMIT, max_image_patches, config)
    assert grids is not None
    return grids


def needed(
    media: Sequence[Medium], text_tokens: int, max_image_patches: int, config: ImageConfig
) -> Need:
    """What seq_len and max_patches have to be for an exam to keep its sizes.

    Raises:
      InputError: as `fit`.
    """
    patches = sum(grid.patches for grid in whole(media, max_image_patches, config))
    return Need(text_tokens + patches // config.merge_size**2, patches)


@lru_cache(maxsize=2**16)
def _grid(height: int, width: int, frames: int, limit: int, config: ImageConfig) -> Grid:
    """As to_patches makes it with `limit` for max_pixels."""
    if config.do_resize:
        least = min(config.min_pixels, limit)
        height, width = smart_resize(height, width, config.factor, least, limit)
    elif height % config.factor or width % config.factor:
        raise InputError(
            f"image of {height} x {width} pixels: do_resize is false in the preprocessor"
            f" configuration, so both sides must be multiples of {config.factor}"
        )
    steps = -(-max(1, frames) // config.temporal_patch_size)
    return Grid(steps, height // config.patch_size, width // config.patch_size, frames, limit)


def seconds_of(media: Sequence[Medium], grids: Sequence[Grid], config: ImageConfig) -> np.ndarray:
    """Seconds that a time step of each loop lasts, of which a grid may have fewer frames than are
    stored: float64 [loops]."""
    return np.array(
        [
            second_per_grid(
                sampled(medium.seconds, medium.frames, grid.frames), config.temporal_patch_size
            )
            for medium, grid in zip(media, grids, strict=True)
            if grid.frames
        ]
    )


def cut(
    pixels: np.ndarray, grid: Grid, config: ImageConfig, out: np.ndarray | None = None
) -> np.ndarray:
    """An image or loop as the patches that its grid says.

    Args:
      pixels: uint8 [H, W, 3] or [T, H, W, 3].
      out: float32 [t·h·w, 1176] to write to; a new array by default.

    Returns:
      float32 [t·h·w, 1176], in the order of `to_patches`.

    Raises:
      InputError: the pixels are not of the size that the grid was made for.
    """
    if (pixels.ndim == 4) != (grid.frames > 0) or grid.frames > len(pixels):
        raise InputError(
            f"an image of shape {list(pixels.shape)} was planned as {_planned(grid)}; the data"
            " changed after the plan was made: build it anew"
        )
    height, width = pixels.shape[-3:-1]
    made = _grid(height, width, grid.frames, grid.max_pixels, config)
    if made != grid:
        raise InputError(
            f"an image of shape {list(pixels.shape)} makes {' x '.join(map(str, made[:3]))} patches"
            f" where {_planned(grid)} was planned; the data changed after the plan was made: build"
            " it anew"
        )
    if grid.frames:  # the same frames as processing takes of a loop that is too long
        pixels = pixels[np.arange(grid.frames) * len(pixels) // grid.frames]
    limited = dataclasses.replace(
        config, max_pixels=grid.max_pixels, min_pixels=min(config.min_pixels, grid.max_pixels)
    )
    patches, _ = to_patches(pixels, limited, out)
    return patches


def _planned(grid: Grid) -> str:
    what = f"a loop of {grid.frames} frames" if grid.frames else "an image"
    return f"{what} of {grid.t} x {grid.h} x {grid.w} patches"
