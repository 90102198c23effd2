"""From a row's samples to its arrays: exams one after another from the left, each by itself."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.data.encode import IGNORED, encode
from echovlm_jax.data.epoch import Sample
from echovlm_jax.data.examples import Source, example, open_source
from echovlm_jax.data.fit import Grid, cut, seconds_of
from echovlm_jax.data.record import ORGANS
from echovlm_jax.data.settings import Settings
from echovlm_jax.data.workers import Layout
from echovlm_jax.errors import InputError
from echovlm_jax.processing.batch import frame_positions
from echovlm_jax.processing.positions import mrope_positions

# What stands where a row has no exam; the other arrays have 0.
_PADDING = {"labels": IGNORED, "positions": 1, "patch_index": -1}


def row_layout(settings: Settings, model: ModelConfig) -> Layout:
    """Shape and dtype of each array of one row; a batch has B of them in front.

    No patch arrays where `max_patches` is 0.
    """
    length, patches = settings.seq_len, settings.max_patches
    layout = {
        "tokens": ((length,), np.int32),
        "labels": ((length,), np.int32),
        "segment_ids": ((length,), np.int32),
        "organs": ((length,), np.int32),
        "positions": ((3, length), np.int32),
    }
    if patches:
        layout |= {
            "patches": ((patches, model.vision.patch_dim), np.float32),
            "patch_segment_ids": ((patches,), np.int32),
            "patch_positions": ((patches, 2), np.int32),
            "patch_index": ((length,), np.int32),
        }
    return layout


def fill_row(
    source: Source,
    samples: Sequence[Sample],
    out: Mapping[str, np.ndarray],
    note: Callable[[int], None] = lambda n: None,
) -> None:
    """Builds one packed row.

    The n-th sample's tokens have segment id n + 1 and positions of their own, from 0; the k-th
    frame (time step) of the row has patch segment id k + 1; a vision token's patch_index is the
    number of its merged patch in the row; organs are places in `record.ORGANS`, and the number
    after the last for others. What is left over has segment 0.

    Args:
      samples: those planned, in order.
      out: arrays as in `row_layout`; every element is written.
      note: callback, with n when the n-th sample is begun.

    Raises:
      InputError: an image can't be read, or a sample isn't what was planned.
    """
    at = patch = frame = 0
    for n, sample in enumerate(samples):
        note(n)
        made = example(source, sample.record, sample.key)
        encoded = encode(source.tokenizer, source.model, made.turns, made.vision)
        if (len(encoded.tokens), made.patches) != (sample.tokens, sample.patches):
            raise InputError(
                f"has {len(encoded.tokens)} tokens and {made.patches} patches where {sample.tokens}"
                f" and {sample.patches} were planned; the data changed after the plan was made:"
                " start again"
            )
        end = at + sample.tokens
        out["tokens"][at:end] = encoded.tokens
        out["labels"][at:end] = encoded.labels
        out["segment_ids"][at:end] = n + 1
        out["organs"][at:end] = _organ(source, sample.record)
        seconds = seconds_of(made.record.media, made.grids, source.images)
        out["positions"][:, at:end] = _positions(source.model, encoded.tokens, made.grids, seconds)
        if "patches" in out:
            _index(source.model, encoded.tokens, patch, out["patch_index"][at:end])
            patch, frame = _patches(source, sample, made.grids, patch, frame, out)
        at = end
    for name, array in out.items():
        per_patch = name in ("patches", "patch_segment_ids", "patch_positions")
        rest = array[patch:] if per_patch else array[..., at:]
        rest[...] = _PADDING.get(name, 0)


_opened = lru_cache(maxsize=1)(open_source)


def fill_row_in_worker(
    settings: Settings,
    samples: Sequence[Sample],
    out: Mapping[str, np.ndarray],
    note: Callable[[int], None],
) -> None:
    """`fill_row` of a process that opens the data for itself, for its first row."""
    fill_row(_opened(settings), samples, out, note)


def _organ(source: Source, record: int) -> int:
    """An exam's place in ORGANS; the number after the last for every other organ."""
    name = source.dataset.organ_names[source.dataset.organs[record]]
    return ORGANS.index(name) if name in ORGANS else len(ORGANS)


def _positions(
    model: ModelConfig, tokens: np.ndarray, grids: Sequence[Grid], seconds: np.ndarray
) -> np.ndarray:
    """The M-RoPE ids of one exam by itself: [3, tokens]."""
    of_kind = [
        np.array([g[:3] for g in grids if bool(g.frames) == video], np.int64).reshape(-1, 3)
        for video in (False, True)
    ]
    ids, _ = mrope_positions(tokens[None], None, *of_kind, config=model, second_per_grid_ts=seconds)
    return ids[:, 0]


def _index(model: ModelConfig, tokens: np.ndarray, patch: int, out: np.ndarray) -> None:
    """Each vision token's merged patch in the row, the first of which comes after `patch`."""
    vision = (tokens == model.image_token_id) | (tokens == model.video_token_id)
    first = patch // model.vision.merge_unit
    out[:] = np.where(vision, first + np.cumsum(vision) - 1, -1)


def _patches(
    source: Source,
    sample: Sample,
    grids: Sequence[Grid],
    patch: int,
    frame: int,
    out: Mapping[str, np.ndarray],
) -> tuple[int, int]:
    """Writes an exam's patches from number `patch` on; returns where the next exam's begin, and
    the number of frames so far."""
    media = source.dataset.media(sample.record) if grids else []
    if len(media) != len(grids):
        raise InputError(f"has {len(media)} images where {len(grids)} were planned")
    for pixels, grid in zip(media, grids, strict=True):
        end, area = patch + grid.patches, grid.h * grid.w
        cut(pixels, grid, source.images, out["patches"][patch:end])
        out["patch_segment_ids"][patch:end] = frame + 1 + np.repeat(np.arange(grid.t), area)
        places = frame_positions(grid.h, grid.w, source.images.merge_size)
        out["patch_positions"][patch:end] = np.tile(places, (grid.t, 1))
        patch, frame = end, frame + grid.t
    return patch, frame
