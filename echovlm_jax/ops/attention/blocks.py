"""Attention in blocks of queries against all keys: any platform, memory linear in the length."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from echovlm_jax.ops import Array
from echovlm_jax.ops.attention.kernels import pad_length

# Scores that exist at one time, over all rows and heads of a device: 16 MiB in float32 ...
SCORES = 2**22
# ... unless that would be fewer queries than make a matrix product worth its while.
MIN_QUERY_BLOCK, MAX_QUERY_BLOCK = 16, 1024


def block_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    causal_offset: int | None,
    query_block: int | None = None,
    halves: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention of one device's heads, as `dispatch.attention` defines it.

    Args:
      q, k, v: heads on one device; N is a multiple of K.
      q_segments, kv_segments: segment ids; a query sees the keys of its own segment.
      causal_offset: None for attention in both directions.
      query_block: queries computed at a time; None bounds the block's scores by SCORES.
      halves: reduction of a row's scores half by half instead of at once.
    """
    most = query_block or query_block_of(q.shape, k.shape[1])
    block = min(most, max(q.shape[1], 1))
    return _in_blocks(q, k, v, q_segments, kv_segments, causal_offset, block, halves)


def query_block_of(shape: tuple[int, ...], keys: int) -> int:
    """Queries at a time: blocks as even as can be, whose scores over all rows and heads stay within
    SCORES."""
    batch, length, heads, _ = shape
    length = max(length, 1)
    fits = max(SCORES // max(batch * heads * keys, 1), 1)
    most = min(max(2 ** (fits.bit_length() - 1), MIN_QUERY_BLOCK), MAX_QUERY_BLOCK)
    # Where 512 fit, 784 patches are two blocks of 392, not one of 512 and another half empty.
    return -(-length // (-(-length // most) * 8)) * 8


# The gradient is written out: the backward pass computes a block's scores again instead of finding
# them stored, keys' and values' gradients add up over the blocks in float32, and no product wants a
# matrix of scores transposed, which XLA would copy on a CPU.
@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _in_blocks(
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array,
    kv_segments: Array,
    causal_offset: int | None,
    block: int,
    halves: bool,
) -> jax.Array:
    return _in_blocks_forward(q, k, v, q_segments, kv_segments, causal_offset, block, halves)[0]


def _in_blocks_forward(q, k, v, q_segments, kv_segments, causal_offset, block, halves):
    def one(_, queries):
        q, segments, slots = queries
        scores = _scores(q, k, segments, kv_segments, slots, causal_offset is not None)
        top = jnp.max(_halved(scores, jnp.maximum, halves), axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(_halved(weights, jnp.add, halves), axis=-1, keepdims=True)
        # Divided afterwards: there are fewer results than weights.
        out = jnp.einsum(
            "BKGTS,BSKH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return (), ((out / total).astype(v.dtype), top, total)

    queries = split_queries(q, k, q_segments, causal_offset, block)
    out, top, total = over_blocks(one, (), queries)[1]
    # The result as the next layer reads it too: it is then stored once for both.
    out = join_queries(out, q.shape)
    return out, (q, k, v, q_segments, kv_segments, out, top, total)


def _in_blocks_backward(causal_offset, block, halves, residuals, d_out):
    q, k, v, q_segments, kv_segments, out, top, total = residuals

    def one(sums, block):
        (q, segments, slots), (top, total, mean), d_out = block
        scores = _scores(q, k, segments, kv_segments, slots, causal_offset is not None)
        weights = jnp.exp(scores - top) / total
        wide: Any = {"preferred_element_type": jnp.float32}
        dv = jnp.einsum("BKGTH,BKGTS->BKHS", d_out, weights.astype(v.dtype), **wide)
        d_weights = jnp.einsum("BKGTH,BSKH->BKGTS", d_out, v, **wide)
        d_scores = (weights * (d_weights - mean) * q.shape[-1] ** -0.5).astype(q.dtype)
        dq = jnp.einsum("BKGTS,BSKH->BKGTH", d_scores, k)
        dk = jnp.einsum("BKGTH,BKGTS->BKHS", q, d_scores, **wide)
        return (sums[0] + dk, sums[1] + dv), dq

    batch, length, kv_heads, dim = k.shape
    sums = (jnp.zeros((batch, kv_heads, dim, length), jnp.float32),) * 2
    queries = split_queries(q, k, q_segments, causal_offset, block)
    mean = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1, keepdims=True)
    mean, d_out = (_split_heads(x, kv_heads, block) for x in (mean, d_out))
    blocks = (queries, (top, total, mean), d_out)
    (dk, dv), dq = over_blocks(one, sums, blocks)
    dk, dv = (jnp.einsum("BKHS->BSKH", x) for x in (dk, dv))
    dq = join_queries(dq, q.shape)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def over_blocks(one: Callable[..., Any], sums: Any, blocks: Any) -> Any:
    """`one` over all blocks, in a loop where there are several."""
    return jax.lax.scan(one, sums, blocks, unroll=len(jax.tree.leaves(blocks)[0]) == 1)


def _scores(
    q: Array, k: Array, q_segments: Array, kv_segments: Array, q_slots: Array, causal: bool
) -> jax.Array:
    """[B, K, G, T, S] in float32, hidden ones as low as can be."""
    scores = jnp.einsum("BKGTH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    visible = q_segments[:, :, None] == kv_segments[:, None, :]
    if causal:
        visible &= jnp.arange(k.shape[1]) <= q_slots[:, None]
    # Added, not selected: hidden keys get weight 0 either way, and a query that sees nothing has
    # the gradients that it has in PyTorch, which a loss on a row's first token shows.
    hidden = jnp.where(visible, 0, jnp.finfo(jnp.float32).min)[:, None, None]
    return scores * q.shape[-1] ** -0.5 + hidden


def _halved(x: Array, two: Callable[[Array, Array], Array], halves: bool) -> Array:
    """With `halves`, `two` of the last axis's halves, and of theirs, while it is even and long."""
    while halves and (half := x.shape[-1] // 2) >= 32 and not x.shape[-1] % 2:
        x = two(x[..., :half], x[..., half:])
    return x


def split_queries(
    q: Array, k: Array, segments: Array, causal_offset: int | None, block: int
) -> tuple[Array, Array, Array]:
    q, segments = _split_heads(q, k.shape[2], block), _split(segments, block)
    slots = jnp.arange(len(q) * block).reshape(-1, block) + (causal_offset or 0)
    return q, segments, slots


def _split_heads(x: Array, kv_heads: int, block: int) -> jax.Array:
    """[B, T, N, H] → [blocks, B, K, G, block, H], filled up."""
    batch, length, heads, dim = x.shape
    x = x.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    return jnp.moveaxis(_split(x, block), 2, 4)


def _split(x: Array, block: int) -> jax.Array:
    """[B, T, …] → [blocks, B, block, …], filled up."""
    count = -(-x.shape[1] // block)
    x = pad_length(x, count * block)
    return jnp.moveaxis(x.reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0)


def join_queries(x: Array, shape: tuple[int, ...]) -> jax.Array:
    """[blocks, B, K, G, block, H] → [B, T, N, H], the shape."""
    x = jnp.moveaxis(x, 0, 3)  # [B, K, G, blocks, block, H]
    x = x.reshape(*x.shape[:3], x.shape[3] * x.shape[4], x.shape[5])[..., : shape[1], :]
    return jnp.moveaxis(x, 3, 1).reshape(shape)
