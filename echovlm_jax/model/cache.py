"""The key/value cache: an explicit value, passed in and returned.

Each row has its own number of columns in use. What a column holds is told by its segment id: 0 for
padding and for columns not yet used. Heads come before columns, as attention reads them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from echovlm_jax.config import TextConfig
from echovlm_jax.ops import Array
from echovlm_jax.ops.attention.cached import HEADS, ROWS, Stored, pack
from echovlm_jax.ops.layout import Layout

_STORED, _SEGMENTS, _LENGTH = (None, ROWS, HEADS), (ROWS, None), (ROWS,)


class Cache(NamedTuple):
    """Keys and values of every layer, and which columns are real."""

    stored: Stored  # [L, B, K, S, H] each; in int8 with scales [L, B, K, S]
    segments: Array  # [B, S] int32
    length: Array  # [B] int32: columns in use


def init_cache(config: TextConfig, batch: int, columns: int, dtype: DTypeLike) -> Cache:
    """An empty cache for `batch` rows of at most `columns` tokens, in a float dtype or int8."""
    shape = (config.num_layers, batch, config.num_kv_heads, columns, config.head_dim)
    stored = Stored(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    if jnp.issubdtype(dtype, jnp.integer):
        scale = jnp.zeros(shape[:-1], jnp.float32)
        stored = stored._replace(key_scale=scale, value_scale=scale)
    return Cache(stored, jnp.zeros((batch, columns), jnp.int32), jnp.zeros(batch, jnp.int32))


def place_cache(cache: Cache, put: Callable[..., Any]) -> Cache:
    """The cache with `put(array, *logical axes)` in place of every array: `Layout.constrain`, or
    whatever else depends on where they lie."""
    return Cache(
        jax.tree.map(lambda x: put(x, *_STORED), cache.stored),
        put(cache.segments, *_SEGMENTS),
        put(cache.length, *_LENGTH),
    )


def extend_cache(
    cache: Cache, new: tuple[Array, Array], segments: Array, layout: Layout = Layout()
) -> Cache:
    """Writes T new tokens behind those that each row has in use.

    Args:
      cache: the cache; every row must have T free columns (a jitted program can't check).
      new: keys and values [L, B, K, T, H].
      segments: [B, T] int32.
      layout: where the cache lies.
    """

    def local(
        stored: Stored, old: Array, length: Array, new: Stored, segments: Array
    ) -> tuple[Stored, Array]:
        def write(row: Array, held: tuple[Stored, Array]) -> tuple[Stored, Array]:
            def put(old: Array, new: Array, axis: int, columns: int) -> jax.Array:
                start: list[Any] = [0] * old.ndim
                start[axis], start[columns] = row, length[row]
                new = jax.lax.dynamic_slice_in_dim(new, row, 1, axis)
                return jax.lax.dynamic_update_slice(old, new, start)

            stored = jax.tree.map(lambda a, b: put(a, b, 1, 3), held[0], new)
            return stored, put(held[1], segments, 0, 1)

        return jax.lax.fori_loop(0, length.shape[0], write, (stored, old))

    split = layout.shard_map(
        local, [_STORED, _SEGMENTS, _LENGTH, _STORED, _SEGMENTS], [_STORED, _SEGMENTS]
    )
    packed = pack(*new, cache.stored)
    stored, marks = split(cache.stored, cache.segments, cache.length, packed, segments)
    return Cache(stored, marks, cache.length + segments.shape[1])


def insert_row(cache: Cache, row: Cache, at: Array, layout: Layout = Layout()) -> Cache:
    """Puts a cache of one row into the row `at` [], in place of what is there.

    Args:
      cache: the cache that takes it.
      row: a cache in a float dtype, of one row and any number of columns; those that `cache` has
        no room for are left out.
      at: which row.
      layout: where `cache` lies; `row` is whole everywhere but for its heads.
    """
    columns = cache.segments.shape[1]
    segments = row.segments[:, :columns]
    segments = jnp.pad(segments, ((0, 0), (0, columns - segments.shape[1])))
    stored = jax.tree.map(lambda x: x[:, :, :, :columns], row.stored)
    packed = pack(stored.key, stored.value, cache.stored)

    def local(at: Array, *arrays: Any) -> tuple[Any, ...]:
        names = layout.mesh_axes(ROWS)

        def put(old: Array, new: Array, axis: int) -> jax.Array:
            start: list[Any] = [0] * old.ndim
            start[axis] = at
            if names:  # one device has the row; on the others nothing changes
                start[axis] = here = at - jax.lax.axis_index(names) * old.shape[axis]
                kept = jax.lax.dynamic_slice(old, start, new.shape)
                new = jnp.where((here >= 0) & (here < old.shape[axis]), new, kept)
            return jax.lax.dynamic_update_slice(old, new, start)

        stored = jax.tree.map(lambda old, new: put(old, new, 1), arrays[0], arrays[3])
        return stored, put(arrays[1], arrays[4], 0), put(arrays[2], arrays[5], 0)

    whole = (None,)
    split = layout.shard_map(
        local,
        [(), _STORED, _SEGMENTS, _LENGTH, (None, None, HEADS), whole, whole],
        [_STORED, _SEGMENTS, _LENGTH],
    )
    return Cache(*split(at, *cache, packed, segments, row.length))
