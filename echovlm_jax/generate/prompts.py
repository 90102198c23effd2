"""Prompts as the engine takes them: row by row, each padded to its own buckets.

A row's image tokens and its other columns are rounded up apart from each other, so that one
question asked about images of many sizes needs one prefill program for each bucket of image sizes
and no more.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.errors import InputError
from echovlm_jax.processing.batch import PATCH_BUCKETS, bucket, make_batch
from echovlm_jax.processing.processor import check_length

Inputs = Mapping[str, np.ndarray]


class Prompt(NamedTuple):
    """What `engine.prefill` reads: rows of S columns, their own first, padding behind them."""

    batch: dict[str, Any]  # a model batch (see `EchoVLM`)
    length: Any  # [B] int32: columns that are the rows' own
    position: Any  # [B] int32: of the token that comes next


def check_new_tokens(config: ModelConfig, new: int) -> None:
    """Refuses a number of new tokens that no prompt leaves room for (InputError)."""
    limit = config.text.max_position_embeddings
    if not isinstance(new, int | np.integer) or isinstance(new, bool) or not 1 <= new < limit:
        raise InputError(
            f"max_new_tokens must be a whole number, at least 1 and below this model's"
            f" max_position_embeddings {limit}: {new!r}"
        )


def check_room(config: ModelConfig, prompt: int, new: int) -> None:
    """Refuses a prompt of `prompt` tokens that leaves no room for `new` more (InputError)."""
    limit = config.text.max_position_embeddings
    check_length(prompt, limit - new, f"max_position_embeddings {limit} less max_new_tokens {new}:")


def prompt_lengths(inputs: Inputs) -> np.ndarray:
    """Tokens of each row [B], padding not counted."""
    return (_mask(inputs) != 0).sum(axis=1)


def split_rows(config: ModelConfig, inputs: Inputs) -> list[Prompt]:
    """Each row of Hugging Face-style inputs as a prompt of its own.

    Padding before a row's first token is left out. The next token follows the last column, whatever
    that holds: padding elsewhere stays, and is seen by nobody.

    Raises:
      InputError: tokens that the model doesn't have, or a prompt above the largest bucket.
    """
    ids, mask = np.asarray(inputs["input_ids"]), _mask(inputs) != 0
    if ids.min() < 0 or ids.max() >= config.text.vocab_size:
        raise InputError(
            f"token ids {ids.min()} to {ids.max()} lie outside vocab_size"
            f" {config.text.vocab_size}; the tokenizer belongs to another model"
        )
    batch = make_batch(config, inputs)
    positions = batch["positions"].max(axis=1)
    if (np.isin(ids, (config.image_token_id, config.video_token_id)) & mask).any():
        # Padding has position 1. As in PyTorch it only counts where the batch is text alone, which
        # shows in rows of a single token.
        positions = np.where(mask, positions, -1)
    following = positions.max(axis=1).astype(np.int32) + 1
    rows = [{name: array[b : b + 1] for name, array in batch.items()} for b in range(len(ids))]
    return [
        _padded(config, row, int(own.argmax()) if own.any() else ids.shape[1] - 1, following[b])
        for b, (row, own) in enumerate(zip(rows, mask, strict=True))
    ]


def _padded(config: ModelConfig, row: dict[str, np.ndarray], first: int, position: int) -> Prompt:
    """A row [1, S] from its first column on, filled up to its buckets."""
    unit, images = config.vision.merge_unit, 0
    if "patches" in row:
        images = int((row["patch_index"] >= 0).sum())
    length = row["tokens"].shape[1] - first
    room = bucket(4 * images, PATCH_BUCKETS) // 4 if images else 0  # the buckets count 4 a token
    columns = room + bucket(max(length - images, 1))
    fill = {"positions": 1, "patch_index": -1}
    batch = {}
    for name, array in row.items():
        if name.startswith("patch") and not images:
            continue
        if name in ("tokens", "positions", "segment_ids", "patch_index"):
            array, axis, size = array[..., first:], array.ndim - 1, columns
        else:
            array, axis, size = array[:, : images * unit], 1, room * unit
        gaps = [(0, size - n if i == axis else 0) for i, n in enumerate(array.shape)]
        batch[name] = np.pad(array, gaps, constant_values=fill.get(name, 0))
    one = np.ones(1, np.int32)
    return Prompt(batch, length * one, position * one)


def _mask(inputs: Inputs) -> np.ndarray:
    mask = inputs.get("attention_mask")
    return np.ones_like(inputs["input_ids"]) if mask is None else np.asarray(mask)
