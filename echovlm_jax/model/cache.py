"""The key/value cache: an explicit value, passed in and returned.

A slot is a column of the padded prompt, or a later token. All rows of a batch share the number of
slots in use, because prompts are padded on the left; what a slot holds is told by its segment id,
0 for padding and for slots not yet used.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from echovlm_jax.config import TextConfig
from echovlm_jax.ops import Array


class Cache(NamedTuple):
    """Keys and values of every layer, and which slots are real."""

    key: Array  # [L, B, S, K, H]
    value: Array  # [L, B, S, K, H]
    segments: Array  # [B, S] int32
    length: Array  # [] int32: slots in use


def init_cache(config: TextConfig, batch: int, slots: int, dtype: DTypeLike) -> Cache:
    """An empty cache for `batch` rows of at most `slots` tokens."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    return Cache(
        key=jnp.zeros(shape, dtype),
        value=jnp.zeros(shape, dtype),
        segments=jnp.zeros((batch, slots), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def extend_cache(cache: Cache, new: tuple[Array, Array], segments: Array) -> Cache:
    """Writes T new tokens behind those in use.

    Args:
      cache: the cache; it must have T free slots (a jitted program can't check).
      new: keys and values [L, B, T, K, H].
      segments: [B, T] int32.
    """
    start = (0, 0, cache.length, 0, 0)
    key, value = (
        jax.lax.dynamic_update_slice(old, fresh.astype(old.dtype), start)
        for old, fresh in zip((cache.key, cache.value), new, strict=True)
    )
    return Cache(
        key=key,
        value=value,
        segments=jax.lax.dynamic_update_slice(cache.segments, segments, (0, cache.length)),
        length=cache.length + segments.shape[1],
    )
