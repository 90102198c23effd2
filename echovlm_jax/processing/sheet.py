"""The pictures of one exam side by side, each with its ultrasound region outlined."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from echovlm_jax.processing.files import file_kind
from echovlm_jax.processing.images import load_media
from echovlm_jax.processing.levels import picks

GAP = 4  # px


def exam_sheet(images: Sequence[Any], *, height: int = 200, frames: int = 4) -> Image.Image:
    """Draws an exam: stills as they are, loops as a few of their frames.

    Of a DICOM file, the ultrasound region that its header states has an outline. Nothing else of a
    header is shown.

    Args:
      images: as of `load_media`.
      height: of each picture, px.
      frames: at most so many of a loop, evenly spaced.

    Raises:
      InputError: a file can't be used.
    """
    shown = [tile for item in images for tile in _tiles(item, height, frames)]
    width = sum(tile.width for tile in shown) + GAP * max(0, len(shown) - 1)
    sheet = Image.new("RGB", (max(width, 1), height), "white")
    at = 0
    for tile in shown:
        sheet.paste(tile, (at, 0))
        at += tile.width + GAP
    return sheet


def _tiles(item: Any, height: int, frames: int) -> list[Image.Image]:
    found = load_media(item, num_frames=frames)
    loop = found if found.ndim == 4 else found[None]
    region = None
    if isinstance(item, str | Path) and file_kind(item) == "dicom":
        # Here: pydicom and its decoders take longer to import than all else.
        from echovlm_jax.processing.dicom import read_region

        region = read_region(item)
    return [_tile(loop[i], region, height) for i in picks(len(loop), min(frames, len(loop)))]


def _tile(frame: np.ndarray, region: tuple[int, int, int, int] | None, height: int) -> Image.Image:
    scale = height / frame.shape[0]
    size = (max(1, round(frame.shape[1] * scale)), height)
    tile = Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR)
    if region is not None:
        top, bottom, left, right = (round(edge * scale) for edge in region)
        box = (left, top, max(left, min(right, size[0]) - 1), max(top, min(bottom, height) - 1))
        ImageDraw.Draw(tile).rectangle(box, outline=(255, 200, 0), width=2)
    return tile
