"""Scaled dot-product attention over segments: one function, an implementation for each platform."""

import functools

import jax.numpy as jnp
from jaxtyping import Float, Int

from echovlm_jax.errors import InputError
from echovlm_jax.ops import Array
from echovlm_jax.ops.attention.blocks import block_attention
from echovlm_jax.ops.attention.near import AROUND, near_attention
from echovlm_jax.ops.layout import Layout

IMPLEMENTATIONS = (
    "xla", "xla_halves", "splash", "triton", "splash_interpret", "triton_interpret"
)  # fmt: skip


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    causal_offset: int | None,
    implementation: str = "xla",
    layout: Layout = Layout(),
    reach: int | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention; softmax in float32.

    Query t sees key s where q_segments[t] == kv_segments[s] and, with a causal_offset,
    s ≤ t + causal_offset. Example: decoding one token over a cache of S slots gives keys
    [cache…, new] and causal_offset S, so that the new token sees every slot of its own segment;
    empty slots carry segment 0.

    A query that sees nothing gets a finite result, so that padding never spreads NaN: the mean of
    all values from "xla", as in PyTorch, and 0 without a gradient from the kernels. "triton" does
    that to every query that does not see its own position, whatever else it would see.

    Implementations, equal at every query that sees its own position, up to rounding:

    - "xla": blocks of queries against all keys, on any platform; memory is linear in T.
    - "xla_halves": the same, a row's scores reduced half by half. XLA:CPU without YNNPACK, as
      `train.program` asks for it, computes halves by vectors and a row number by number; a training
      step is some 5 % faster. Elsewhere it is slower, on a TPU twice by its compiler's estimate.
    - "splash": the Pallas kernel for TPUs, `ops.attention.splash`.
    - "triton": the Pallas kernel for NVIDIA's GPUs from Ampere on, `ops.attention.triton`.
    - "splash_interpret", "triton_interpret": the kernels' steps one by one on any platform, slowly:
      for tests.

    With `reach` a query looks no further than at the keys around it, whose number does not grow
    with the sequence: "splash" at blocks of its kernel, everything else, "triton" too, at the three
    blocks of `ops.attention.near`.

    The kernels compute a whole sequence's attention to itself. Everything else (a cache, more keys
    than queries) is "xla" whatever the argument says.

    Under a mesh each device computes its own rows (logical axis "batch") and heads ("attn_heads",
    for keys and values too); lengths are whole. Key/value heads that don't divide over the devices
    are repeated as often as it takes. A batch that doesn't divide is computed everywhere.

    Args:
      q, k, v: heads; N is a multiple of K, and head n reads key/value head n // (N / K).
      q_segments, kv_segments: who belongs together.
      causal_offset: None for attention in both directions.
      implementation: one of IMPLEMENTATIONS; `chips.defaults` names a device's.
      layout: how rows and heads are split over the mesh.
      reach: positions of the longest segment, where each is one run of them, but for padding;
        attention of a whole sequence in both directions alone. None: segments may be anything.

    Raises:
      InputError: an unknown implementation, or heads that don't divide over the devices.
    """
    if implementation not in IMPLEMENTATIONS:
        choices = ", ".join(IMPLEMENTATIONS)
        raise InputError(f"attention {implementation!r} is unknown; choose one of {choices}")
    if q.shape[1] != k.shape[1] or causal_offset not in (None, 0):
        implementation = "xla"
    repeats = _kv_repeats(q.shape[2], k.shape[2], layout)
    if repeats > 1:
        k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
    batch = "batch" if q.shape[0] % layout.size("batch") == 0 else None
    rows, heads = (batch, None), (batch, None, "attn_heads", None)
    local = functools.partial(
        _local,
        causal_offset=causal_offset,
        implementation=implementation,
        reach=reach,
    )
    split = layout.shard_map(local, [heads, heads, heads, rows, rows], heads)
    return split(q, k, v, q_segments, kv_segments)


def _kv_repeats(heads: int, kv_heads: int, layout: Layout) -> int:
    """How often each key/value head has to be there, for every device to hold those it reads."""
    shards = layout.size("attn_heads")
    if heads % shards:
        axes = " × ".join(layout.mesh_axes("attn_heads"))
        sizes = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise InputError(
            f"{heads} attention heads do not divide over {shards} devices of the mesh's {axes}; "
            f"choose sizes whose product is one of {sizes}"
        )
    group = heads // kv_heads
    return next(n for n in range(1, group + 1) if group % n == 0 and kv_heads * n % shards == 0)


def _local(
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array,
    kv_segments: Array,
    *,
    causal_offset: int | None,
    implementation: str,
    reach: int | None,
) -> Array:
    """Attention on one device. The kernels' modules are imported where one is wanted."""
    kernel, _, mode = implementation.partition("_")
    if reach is not None and kernel != "splash":
        if AROUND * reach < k.shape[1]:
            return near_attention(
                q, k, v, q_segments=q_segments, kv_segments=kv_segments, reach=reach
            )
        reach = None  # the whole sequence is no more than the keys around a query
    if kernel == "xla":
        return block_attention(
            q,
            k,
            v,
            q_segments=q_segments,
            kv_segments=kv_segments,
            causal_offset=causal_offset,
            halves=mode == "halves",
        )
    if kernel == "splash":
        from echovlm_jax.ops.attention.splash import splash_attention

        compute = functools.partial(splash_attention, reach=reach)
    else:
        from echovlm_jax.ops.attention.triton import triton_attention as compute
    return compute(
        q,
        k,
        v,
        q_segments=q_segments,
        kv_segments=kv_segments,
        causal=causal_offset is not None,
        interpret=mode == "interpret",
    )
