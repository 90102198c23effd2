"""Where a model looked: which part of a picture its answer depends on."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from echovlm_jax.errors import InputError
from echovlm_jax.processing.batch import PATCH_BUCKETS, bucket, make_batch


def where_looked(
    model: Any, inputs: Mapping[str, np.ndarray], answer: str, *, cells: int = 8, rows: int = 8
) -> list[np.ndarray]:
    """How much less likely an answer becomes when a part of a picture is grey.

    Each picture is cut into at most `cells` × `cells` parts of whole image tokens. One part after
    the other is made the mean grey of the processor (0 after normalising), and the answer's
    logarithmic probability is measured again (Zeiler and Fergus, arXiv 1311.2901, section 2.3). It
    needs a forward pass for each part.

    Args:
      model: what `load_model` gives.
      inputs: of one prompt with images, as `model.prepare` gives them.
      answer: the answer whose reasons are asked for, most often the model's own.
      cells: parts along a side of a picture, at most.
      rows: copies of the prompt that are read at one time; fewer need less memory.

    Returns:
      For each image, then each video (all its time steps together), float32 [rows, columns]: nats
      that the answer loses without that part. Below 0: it becomes likelier.

    Raises:
      InputError: no image there, an empty answer, or cells or rows below 1.
    """
    made = np.asarray(model.processor.tokenizer.encode(answer), np.int64)
    if not made.size:
        raise InputError("answer: is empty, so there is nothing to explain")
    if min(cells, rows) < 1:
        raise InputError(f"cells and rows must be at least 1, found {cells} and {rows}")
    merge = model.config.vision.spatial_merge_size
    grids = [
        (key, start, grid)
        for key, name in (("pixel_values", "image"), ("pixel_values_videos", "video"))
        for start, grid in _starts(inputs.get(f"{name}_grid_thw"))
    ]
    if not grids:
        raise InputError("images: none is given, so there is nothing to look at")
    parts, shapes = [], []
    for key, start, grid in grids:
        number, shape = _parts(grid, merge, cells)
        shapes.append(shape)
        parts += [(key, start + np.flatnonzero(number == n)) for n in range(shape[0] * shape[1])]
    whole, *lost = _log_probabilities(model, inputs, made, [None, *parts], rows)
    found, at = [], 0
    for shape in shapes:
        end = at + shape[0] * shape[1]
        found.append((whole - np.array(lost[at:end])).reshape(shape).astype(np.float32))
        at = end
    return found


def _starts(grids: Any) -> list[tuple[int, np.ndarray]]:
    """Each grid (t, h, w) with the number of its first patch."""
    if grids is None:
        return []
    ends = np.cumsum(np.prod(grids, axis=1))
    return [(int(end - np.prod(grid)), grid) for end, grid in zip(ends, grids, strict=True)]


def _parts(grid: np.ndarray, merge: int, cells: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Each patch's part, int [t·h·w] in the order of patches, and how many rows and columns."""
    steps, *sides = (int(n) for n in grid)
    high, wide = (side // merge for side in sides)
    rows, columns = min(high, cells), min(wide, cells)
    row, column = np.arange(high) * rows // high, np.arange(wide) * columns // wide
    token = (row[:, None] * columns + column[None]).reshape(-1)
    return np.tile(np.repeat(token, merge**2), steps), (rows, columns)


def _log_probabilities(
    model: Any,
    inputs: Mapping[str, np.ndarray],
    made: np.ndarray,
    parts: Sequence[tuple[str, np.ndarray] | None],
    rows: int,
) -> list[float]:
    """The answer's logarithmic probability, summed over its tokens, without each of the parts;
    `rows` of them at one time."""
    ids = np.concatenate([inputs["input_ids"], made[None]], axis=1)
    keys = [key for key in ("pixel_values", "pixel_values_videos") if key in inputs]
    room = bucket(sum(len(inputs[key]) for key in keys), PATCH_BUCKETS)
    whole = {**inputs, "input_ids": ids, "attention_mask": np.ones_like(ids)}
    columns, answer = bucket(ids.shape[1]), jnp.asarray(made)
    found: list[float] = []
    for first in range(0, len(parts), rows):
        chosen = list(parts[first : first + rows])
        chosen += [None] * (rows - len(chosen))  # the last lot is as large, of the same program
        made_rows = []
        for part in chosen:
            one = dict(whole)
            if part is not None:
                pixels = one[part[0]].copy()
                pixels[part[1]] = 0.0
                one[part[0]] = pixels
            made_rows.append(make_batch(model.config, one, seq_len=columns, max_patches=room))
        batch = {name: np.concatenate([row[name] for row in made_rows]) for name in made_rows[0]}
        scores = _answers(model.forward(batch)[:, -len(made) - 1 : -1], answer)
        found += np.asarray(scores).tolist()
    return found[: len(parts)]


@jax.jit
def _answers(logits: jax.Array, answer: jax.Array) -> jax.Array:
    """[B] float32: Σ of the answer's [N] logarithmic probabilities under logits [B, N, V]."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.take_along_axis(log_p, answer[None, :, None], axis=-1)[..., 0].sum(axis=-1)


def overlay(picture: np.ndarray, heat: np.ndarray, *, width: int = 320) -> Image.Image:
    """A picture with what `where_looked` found drawn over it in red: the more, the redder.

    Args:
      picture: uint8 [H, W, 3]; of a loop, [T, H, W, 3], the frame in the middle is shown.
      heat: [rows, columns], nats; values below 0 are drawn as 0. Full red is the largest of them,
        and at least log 2, which halves the answer's probability.
      width: of the result, px.
    """
    picture = picture[len(picture) // 2] if picture.ndim == 4 else picture
    height = max(1, round(width * picture.shape[0] / picture.shape[1]))
    base = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
    shown = np.clip(heat, 0.0, None)
    shown = 255 * shown / max(float(np.log(2)), shown.max())
    mask = Image.fromarray((0.6 * shown).astype(np.uint8)).resize(
        (width, height), Image.Resampling.NEAREST
    )
    return Image.composite(Image.new("RGB", base.size, (255, 40, 0)), base, mask)
