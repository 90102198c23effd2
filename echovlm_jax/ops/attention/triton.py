"""Attention by JAX's Pallas kernel for NVIDIA's GPUs: no square of scores in memory."""

import warnings
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float, Int

from echovlm_jax.ops import Array
from echovlm_jax.ops.attention.kernels import pad_length

with warnings.catch_warnings():
    # JAX means to move the kernel to a package that does not exist for every Python we support.
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas.ops.gpu import attention as kernel_lib

# Lengths are filled up to whole blocks of the forward kernel, head dimensions to a power of two.
BLOCK, MIN_DIM = 128, 16
PADDING = -(2**31)


def triton_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B T"],
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention of a whole sequence to itself.

    Scores, softmax and sums are float32; key/value heads are repeated, because the kernel pairs
    heads one to one. It knows one segment id a position, the key's, so that no position ever sees
    nothing: one whose query belongs to another segment than its key (a query of padding) is
    treated as hidden from everything. It gets 0, and adds nothing to any gradient.

    Args:
      q, k, v: heads on one device; N is a multiple of K.
      q_segments, kv_segments: a query sees the keys of its own segment.
      causal: and of these only those up to itself.
      interpret: run the kernel's steps one by one, on any platform: for tests.
    """
    length, heads, dim = q.shape[1:]
    width = max(1 << (dim - 1).bit_length(), MIN_DIM)
    padded = -(-length // BLOCK) * BLOCK
    k, v = (jnp.repeat(x, heads // k.shape[2], axis=2) for x in (k, v))
    q, k, v = (jnp.pad(pad_length(x, padded), [(0, 0)] * 3 + [(0, width - dim)]) for x in (q, k, v))
    segments = pad_length(kv_segments.astype(jnp.int32), padded, PADDING)
    out: Any = kernel_lib.mha(
        q, k, v, segments, sm_scale=dim**-0.5, causal=causal, interpret=interpret
    )
    sees = (q_segments == kv_segments)[..., None, None]
    return jnp.where(sees, out[:, :length, :, :dim], 0)
