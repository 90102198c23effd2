"""M-RoPE position ids: three rows (time, height, width) that count text and span images."""

from typing import Any

import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.errors import InputError

_NO_GRIDS = np.zeros((0, 3), np.int64)


def mrope_positions(
    input_ids: Any,
    attention_mask: Any | None = None,
    image_grid_thw: Any | None = None,
    video_grid_thw: Any | None = None,
    *,
    config: ModelConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """Position ids of a padded batch.

    Text counts up equally in all three rows. An image or video of grid (t, h, w) takes
    t · h/m · w/m tokens, row-major, whose rows are their (t, h, w) index plus the running
    position; text goes on at the largest id so far + 1. For example, with m = 2, one word, an image
    of grid (1, 4, 4) and one word:

        time    0  1 1 1 1  3
        height  0  1 1 2 2  3
        width   0  1 2 1 2  3

    (A newer rule steps by max(h, w)/m instead; it differs for videos with t > max(h, w)/m only.)

    Args:
      input_ids: int [B, S], vision tokens already expanded.
      attention_mask: [B, S], 0 at padding; None = no padding.
      image_grid_thw, video_grid_thw: int [N, 3] in patches, of all rows in order.
      config: source of the token ids and the merge size.

    Returns:
      position_ids int64 [3, B, S], 1 at padding; deltas int64 [B], so that a new token in column c
      has position c + delta: largest id + 1 − S.

    Raises:
      InputError: vision tokens and grids don't match in number.
    """
    ids = np.asarray(input_ids)
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise InputError(
            f"input_ids and attention_mask must be [B, S] alike, found {ids.shape}, {mask.shape}"
        )
    queues = {
        "image": (config.image_token_id, _grids(image_grid_thw, "image_grid_thw")),
        "video": (config.video_token_id, _grids(video_grid_thw, "video_grid_thw")),
    }
    used = dict.fromkeys(queues, 0)
    positions = np.ones((3, *ids.shape), np.int64)
    largest = np.full(len(ids), -1, np.int64)
    for b, row in enumerate(ids):
        tokens = row[mask[b]]
        placed = _row_positions(tokens, queues, used, config.vision.spatial_merge_size)
        positions[:, b, mask[b]] = placed
        largest[b] = placed.max(initial=-1)
    for kind, (_, grids) in queues.items():
        if used[kind] != len(grids):
            raise InputError(
                f"{len(grids)} {kind}s are given but the tokens hold {used[kind]}:"
                f" one mark for each {kind}"
            )
    return positions, largest + 1 - ids.shape[1]


def _row_positions(
    tokens: np.ndarray,
    queues: dict[str, tuple[int, np.ndarray]],
    used: dict[str, int],
    merge: int,
) -> np.ndarray:
    """[3, len(tokens)]; counts the grids it takes in `used`."""
    out = np.empty((3, len(tokens)), np.int64)
    kinds = {token: kind for kind, (token, _) in queues.items()}
    vision = np.flatnonzero(np.isin(tokens, list(kinds)))
    at = running = 0  # the next column, and the next free position
    while at < len(tokens):
        following = vision[np.searchsorted(vision, at) :]
        start = int(following[0]) if len(following) else len(tokens)
        out[:, at:start] = running + np.arange(start - at)
        running += start - at
        if start == len(tokens):
            break
        token = int(tokens[start])
        kind = kinds[token]
        grids = queues[kind][1]
        if used[kind] == len(grids):
            raise InputError(
                f"the tokens hold more {kind}s than the {len(grids)} given: one for each mark"
            )
        t, h, w = grids[used[kind]] // (1, merge, merge)
        used[kind] += 1
        end = start + int(t * h * w)
        if end > len(tokens) or np.any(tokens[start:end] != token):
            raise InputError(
                f"{kind} {used[kind]} of grid {t} x {h} x {w} needs {t * h * w} tokens in a row,"
                " the input has fewer"
            )
        out[:, start:end] = running + np.indices((t, h, w)).reshape(3, -1)
        running += max(t, h, w)
        at = end
    return out


def _grids(value: Any | None, name: str) -> np.ndarray:
    grids = _NO_GRIDS if value is None else np.asarray(value)
    if grids.ndim != 2 or grids.shape[1] != 3 or not np.issubdtype(grids.dtype, np.integer):
        raise InputError(f"{name} must be whole numbers [N, 3], found {list(grids.shape)}")
    if np.any(grids < 1):
        raise InputError(f"{name} must be at least 1 everywhere")
    return grids.astype(np.int64)
