"""Attention by the TPU's splash kernel: no score leaves the chip's fast memory."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel_lib,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jaxtyping import Bool, Float, Int

from echovlm_jax.ops import Array
from echovlm_jax.ops.attention.kernels import BLOCKS, RESIDUALS, near_block, pad_length

LANES = 128
# The fused backward kernel reads everything once for all three gradients, but writes one part of
# the queries' gradient for every block of keys: more memory than it saves time in long sequences.
MAX_PARTS = 4
# A score that every row starts with, without a value. It is nothing beside a real score and
# everything beside a hidden one (-0.7 times float32's maximum), so that a row which sees nothing
# comes out as zero and has zero gradients, where the kernel alone would weigh hidden keys by 1.
SINK = -1e30
# Segments of padding up to whole blocks: they meet neither each other nor anyone else.
Q_PADDING, KV_PADDING = -(2**31), -(2**31) + 1


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B T"],
    causal: bool,
    interpret: bool = False,
    reach: int | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention of a whole sequence to itself, in JAX's Pallas kernel for TPUs.

    Scores, softmax and sums are float32; key/value heads are not repeated; memory is linear in T.
    Blocks without a common segment are passed over, forward and backward, as are those after the
    diagonal of a causal mask: frames of one row cost what they would cost in rows of their own.
    A query that sees nothing gets 0, and adds nothing to any gradient.

    Args:
      q, k, v: heads on one device; N is a multiple of K.
      q_segments, kv_segments: a query sees the keys of its own segment.
      causal: and of these only those up to itself.
      interpret: run the kernel's steps one by one, on any platform: for tests.
      reach: positions of the longest segment, where each is one run of them: the kernel then has no
        steps for blocks of keys that none of a block's queries can share a segment with.
    """
    length, heads, dim = q.shape[1:]
    block = block_size(length) if reach is None else near_block(reach)
    padded = -(-length // block) * block
    q = (q.astype(jnp.float32) * dim**-0.5).astype(q.dtype)
    kernel = _kernel(padded, block, dim, causal=causal, reach=reach, interpret=interpret)
    sinks = jnp.full((heads,), SINK, jnp.float32)
    visits = None
    if reach is None:
        visits = block_visits(q_segments, kv_segments, block, causal=causal)

    def row(visits: Any, q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> Any:
        own = kernel if visits is None else _visiting(kernel, visits)
        return own(q, k, v, kernel_lib.SegmentIds(*ids), sinks)

    q, k, v = (jnp.swapaxes(pad_length(x, padded), 1, 2) for x in (q, k, v))
    q_segments = pad_length(q_segments.astype(jnp.int32), padded, Q_PADDING)
    kv_segments = pad_length(kv_segments.astype(jnp.int32), padded, KV_PADDING)
    out = jax.vmap(row)(visits, q, k, v, q_segments, kv_segments)
    return jnp.swapaxes(out, 1, 2)[:, :length]


def block_visits(
    q_segments: Int[Array, "B T"], kv_segments: Int[Array, "B T"], block: int, *, causal: bool
) -> Bool[Array, "B Q J"]:
    """Which of J blocks of keys each of Q blocks of queries has to read.

    Those whose ranges of segment ids overlap: all that share a segment, and no others where a
    segment is a contiguous piece with an id of its own, as frames and packed documents are.
    """

    def bounds(ids: Array) -> tuple[Array, Array]:
        ids = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)), mode="edge")
        ids = ids.reshape(ids.shape[0], -1, block)
        return ids.min(-1), ids.max(-1)

    (q_low, q_high), (kv_low, kv_high) = bounds(q_segments), bounds(kv_segments)
    visits = (q_low[:, :, None] <= kv_high[:, None]) & (kv_low[:, None] <= q_high[:, :, None])
    return jnp.tril(visits) if causal else visits


def _visiting(
    kernel: kernel_lib.SplashAttentionKernel, visits: Array
) -> kernel_lib.SplashAttentionKernel:
    """The kernel with these blocks [Q, J] instead of all that the mask's rule allows."""

    def update(info: Any, axis: int) -> Any:
        # Over a block that is passed by, the one before stays loaded; at first, the one to come.
        index = jax.lax.broadcasted_iota(jnp.int32, visits.shape, axis)
        loaded = jax.lax.cummax(jnp.where(visits, index, -1), axis=axis)
        first = jnp.argmax(visits, axis=axis, keepdims=True).astype(jnp.int32)
        loaded = jnp.where(loaded < 0, first, loaded)
        return info._replace(data_next=loaded[None], block_mask=visits.astype(jnp.int32)[None])

    return kernel_lib.SplashAttentionKernel(
        update(kernel.fwd_mask_info, 1),
        None if kernel.dq_mask_info is None else update(kernel.dq_mask_info, 1),
        update(kernel.dkv_mask_info, 0),
        **kernel.kwargs,
    )


def block_size(length: int) -> int:
    """The largest block that lengthens a sequence by no more than an eighth, else 128."""
    for block in BLOCKS:
        if -length % block <= length // 8:
            return block
    return BLOCKS[-1]


def _kernel(
    length: int, block: int, dim: int, *, causal: bool, reach: int | None, interpret: bool
) -> kernel_lib.SplashAttentionKernel:
    # All masks are rules, of which no array is made: the kernel compares positions itself.
    shape = (length, length)
    mask = mask_lib.CausalMask(shape) if causal else mask_lib.FullMask(shape)
    if reach is not None:
        mask = mask_lib.LocalMask(shape, (reach - 1, 0 if causal else reach - 1), 0)
    # Memory is tiled by 128 in its last dimension: with a head dimension of 80 there, copies would
    # be 128 / 80 as large as with the length. The compiler keeps arrays that way round anyway.
    layouts = kernel_lib.QKVLayout
    minor = layouts.SEQ_MINOR if dim % LANES else layouts.HEAD_DIM_MINOR
    fused = length // block <= MAX_PARTS
    return kernel_lib.make_splash_mha(
        mask_lib.MultiHeadMask([mask]),  # one mask for all heads
        block_sizes=kernel_lib.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=None if fused else block,
            block_kv_dq=None if fused else block,
            use_fused_bwd_kernel=fused,
            q_layout=minor,
            k_layout=minor,
            v_layout=minor,
        ),
        head_shards=1,  # the caller has split the heads already
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
