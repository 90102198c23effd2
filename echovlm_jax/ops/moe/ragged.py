"""Experts without capacity: every device sorts its tokens by expert and multiplies by groups."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from echovlm_jax.ops import Array
from echovlm_jax.ops.activations import swiglu
from echovlm_jax.ops.collectives import all_gather
from echovlm_jax.ops.layout import Layout
from echovlm_jax.ops.moe.routing import Experts, Routing
from echovlm_jax.ops.product.grouped import grouped_matmul, padded_rows
from echovlm_jax.ops.product.weight import Quantized, as_operand

# Axes of this file beside the common ones: N tokens in one list, R rows sorted by expert.


def moe(
    x: Float[Array, "B T D"],
    routing: Routing,
    experts: Experts,
    valid: Bool[Array, "B T"],
    *,
    layout: Layout,
) -> Float[Array, "B T D"]:
    """See `dispatch.moe`.

    No token leaves its device, except along the mesh axes of "expert": there every device gathers
    the others' tokens, runs its own experts on those that chose them, and the sums are scattered
    back. Weights split over "expert_embed" are gathered on each device, in x's dtype, so that the
    derivative is a reduce-scatter: left to XLA, it becomes an all-reduce of the whole weight.
    """
    tokens = ("batch", "length")
    inner, outer = ("expert", "mlp", "expert_embed"), ("expert", "expert_embed", "mlp")
    mapped = layout.shard_map(
        functools.partial(
            _on_device,
            expert_axes=layout.mesh_axes("expert"),
            embed_axes=layout.mesh_axes("expert_embed"),
            sum_dtype=layout.sums(x.dtype),
        ),
        in_axes=[(*tokens, None)] * 3 + [tokens, inner, inner, outer],
        out_axes=("mlp", *tokens, None),
    )
    # As they are, where a device's sums are to be wide: of copies over the mesh's other axes too.
    wide = layout.sums(x.dtype) != x.dtype
    weights = (
        weight if wide and not isinstance(weight, Quantized) else as_operand(weight, x.dtype)
        for weight in experts
    )
    # One term for each piece of "mlp". They are added out here, where the sum's derivative is a
    # copy; inside, it would be one more sum over devices.
    return jnp.sum(mapped(x, routing.expert, routing.weight.astype(x.dtype), valid, *weights), 0)


def _on_device(
    x: Array,
    expert: Array,
    weight: Array,
    valid: Array,
    gate: Array,
    up: Array,
    down: Array,
    *,
    expert_axes: tuple[str, ...],
    embed_axes: tuple[str, ...],
    sum_dtype: jnp.dtype,
) -> jax.Array:
    """One device's tokens [B, T, D] and experts, to its term of the sums, [1, B, T, D]."""
    kinds = {"dtype": x.dtype, "sum_dtype": sum_dtype}
    gate, up = (all_gather(weight, embed_axes, 2, **kinds) for weight in (gate, up))
    down = all_gather(down, embed_axes, 1, **kinds)
    shape = x.shape
    x, expert, weight, valid = (
        jnp.reshape(array, (-1, *array.shape[2:])) for array in (x, expert, weight, valid)
    )
    own = gate.shape[0]
    if expert_axes:
        x, expert, weight, valid = (
            jax.lax.all_gather(array, expert_axes, tiled=True)
            for array in (x, expert, weight, valid)
        )
        expert = expert - own * jax.lax.axis_index(expert_axes)
    order = _sort(expert, valid, own)
    each = _Order(order.pair, order.row.reshape(-1, 1), order.sizes)  # a list of pairs, not tokens
    rows = _spread(x, order)
    hidden = swiglu(*(grouped_matmul(rows, w, order.sizes) for w in (gate, up)))
    hidden = hidden * _spread(weight.reshape(-1, 1), each)
    y = _collect(grouped_matmul(hidden, down, order.sizes), order)
    if expert_axes:
        y = jax.lax.psum_scatter(y, expert_axes, scatter_dimension=0, tiled=True)
    return jnp.reshape(y, (1, *shape))


class _Order(NamedTuple):
    """(token, choice) pairs sorted by expert; pairs without an expert here come last, or not."""

    pair: Int[Array, "R"]  # each row's pair: token · k + choice
    row: Int[Array, "N k"]  # each pair's row
    sizes: Int[Array, "E"]  # rows of each expert; rows past their sum hold nothing


def _sort(expert: Int[Array, "N k"], valid: Bool[Array, "N"], own: int) -> _Order:
    """Sorts by expert those pairs of valid tokens whose expert is one of 0 … own − 1."""
    tokens, top_k = expert.shape
    here = valid[:, None] & (expert >= 0) & (expert < own)
    key = jnp.where(here, expert, own).reshape(-1)
    sizes = jnp.sum(jax.nn.one_hot(key, own, dtype=jnp.int32), axis=0)
    pair = jnp.argsort(key, stable=True)
    row = jnp.zeros_like(pair).at[pair].set(jnp.arange(tokens * top_k), unique_indices=True)
    used = tokens * min(top_k, own)  # a token's experts are different ones
    pair = jnp.pad(pair[:used], (0, padded_rows(used) - used))
    return _Order(pair, row.reshape(tokens, top_k), sizes)


# The two moves between tokens and rows are each other's transposes, and both are gathers. Left to
# themselves they would be differentiated into scatters, which add row by row.


@jax.custom_vjp
def _spread(x: Float[Array, "N D"], order: _Order) -> Float[Array, "R D"]:
    """Each row's token. Rows that hold nothing get any: no product and no sum reads them."""
    return x[order.pair // order.row.shape[1]]


@jax.custom_vjp
def _collect(rows: Float[Array, "R D"], order: _Order) -> Float[Array, "N D"]:
    """Each token's sum over its rows. Rows that hold nothing may hold anything."""
    used = order.row < jnp.sum(order.sizes)
    found = rows[jnp.minimum(order.row, rows.shape[0] - 1)]
    return jnp.sum(jnp.where(used[..., None], found, 0), axis=1)


_spread.defvjp(lambda x, order: (_spread(x, order), order), lambda o, g: (_collect(g, o), None))
_collect.defvjp(lambda x, order: (_collect(x, order), order), lambda o, g: (_spread(g, o), None))
