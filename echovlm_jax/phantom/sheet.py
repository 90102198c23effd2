"""One picture of what phantoms look like: a row for each organ, a column for each diagnosis."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from echovlm_jax.data.disk import writing
from echovlm_jax.data.keys import mix, text_key
from echovlm_jax.data.record import ORGANS
from echovlm_jax.phantom.exam import DIAGNOSES, make_exam
from echovlm_jax.phantom.render import render
from echovlm_jax.phantom.words import DIAGNOSES as NAMES

_TILE = (156, 132)  # px, width and height
_STRIP = 13  # px for a name above each
_LEVELS = 12  # of grey: speckle hides the steps, and the file is a third as large


def contact_sheet(path: str | Path, seed: int = 0) -> dict[str, Any]:
    """Writes the sheet as PNG; another seed shows other exams.

    Returns:
      path, width, height (px) and bytes.

    Raises:
      InputError: the file can't be written.
    """
    path = Path(path)
    columns = max(len(found) for found in DIAGNOSES.values())
    width, height = columns * _TILE[0], len(ORGANS) * (_TILE[1] + _STRIP) + _STRIP
    sheet = Image.new("L", (width, height))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(9)
    draw.text((3, 0), "SYNTHETIC EXAMS: simulated, of nobody", fill=255, font=font)
    for row, organ in enumerate(ORGANS):
        for column, diagnosis in enumerate(DIAGNOSES[organ]):
            left, top = column * _TILE[0], _STRIP + row * (_TILE[1] + _STRIP)
            draw.text((left + 3, top), NAMES[organ][diagnosis][0], fill=220, font=font)
            sheet.paste(_tile(organ, diagnosis, seed), (left, top + _STRIP))
    steps = np.round(np.asarray(sheet) * ((_LEVELS - 1) / 255)) * (255 / (_LEVELS - 1))
    picture = Image.fromarray(steps.astype(np.uint8)).quantize(_LEVELS)
    part = path.with_name(path.name + ".part")
    try:
        with writing(path):
            picture.save(part, "png", optimize=True)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return {"path": str(path), "width": width, "height": height, "bytes": path.stat().st_size}


def _tile(organ: str, diagnosis: str, seed: int) -> Image.Image:
    key = text_key(f"sheet/{organ}")
    tries = (make_exam(int(mix(key, seed, n)), organ, cine=0.0) for n in range(10**6))
    exam = next(exam for exam in tries if exam.diagnosis == diagnosis)
    view = exam.views[0]._replace(width=_TILE[0] * 3 // 2, height=_TILE[1] * 3 // 2)
    return Image.fromarray(render(exam, view)[..., 0]).resize(_TILE, Image.Resampling.BILINEAR)
