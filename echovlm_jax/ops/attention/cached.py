"""Attention of new tokens over a cache that is read where it lies, and over themselves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from echovlm_jax.ops import Array
from echovlm_jax.ops.attention.blocks import (
    join_queries,
    over_blocks,
    query_block_of,
    split_queries,
)
from echovlm_jax.ops.layout import Layout

# Columns of a cache whose weighted values are summed at one time, where it is a multiple of these:
# columns behind a row's own then add exact zeros, and no bit depends on how many there are.
COLUMNS = 256
_HIDDEN = jnp.finfo(jnp.float32).min
# Where a cache lies: rows and heads over devices, whatever comes after them whole.
ROWS, HEADS = "cache_rows", "cache_heads"


class Stored(NamedTuple):
    """Keys and values as a cache holds them: in a float dtype, or in int8 with a scale a token.

    A layer's have the shapes below; in a `model.Cache` all layers' are stacked before them.
    """

    key: Array  # [B, K, S, H]
    value: Array  # [B, K, S, H]
    key_scale: Array | None = None  # [B, K, S] float32
    value_scale: Array | None = None  # [B, K, S] float32


def pack(key: Array, value: Array, like: Stored) -> Stored:
    """Keys and values [..., H] in the form of `like`: cast, or rounded to 255 steps.

    A token's and head's largest value is 127 steps of its scale; the error is half a step.
    """
    if like.key_scale is None:
        return Stored(key.astype(like.key.dtype), value.astype(like.value.dtype))
    (key, key_scale), (value, value_scale) = map(_rounded, (key, value))
    return Stored(key, value, key_scale, value_scale)


def _rounded(x: Array) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    steps = wide / jnp.where(scale > 0, scale, 1)[..., None]
    return jnp.round(steps).astype(jnp.int8), scale


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cached: Stored,
    *,
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B T"],
    cached_segments: Int[Array, "B S"],
    layout: Layout = Layout(),
) -> Float[Array, "B T N H"]:
    """Grouped-query attention over cached keys and, causally, over the new tokens' own.

    Equal to `dispatch.attention` over [cached…, new] up to rounding, but those two are never
    joined: each part has its own scores, and both share the softmax's maximum and sum, in float32.
    A query that sees nothing gets the mean of all values.

    Args:
      q, k, v: of the new tokens; N is a multiple of K.
      cached: one layer's keys and values.
      q_segments, kv_segments: of the new tokens, as queries and as keys.
      cached_segments: of the cached keys, 0 where nothing is.
      layout: splits rows over "cache_rows" and heads over "cache_heads".
    """
    new, tokens, stored = (ROWS, None, HEADS, None), (ROWS, None), (ROWS, HEADS)
    split = layout.shard_map(_local, [new, new, new, stored, tokens, tokens, tokens], new)
    return split(q, k, v, cached, q_segments, kv_segments, cached_segments)


def _local(
    q: Array,
    k: Array,
    v: Array,
    cached: Stored,
    q_segments: Array,
    kv_segments: Array,
    cached_segments: Array,
) -> jax.Array:
    length = k.shape[1]
    columns = cached.key.shape[2]
    # In int8 a key is a whole number, which is exact in any float dtype; its scale comes after.
    key, value = cached.key.astype(k.dtype), cached.value.astype(v.dtype)
    wide: Any = {"preferred_element_type": jnp.float32}
    # Fewer than two pieces are one sum in any case; many queries at once are a prompt's, whose
    # columns are its own.
    pieces = columns // COLUMNS if length == 1 and columns % COLUMNS == 0 else 1
    value = value.reshape(*value.shape[:2], pieces, columns // pieces, value.shape[3])

    def one(_: tuple[()], queries: tuple[Array, Array, Array]) -> tuple[tuple[()], jax.Array]:
        q, segments, slots = queries
        old = jnp.einsum("BKGTH,BKSH->BKGTS", q, key, **wide) * q.shape[-1] ** -0.5
        if cached.key_scale is not None:
            old = old * cached.key_scale[:, :, None, None]
        own = jnp.einsum("BKGTH,BSKH->BKGTS", q, k, **wide) * q.shape[-1] ** -0.5
        old = jnp.where(_same(segments, cached_segments), old, _HIDDEN)
        causal = jnp.arange(length) <= slots[:, None]
        own = jnp.where(_same(segments, kv_segments) & causal, own, _HIDDEN)
        top = jnp.maximum(old.max(-1, keepdims=True), own.max(-1, keepdims=True))
        old, own = jnp.exp(old - top), jnp.exp(own - top)
        old = old.reshape(*old.shape[:-1], pieces, columns // pieces)
        total = old.sum(-1).sum(-1, keepdims=True) + own.sum(-1, keepdims=True)
        if cached.value_scale is not None:
            scale = cached.value_scale[:, :, None, None]
            old = old * scale.reshape(*scale.shape[:-1], *old.shape[-2:])
        out = jnp.einsum("BKGTps,BKpsH->BKpGTH", old.astype(v.dtype), value, **wide).sum(2)
        out = out + jnp.einsum("BKGTS,BSKH->BKGTH", own.astype(v.dtype), v, **wide)
        return (), (out / total).astype(v.dtype)

    block = min(query_block_of(q.shape, columns + length), length)
    queries = split_queries(q, k, q_segments, 0, block)
    return join_queries(over_blocks(one, (), queries)[1], q.shape)


def _same(queries: Array, keys: Array) -> Array:
    """[B, 1, 1, T, S]: who belongs to whom."""
    return (queries[:, :, None] == keys[:, None])[:, None, None]
