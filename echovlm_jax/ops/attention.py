"""Scaled dot-product attention over segments, in blocks of queries."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from echovlm_jax.ops import Array

# Rows of the score matrix that exist at one time. Below this a row is computed in one piece.
QUERY_BLOCK = 512


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    causal_offset: int | None,
    query_block: int = QUERY_BLOCK,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention; softmax in float32.

    Query t sees key s where q_segments[t] == kv_segments[s] and, with a causal_offset,
    s ≤ t + causal_offset. Example: decoding one token over a cache of S slots gives keys
    [cache…, new] and causal_offset S, so that the new token sees every slot of its own segment;
    empty slots carry segment 0.

    A query that sees nothing gets a finite result (the mean of all values), so that padding never
    spreads NaN. Queries go in blocks, so no [T, S] matrix exists where T exceeds the block.

    Args:
      q, k, v: heads; N is a multiple of K, and head n reads key/value head n // (N / K).
      q_segments, kv_segments: who belongs together.
      causal_offset: None for attention in both directions.
      query_block: rows computed at a time.
    """
    block = functools.partial(
        _attend, k=k, v=v, kv_segments=kv_segments, causal=causal_offset is not None
    )
    batch, length = q.shape[:2]
    slots = jnp.arange(length) + (causal_offset or 0)
    if length <= query_block:
        return block(q, q_segments, slots)
    count = -(-length // query_block)
    padding = count * query_block - length

    def split(x: Array, axis: int) -> jax.Array:
        widths = [(0, padding if a == axis else 0) for a in range(x.ndim)]
        x = jnp.pad(x, widths)
        x = x.reshape(*x.shape[:axis], count, query_block, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    # Recomputing a block in the backward pass keeps its scores from being stored.
    out = jax.lax.map(
        lambda args: jax.checkpoint(block)(*args),
        (split(q, 1), split(q_segments, 1), split(slots, 0)),
    )
    return jnp.moveaxis(out, 0, 1).reshape(batch, count * query_block, *q.shape[2:])[:, :length]


def _attend(
    q: Array,
    q_segments: Array,
    q_slots: Array,
    *,
    k: Array,
    v: Array,
    kv_segments: Array,
    causal: bool,
) -> jax.Array:
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    visible = q_segments[:, :, None] == kv_segments[:, None, :]
    if causal:
        visible &= jnp.arange(k.shape[1]) <= q_slots[:, None]
    # Added, not selected: hidden keys get weight 0 either way, and a query that sees nothing has
    # the gradients that it has in PyTorch, which a loss on a row's first token shows.
    hidden = jnp.where(visible, 0, jnp.finfo(jnp.float32).min)[:, None, None]
    weights = jax.nn.softmax(scores * dim**-0.5 + hidden, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v)
    return out.reshape(batch, length, heads, dim)
