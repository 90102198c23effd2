"""The files of one exam as the page takes them: read at once, then forgotten but for their pixels.

Neither a file's name nor its header goes further than this file; messages say "file 2".
"""

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from echovlm_jax.data.record import Medium
from echovlm_jax.errors import InputError
from echovlm_jax.processing import burned_in
from echovlm_jax.processing.files import file_kind, shown
from echovlm_jax.processing.images import read_media
from echovlm_jax.processing.levels import picks
from echovlm_jax.processing.media import Media

MAX_FILES = 16  # of one exam
MAX_BYTES = 256 * 2**20  # of one file
_HEIGHT, _FRAMES = 180, 4  # px of a picture as it is shown; of a loop so many frames

Crop = bool | Literal["require"]


@dataclass
class Exam:
    """What is kept of the files.

    Attributes:
      pictures: uint8 [H, W, 3], or [T, H, W, 3] of a loop, whose frames are chosen already.
      warnings: a line each, about the files.
      seconds: of each, as `Media` has them; where the list ends, not known.
    """

    pictures: list[np.ndarray] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)

    @property
    def given(self) -> list[Media]:
        """The pictures as a model takes them."""
        both = itertools.zip_longest(self.pictures, self.seconds)
        return [Media(picture, seconds) for picture, seconds in both]

    @property
    def media(self) -> list[Medium]:
        """The pictures as questions name them."""
        return [
            Medium(len(picture) if picture.ndim == 4 else 0, *picture.shape[-3:-1])
            for picture in self.pictures
        ]


def read_exam(paths: Sequence[str | Path], *, num_frames: int, crop: Crop) -> Exam:
    """Reads the files of an exam.

    Args:
      paths: its files, at least one; whatever `read_media` reads.
      num_frames: how many frames are taken of a loop, at most.
      crop: as of `read_media`.

    Raises:
      InputError: no file or too many, or one that can't be used.
    """
    if not paths:
        raise InputError("the exam is empty; drop its images first")
    if len(paths) > MAX_FILES:
        raise InputError(f"an exam has at most {MAX_FILES} files here, these are {len(paths)}")
    exam = Exam()
    for number, path in enumerate(paths, 1):
        try:
            media, said = _read(path, num_frames, crop)
        except InputError as error:
            raise InputError(_unnamed(str(error), path, number)) from None
        exam.pictures.append(media.pixels)
        exam.seconds.append(media.seconds)
        exam.warnings += [
            f"file {number}: {_unnamed(line, path, number).removeprefix(f'file {number}: ')}"
            for line in said
        ]
    exam.warnings += text_warnings(exam.pictures)
    return exam


def _read(path: str | Path, num_frames: int, crop: Crop) -> tuple[Media, list[str]]:
    """As `read_media`, and what to warn of."""
    said: list[str] = []
    if file_kind(path) != "dicom":
        return read_media(path, num_frames=num_frames, crop=crop, say=said.append), said
    # Here: pydicom and its decoders take longer to import than all else.
    from echovlm_jax.processing.dicom import NOT_CROPPED, read_loop

    loop = read_loop(path, num_frames=num_frames, crop=crop)
    if crop and not loop.cropped:
        said.append(NOT_CROPPED)
    if loop.burned_in:
        said.append("it says that its pixels name somebody")
    if burned_in.drawn_outside(loop.frames, loop.regions):
        said.append("something is drawn outside its ultrasound regions; it may name somebody")
    frames = loop.frames[0] if len(loop.frames) == 1 else loop.frames
    return Media(frames, loop.seconds), said


def text_warnings(pictures: Sequence[np.ndarray]) -> list[str]:
    """What OCR says of the pixels, a line for each file that has text, for each loop of which not
    all was looked at, or why it did not look.

    Args:
      pictures: of the files, in order; of a loop the first and the last frame are looked at.
    """
    warnings = []
    for number, picture in enumerate(pictures, 1):
        ends = picture[[0, -1]] if picture.ndim == 4 else picture
        try:
            boxes = burned_in.found(ends)
        except InputError as error:
            return [*warnings, f"names in the pixels were not looked for: {error}"]
        if boxes:
            warnings.append(f"file {number}: text was found in its pixels; it may name somebody")
        elif picture.ndim == 4 and len(picture) > 2:
            line = "only the first and the last frame of this loop were searched for text"
            warnings.append(f"file {number}: {line}; none was found")
    return warnings


def _unnamed(line: str, path: str | Path, number: int) -> str:
    """A message about a file with its number in place of its path: a name may be a patient's."""
    return line.replace(shown(path), f"file {number}")


def tiles(picture: np.ndarray) -> list[str]:
    """An image, or a few frames of a loop, small, as addresses that hold the pixels themselves."""
    loop = picture if picture.ndim == 4 else picture[None]
    return [
        as_address(Image.fromarray(loop[i]), _HEIGHT)
        for i in picks(len(loop), min(_FRAMES, len(loop)))
    ]


def as_address(image: Image.Image, height: int) -> str:
    """A picture of that height as a `data:` address: it needs no file that could be left behind."""
    size = (max(1, round(image.width * height / image.height)), height)
    data = io.BytesIO()
    image.resize(size, Image.Resampling.BILINEAR).save(data, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
