"""Which samples share a row: two budgets at once, tokens and patches, and no sample split."""

from typing import NamedTuple

import numpy as np

from echovlm_jax.data.keys import mix

# Samples that are packed together. Rows keep to their window's part of the epoch, so this is also
# how far packing moves a sample from its place in the shuffled order. Larger ones hardly pack
# better and take longer, in proportion.
WINDOW = 4096


class Rows(NamedTuple):
    """Row r holds `samples[offsets[r] : offsets[r + 1]]`."""

    samples: np.ndarray  # int32 [N], each number once
    offsets: np.ndarray  # int64 [R + 1]


def pack(
    tokens: np.ndarray,
    patches: np.ndarray,
    seq_len: int,
    max_patches: int,
    *,
    key: int,
    groups: np.ndarray | None = None,
    window: int = WINDOW,
) -> Rows:
    """Packs samples into rows: best fit, largest first, window by window.

    Args:
      tokens, patches: int [N], each sample's, in the order of the epoch.
      seq_len, max_patches: capacity of a row.
      key: seed of the rows' order within their window (largest first would teach by size).
      groups: int [N]; samples of one group never share a row. None: any may.

    Raises:
      ValueError: a sample is larger than a row.
    """
    if np.any(tokens > seq_len) or np.any(patches > max_patches):
        raise ValueError("a sample is larger than a row; fit it first")
    samples, lengths = [], []
    for start in range(0, len(tokens), window):
        part = slice(start, start + window)
        row = _pack_window(
            np.asarray(tokens[part], np.int64),
            np.asarray(patches[part], np.int64),
            np.int64(seq_len),
            np.int64(max_patches),
            None if groups is None else groups[part],
        )
        count = int(row.max()) + 1
        shuffled = np.argsort(np.argsort(mix(key, start, np.arange(count)), kind="stable"))
        row = shuffled[row]
        samples.append(start + np.argsort(row, kind="stable"))
        lengths.append(np.bincount(row, minlength=count))
    ends = np.cumsum(np.concatenate(lengths)) if lengths else np.zeros(0, np.int64)
    return Rows(
        np.concatenate(samples).astype(np.int32) if samples else np.zeros(0, np.int32),
        np.concatenate([[0], ends]).astype(np.int64),
    )


def _pack_window(
    tokens: np.ndarray,
    patches: np.ndarray,
    seq_len: np.int64,
    max_patches: np.int64,
    groups: np.ndarray | None,
) -> np.ndarray:
    """Each sample's row. All in whole numbers: nothing depends on how a machine rounds."""
    n = len(tokens)
    # A sample's size is its larger share of the two budgets; shares have one denominator.
    scale = (max(max_patches, np.int64(1)), seq_len)
    token_size, patch_size = tokens * scale[0], patches * scale[1]
    largest_first = np.argsort(-np.maximum(token_size, patch_size), kind="stable")
    token_room, patch_room = np.empty(n, np.int64), np.empty(n, np.int64)
    row_of, rows = np.empty(n, np.int64), 0
    twins = _rows_of_twins(groups)
    for i in largest_first:
        token_left = token_room[:rows] - token_size[i]
        patch_left = patch_room[:rows] - patch_size[i]
        # The fullest row that it fits; as unsigned numbers, what lacks room is the roomiest.
        left = (token_left + patch_left).view(np.uint64)
        left[(token_left < 0) | (patch_left < 0)] = _NO_ROOM
        taken = twins.get(int(groups[i])) if groups is not None else None
        if taken:
            left[taken] = _NO_ROOM
        row = int(left.argmin()) if rows else 0
        if not rows or left[row] == _NO_ROOM:
            row, rows = rows, rows + 1
            token_room[row], patch_room[row] = seq_len * scale[0], max_patches * scale[1]
        token_room[row] -= token_size[i]
        patch_room[row] -= patch_size[i]
        row_of[i] = row
        if taken is not None:
            taken.append(row)
    return row_of


_NO_ROOM = np.uint64(2**64 - 1)


def _rows_of_twins(groups: np.ndarray | None) -> dict[int, list[int]]:
    """An empty list for each group that comes up more than once."""
    if groups is None:
        return {}
    found, counts = np.unique(groups, return_counts=True)
    return {int(group): [] for group in found[counts > 1]}
