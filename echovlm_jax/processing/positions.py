"""M-RoPE position ids: three rows (time, height, width) that count text and span images."""

from typing import Any, NamedTuple

import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.errors import InputError

_NO_GRIDS = np.zeros((0, 3), np.int64)
_MAX_SECONDS = 1e5  # more than a day a step; ids stay within int32


class _Media(NamedTuple):
    """Images or videos in order: their token, grids [N, 3] and, in time, ids a step [N]."""

    token: int
    grids: np.ndarray
    interval: np.ndarray | None = None


def mrope_positions(
    input_ids: Any,
    attention_mask: Any | None = None,
    image_grid_thw: Any | None = None,
    video_grid_thw: Any | None = None,
    *,
    config: ModelConfig,
    second_per_grid_ts: Any | None = None,
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

    Where the configuration has `tokens_per_second`, a video's time rows count time: step i is at
    trunc(i · tokens_per_second · seconds a step), in float32, plus the running position. Text goes
    on at the largest id + 1, as these models were trained. For example, with 2 tokens a second,
    three steps of 1.25 seconds are at 0, 2 and 5 (Qwen2.5-VL, arXiv 2502.13923, section 2.1).

    Args:
      input_ids: int [B, S], vision tokens already expanded.
      attention_mask: [B, S], 0 at padding; None = no padding.
      image_grid_thw, video_grid_thw: int [N, 3] in patches, of all rows in order.
      config: source of the token ids, the merge size and tokens_per_second.
      second_per_grid_ts: seconds [videos] that one step of each video's grid lasts: of a video of
        f sampled frames a second temporal_patch_size / f. None: 1, as PyTorch's models take it.
        Read only with tokens_per_second.

    Returns:
      position_ids int64 [3, B, S], 1 at padding; deltas int64 [B], so that a new token in column c
      has position c + delta: largest id + 1 − S.

    Raises:
      InputError: vision tokens, grids and seconds don't match in number; seconds that can't be.
    """
    ids = np.asarray(input_ids)
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise InputError(
            f"input_ids and attention_mask must be [B, S] alike, found {ids.shape}, {mask.shape}"
        )
    videos = _grids(video_grid_thw, "video_grid_thw")
    interval = None
    if config.tokens_per_second is not None:
        interval = config.tokens_per_second * _seconds(second_per_grid_ts, len(videos))
    queues = {
        "image": _Media(config.image_token_id, _grids(image_grid_thw, "image_grid_thw")),
        "video": _Media(config.video_token_id, videos, interval),
    }
    used = dict.fromkeys(queues, 0)
    positions = np.ones((3, *ids.shape), np.int64)
    largest = np.full(len(ids), -1, np.int64)
    for b, row in enumerate(ids):
        tokens = row[mask[b]]
        placed = _row_positions(tokens, queues, used, config.vision.spatial_merge_size)
        positions[:, b, mask[b]] = placed
        largest[b] = placed.max(initial=-1)
    for kind, media in queues.items():
        if used[kind] != len(media.grids):
            raise InputError(
                f"{len(media.grids)} {kind}s are given but the tokens hold {used[kind]}:"
                f" one mark for each {kind}"
            )
    return positions, largest + 1 - ids.shape[1]


def _row_positions(
    tokens: np.ndarray,
    queues: dict[str, _Media],
    used: dict[str, int],
    merge: int,
) -> np.ndarray:
    """[3, len(tokens)]; counts the grids it takes in `used`."""
    out = np.empty((3, len(tokens)), np.int64)
    kinds = {media.token: kind for kind, media in queues.items()}
    vision = np.flatnonzero((tokens[:, None] == list(kinds)).any(-1))
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
        _, grids, interval = queues[kind]
        if used[kind] == len(grids):
            raise InputError(
                f"the tokens hold more {kind}s than the {len(grids)} given: one for each mark"
            )
        t, h, w = grids[used[kind]] // (1, merge, merge)
        step = 1 if interval is None else interval[used[kind]]
        used[kind] += 1
        end = start + int(t * h * w)
        if end > len(tokens) or np.any(tokens[start:end] != token):
            raise InputError(
                f"{kind} {used[kind]} of grid {t} x {h} x {w} needs {t * h * w} tokens in a row,"
                " the input has fewer"
            )
        place = np.indices((t, h, w)).reshape(3, -1)
        place[0] = place[0].astype(np.float32) * step  # what is assigned to integers is truncated
        out[:, start:end] = running + place
        running += int(place.max()) + 1
        at = end
    return out


def _grids(value: Any | None, name: str) -> np.ndarray:
    grids = _NO_GRIDS if value is None else np.asarray(value)
    if grids.ndim != 2 or grids.shape[1] != 3 or not np.issubdtype(grids.dtype, np.integer):
        raise InputError(f"{name} must be whole numbers [N, 3], found {list(grids.shape)}")
    if np.any(grids < 1):
        raise InputError(f"{name} must be at least 1 everywhere")
    return grids.astype(np.int64)


def _seconds(value: Any | None, videos: int) -> np.ndarray:
    """Seconds a step, float32 [videos]."""
    if value is None:
        return np.ones(videos, np.float32)
    try:
        seconds = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise InputError(f"second_per_grid_ts must be numbers, found {value!r}") from None
    if seconds.shape != (videos,):
        raise InputError(
            f"second_per_grid_ts has shape {list(seconds.shape)} and there are {videos} videos:"
            " give one number for each"
        )
    if not np.all((seconds > 0) & (seconds < _MAX_SECONDS)):
        raise InputError(
            f"second_per_grid_ts must be above 0 and below {_MAX_SECONDS:g} seconds, found"
            f" {seconds.tolist()}"
        )
    return seconds
