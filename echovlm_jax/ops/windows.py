"""Windows of a frame: which patches attend to one another where a layer looks at a part of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int

from echovlm_jax.ops import Array


class WindowOrder(NamedTuple):
    """Cells, each the patches of one token, so that a window's lie together.

    Attributes:
      order: [B, C], the cell that comes n-th.
      back: [B, C], where cell n comes.
      ids: [B, P], in the new order: which patches share a window, counted from 1; 0 = padding.
    """

    order: jax.Array
    back: jax.Array
    ids: jax.Array


def window_order(
    segments: Int[Array, "B P"], positions: Int[Array, "B P 2"], *, window: int, unit: int
) -> WindowOrder:
    """The windows of all frames of a row: squares cut from the top left corner, row by row; those
    at the right and lower edge are smaller. No window has patches of two frames.

    Example: with window 4 and unit 4 a frame of 10 × 20 patches, 5 × 10 cells, has windows of 16,
    16 and 8 cells, and below them of 4, 4 and 2. Frames keep their order, a cell its patches.

    Args:
      segments: a frame's number, 0 for padding; a frame's patches follow one another.
      positions: (h, w) of each patch in its frame.
      window: its side in cells.
      unit: patches of a cell, a square; they follow one another.
    """
    side = window * round(unit**0.5)
    frame = jnp.where(segments == 0, jnp.iinfo(jnp.int32).max, segments)[:, ::unit]
    place = positions[:, ::unit] // side
    keys = jnp.stack([frame, place[..., 0], place[..., 1]])
    order = jnp.lexsort(keys[::-1])
    keys = jnp.take_along_axis(keys, order[None], axis=-1)
    begins = jnp.any(keys != jnp.roll(keys, 1, axis=-1), axis=0).at[:, 0].set(True)
    ids = jnp.where(keys[0] == jnp.iinfo(jnp.int32).max, 0, jnp.cumsum(begins, axis=-1))
    return WindowOrder(order, jnp.argsort(order), jnp.repeat(ids.astype(jnp.int32), unit, axis=1))


def take_cells(x: Array, cells: Int[Array, "B C"]) -> jax.Array:
    """x [B, P, …] with its cells, of P / C patches, in another order."""
    batch, count = cells.shape
    whole = x.reshape(batch, count, -1)
    return jnp.take_along_axis(whole, cells[..., None], axis=1).reshape(x.shape)
