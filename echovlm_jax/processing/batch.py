"""From HF-style inputs to the model's batch: static shapes, one patch buffer a row."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.errors import InputError
from echovlm_jax.processing.positions import mrope_positions

# Sizes that programs are compiled for: powers of two and the steps halfway between, so at most a
# third of a buffer is padding, once there is more than the smallest holds. A prompt or image takes
# the smallest that holds it. 784 patches are the recipe's largest image, which larger ones are
# resized to: those have no padding.
SEQUENCE_BUCKETS = (
    64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384,
    24576, 32768,
)  # fmt: skip
PATCH_BUCKETS = tuple(sorted([784, *(4 * n for n in SEQUENCE_BUCKETS)]))


def bucket(n: int, buckets: Sequence[int] = SEQUENCE_BUCKETS) -> int:
    """The smallest bucket that holds n. Raises InputError when n exceeds the largest."""
    for size in buckets:
        if n <= size:
            return size
    raise InputError(f"a length of {n} exceeds the largest bucket, {buckets[-1]}; shorten it")


def pad_batch(
    inputs: Sequence[Mapping[str, Any]], pad_id: int, side: str = "left"
) -> dict[str, np.ndarray]:
    """Joins HF-style inputs of single prompts to one padded batch.

    Args:
      inputs: each with input_ids and attention_mask [1, S_i]; pixel_values and the like where it
        has images or videos.
      pad_id: the token under attention_mask 0.
      side: 'left' (for generation: the last column is every row's newest token) or 'right'.

    Returns:
      the same keys, [B, max S_i]; patches and grids joined in order.
    """
    if side not in ("left", "right"):
        raise InputError(f"side must be left or right, found {side!r}")
    if not inputs:
        raise InputError("a batch needs at least one prompt")
    width = max(np.shape(one["input_ids"])[1] for one in inputs)
    out: dict[str, np.ndarray] = {}
    for key, fill in (("input_ids", pad_id), ("attention_mask", 0)):
        rows = []
        for one in inputs:
            row = np.asarray(one[key], np.int64)
            gap = (width - row.shape[1], 0) if side == "left" else (0, width - row.shape[1])
            rows.append(np.pad(row, ((0, 0), gap), constant_values=fill))
        out[key] = np.concatenate(rows)
    for key in (
        *("pixel_values", "image_grid_thw"),
        *("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"),
    ):
        if found := [np.asarray(one[key]) for one in inputs if one.get(key) is not None]:
            out[key] = np.concatenate(found)
    return out


def make_batch(
    config: ModelConfig,
    inputs: Mapping[str, Any],
    *,
    seq_len: int | None = None,
    max_patches: int | None = None,
) -> dict[str, np.ndarray]:
    """The model's batch from HF-style inputs (of the processor, or of a golden file).

    Args:
      inputs: input_ids [B, S]; attention_mask [B, S] (absent: no padding); pixel_values
        [ΣP, 1176] with image_grid_thw [N, 3], the images of all rows in order; the same with
        pixel_values_videos and video_grid_thw, and with second_per_grid_ts [videos] where there is
        one.
      seq_len: length to pad to, on the left; padding already there stays where it is.
      max_patches: patches a row to pad to, a multiple of the merge unit; None = the fullest row's.

    Returns:
      tokens, segment_ids int32 [B, S] (segment 0 = padding), positions int32 [B, 3, S]; and where
      there are images, or max_patches is given: patches float32 [B, P, 1176], patch_segment_ids
      int32 [B, P] (a number for each frame from 1, 0 = padding), patch_positions int32 [B, P, 2]
      (h, w in patches), patch_index int32 [B, S] (a vision token's merged patch, −1 = text).

    Raises:
      InputError: counts of tokens, grids and pixels disagree, or a row exceeds a given size.
    """
    ids = np.asarray(inputs["input_ids"])
    mask = inputs.get("attention_mask")
    mask = np.ones_like(ids) if mask is None else (np.asarray(mask) != 0).astype(ids.dtype)
    extra = 0 if seq_len is None else seq_len - ids.shape[1]
    if extra < 0:
        raise InputError(f"a prompt of {ids.shape[1]} tokens exceeds the length {seq_len}")
    ids, mask = (np.pad(a, ((0, 0), (extra, 0))) for a in (ids, mask))
    grids = {kind: inputs.get(f"{kind}_grid_thw") for kind in ("image", "video")}
    seconds = inputs.get("second_per_grid_ts")
    positions, _ = mrope_positions(
        ids, mask, grids["image"], grids["video"], config=config, second_per_grid_ts=seconds
    )
    batch = {
        "tokens": ids.astype(np.int32),
        "positions": np.ascontiguousarray(positions.transpose(1, 0, 2)).astype(np.int32),
        "segment_ids": mask.astype(np.int32),
    }
    has_vision = any(inputs.get(key) is not None for key in ("pixel_values", "pixel_values_videos"))
    if has_vision or max_patches is not None:
        batch |= _patch_buffers(config, ids, mask, inputs, max_patches)
    elif any(grid is not None for grid in grids.values()):
        raise InputError("image grids are given without pixel_values")
    return batch


def _patch_buffers(
    config: ModelConfig,
    ids: np.ndarray,
    mask: np.ndarray,
    inputs: Mapping[str, Any],
    max_patches: int | None,
) -> dict[str, np.ndarray]:
    unit, merge = config.vision.merge_unit, config.vision.spatial_merge_size
    index, _ = _vision_index(config, ids, mask)
    counts = (index.max(axis=1) + 1) * unit
    width = max(int(counts.max()), unit) if max_patches is None else max_patches
    if width % unit or counts.max() > width:
        raise InputError(
            f"a row has {int(counts.max())} patches, the buffer {width};"
            f" it must hold them all and be a multiple of {unit}"
        )
    rows = len(ids)
    patches = np.zeros((rows, width, config.vision.patch_dim), np.float32)
    segments = np.zeros((rows, width), np.int32)
    places = np.zeros((rows, width, 2), np.int32)
    media = {kind: iter(_media(config, inputs, kind)) for kind in ("image", "video")}
    for b in range(rows):
        at = frame = 0
        while at < counts[b]:
            column = np.flatnonzero(index[b] == at // unit)[0]
            kind = "image" if ids[b, column] == config.image_token_id else "video"
            pixels, (t, h, w) = next(media[kind])
            end, area = at + len(pixels), int(h * w)
            patches[b, at:end] = pixels
            segments[b, at:end] = frame + 1 + np.repeat(np.arange(t), area)
            places[b, at:end] = np.tile(frame_positions(int(h), int(w), merge), (int(t), 1))
            at, frame = end, frame + int(t)
    return {
        "patches": patches,
        "patch_segment_ids": segments,
        "patch_positions": places,
        "patch_index": index.astype(np.int32),
    }


def _media(
    config: ModelConfig, inputs: Mapping[str, Any], kind: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each image's (or video's) patches and grid, in order."""
    key = "pixel_values" if kind == "image" else "pixel_values_videos"
    pixels, grids = inputs.get(key), inputs.get(f"{kind}_grid_thw")
    if pixels is None and grids is None:
        return []
    if pixels is None or grids is None:
        raise InputError(f"{key} and {kind}_grid_thw must be given together")
    pixels, grids = np.asarray(pixels), np.asarray(grids)
    total, merge = int(grids.prod(axis=1).sum()), config.vision.spatial_merge_size
    if pixels.shape != (total, config.vision.patch_dim) or np.any(grids[:, 1:] % merge):
        raise InputError(
            f"{key} has shape {list(pixels.shape)}; the grids ask for"
            f" {[total, config.vision.patch_dim]}, with heights and widths in multiples of {merge}"
        )
    cuts = np.cumsum(grids.prod(axis=1))[:-1]
    return list(zip(np.split(pixels, cuts), grids, strict=True))


def frame_positions(height: int, width: int, merge: int) -> np.ndarray:
    """(h, w) of each patch of one frame in patch order (merge block by merge block): [h·w, 2]."""
    grid = np.indices((height, width)).reshape(2, height // merge, merge, width // merge, merge)
    return grid.transpose(1, 3, 2, 4, 0).reshape(-1, 2)


def _vision_index(
    config: ModelConfig, ids: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Per token its merged patch's number in the row, −1 for text; and where vision tokens are."""
    vision = np.isin(ids, (config.image_token_id, config.video_token_id)) & (mask != 0)
    return np.where(vision, np.cumsum(vision, axis=1) - 1, -1), vision


def merged_order(config: ModelConfig, inputs: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Where each merged patch embedding of the whole batch lies in the per-row buffers.

    Returns:
      (images, videos), int64 [N, 2] of (row, merged index in the row). With `merged` [B, P/4, D]
      the vision model's output, `merged[images[:, 0], images[:, 1]]` is [ΣP/4, D] in the order of
      pixel_values: what PyTorch calls image_embeds. The same for videos.
    """
    ids = np.asarray(inputs["input_ids"])
    mask = inputs.get("attention_mask")
    index, _ = _vision_index(config, ids, np.ones_like(ids) if mask is None else np.asarray(mask))
    rows = np.arange(len(ids))[:, None] + np.zeros_like(ids)
    out = []
    for token in (config.image_token_id, config.video_token_id):
        at = (ids == token) & (index >= 0)
        out.append(np.stack([rows[at], index[at]], axis=1).astype(np.int64))
    return out[0], out[1]
