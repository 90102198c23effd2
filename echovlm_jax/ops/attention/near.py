"""Attention inside short segments: each block of queries against the keys around it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from echovlm_jax.ops import Array
from echovlm_jax.ops.attention.blocks import SCORES, over_blocks
from echovlm_jax.ops.attention.kernels import pad_length

AROUND = 3  # blocks of keys that a block of queries meets: the one before, its own, the one after


def near_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B T"],
    reach: int,
) -> Float[Array, "B T N H"]:
    """Attention in both directions, where a segment is one run of at most `reach` positions.

    Any platform. Work and memory are linear in T: a query meets 3 · reach keys. Of a longer
    segment, such as padding, it sees a part.

    Args:
      q, k, v: heads on one device; N is a multiple of K.
      q_segments, kv_segments: a query sees the keys of its own segment.
      reach: positions of the longest segment.
    """
    batch, length, heads, dim = q.shape
    kv_heads, blocks = k.shape[2], -(-length // reach)
    # As many blocks at a time as keep the scores within bounds, and as even as can be.
    most = max(SCORES // (batch * heads * reach * AROUND * reach), 1)
    turns = -(-blocks // most)
    each = -(-blocks // turns)
    count = turns * each

    def split(x: Array, value: int = 0) -> jax.Array:
        """[B, T, …] → [B, blocks, reach, …], filled up."""
        x = pad_length(x, count * reach, value)
        return x.reshape(batch, count, reach, *x.shape[2:])

    def around(x: Array) -> jax.Array:
        """[B, T, …] → [B, blocks, 3 · reach, …]: keys have no segment where there are none."""
        x = split(x, -1)
        x = jnp.pad(x, [(0, 0), (1, 1)] + [(0, 0)] * (x.ndim - 2), constant_values=-1)
        return jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)

    def turn(x: Array) -> jax.Array:
        """[B, blocks, …] → [turns, B, blocks a turn, …]."""
        return jnp.moveaxis(x.reshape(batch, turns, each, *x.shape[2:]), 1, 0)

    # Computed again in the backward pass, which would else find all scores stored.
    @jax.checkpoint
    def attend(q: Array, k: Array, v: Array, q_ids: Array, kv_ids: Array) -> jax.Array:
        wide: Any = {"preferred_element_type": jnp.float32}
        scores = jnp.einsum("BWTKGH,BWSKH->BWKGTS", q, k, **wide) * dim**-0.5
        seen = q_ids[:, :, :, None] == kv_ids[:, :, None]
        scores += jnp.where(seen, 0, jnp.finfo(jnp.float32).min)[:, :, None, None]
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("BWKGTS,BWSKH->BWTKGH", weights, v, **wide).astype(v.dtype)

    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    taken = [split(grouped), around(k), around(v), split(q_segments), around(kv_segments)]
    out = over_blocks(lambda _, x: ((), attend(*x)), (), [turn(x) for x in taken])[1]
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, dim)[:, :length]
