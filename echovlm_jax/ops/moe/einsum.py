"""Experts with a fixed capacity, dispatched by einsums (GShard, arXiv 2006.16668)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from echovlm_jax.ops import Array
from echovlm_jax.ops.activations import swiglu
from echovlm_jax.ops.layout import Layout
from echovlm_jax.ops.moe.routing import Experts, Routing
from echovlm_jax.ops.product.einsum import einsum
from echovlm_jax.ops.product.weight import Weight

# Axes of this file beside the common ones: Z the pieces that "batch" is cut into, J the groups of
# one piece, I the tokens of a group, C an expert's places in a group.


def capacity(group_size: int, experts: int, top_k: int, factor: float | None) -> int:
    """An expert's places in a group: ⌈factor · top_k · group_size / experts⌉, at most group_size.

    A token chooses an expert at most once, so group_size places (factor None) never run out.
    """
    if factor is None:
        return group_size
    return min(group_size, math.ceil(factor * top_k * group_size / experts))


def moe(
    x: Float[Array, "B T D"],
    routing: Routing,
    experts: Experts,
    valid: Bool[Array, "B T"],
    *,
    capacity_factor: float | None,
    group_size: int,
    layout: Layout,
) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
    """See `dispatch.moe`. Places go to first choices before second ones, then in order.

    Every group lies inside one device's tokens. Between the two constraints on the experts' inputs
    (and on their outputs), tokens change from being split over "batch" to being split over the
    experts: on an expert mesh axis, that is an all-to-all.
    """
    pieces = (layout.size("batch"), layout.size("length"))
    local = x.shape[0] * x.shape[1] // math.prod(pieces)
    size = min(group_size, local)
    tokens = layout.constrain(_group(x, pieces, size), "batch", "length", None, None)
    expert, weight, counted = (
        _group(array, pieces, size) for array in (routing.expert, routing.weight, valid)
    )
    count, top_k = experts.gate.shape[0], routing.expert.shape[-1]
    places = capacity(size, count, top_k, capacity_factor)
    place, per_expert, dropped = _places(expert, weight, counted, count, places)
    dispatch = jax.nn.one_hot(place, places, dtype=x.dtype)  # [Z, J, I, E, C]; place -1: zeros
    combine = dispatch * per_expert.astype(x.dtype)[..., None]

    inner = _layout_of_experts(layout)
    by_token = ("batch", "length", None, None, None)
    by_expert = ("batch", "length", "expert", None, None)

    def product(spec: str, x: Array, weight: Weight, *axes: str, result: str | None):
        y = einsum(spec, x, weight, axes=("expert", *axes), layout=inner)
        return inner.constrain(y, *by_expert[:-1], result)

    inputs = jnp.einsum("ZJIEC,ZJID->ZJECD", dispatch, tokens)
    inputs = inner.constrain(layout.constrain(inputs, *by_token), *by_expert)
    wide = ("expert_mlp", "expert_embed")
    gate = product("ZJECD,EFD->ZJECF", inputs, experts.gate, *wide, result="mlp")
    up = product("ZJECD,EFD->ZJECF", inputs, experts.up, *wide, result="mlp")
    hidden = swiglu(gate, up)
    outputs = product("ZJECF,EDF->ZJECD", hidden, experts.down, *reversed(wide), result=None)
    outputs = layout.constrain(outputs, *by_token)
    y = jnp.einsum("ZJIEC,ZJECD->ZJID", combine, outputs)
    y = layout.constrain(y, "batch", "length", None, None)
    return _ungroup(y, pieces, x.shape), dropped


def _places(
    expert: Int[Array, "Z J I k"],
    weight: Float[Array, "Z J I k"],
    valid: Bool[Array, "Z J I"],
    count: int,
    places: int,
) -> tuple[Int[Array, "Z J I E"], Float[Array, "Z J I E"], Int[Array, ""]]:
    """For each token and expert: its place there (-1: none) and its weight; choices dropped."""
    chosen = jax.nn.one_hot(expert, count, dtype=jnp.int32) * valid[..., None, None]
    weights = jnp.einsum("ZJIkE,ZJIk->ZJIE", chosen.astype(weight.dtype), weight)
    z, j, i, k, e = chosen.shape
    # In the order in which places are given: all first choices of the group, then all second ones.
    queue = jnp.swapaxes(chosen, 2, 3).reshape(z, j, k * i, e)
    number = jnp.cumsum(queue, axis=2)  # from 1
    kept = queue * (number <= places)
    place = jnp.sum((number * kept).reshape(z, j, k, i, e), axis=2) - 1
    return place, weights, jnp.sum(queue) - jnp.sum(kept)


def _layout_of_experts(layout: Layout) -> Layout:
    """Where tokens lie with their experts: "batch" without the mesh axes of "expert"."""
    taken = layout.mesh_axes("expert")
    outer = tuple(axis for axis in layout.mesh_axes("batch") if axis not in taken)
    rest = tuple(rule for rule in layout.rules if rule[0] != "batch")
    return dataclasses.replace(layout, rules=(("batch", outer), *rest)) if layout.rules else layout


def _group(x: Array, pieces: tuple[int, int], size: int) -> jax.Array:
    """[B, T, ...] → [Z, J, I, ...]: whole groups of each device's tokens, the last ones padded.

    Splits the dimensions where the mesh does, so that no token moves.
    """
    z, s = pieces
    b, t, *rest = x.shape
    x = jnp.swapaxes(jnp.reshape(x, (z, b // z, s, t // s, *rest)), 1, 2)
    x = jnp.reshape(x, (z, s, b // z * (t // s), *rest))
    padding = [(0, 0)] * x.ndim
    padding[2] = (0, -x.shape[2] % size)
    x = jnp.pad(x, padding)
    return jnp.reshape(x, (z, s * (x.shape[2] // size), size, *rest))


def _ungroup(
    x: Float[Array, "Z J I D"], pieces: tuple[int, int], shape: tuple[int, ...]
) -> Float[Array, "B T D"]:
    """Undoes `_group`; the result has this shape."""
    z, s = pieces
    b, t, d = shape
    x = jnp.reshape(x, (z, s, -1, d))[:, :, : b // z * (t // s)]
    x = jnp.swapaxes(jnp.reshape(x, (z, s, b // z, t // s, d)), 1, 2)
    return jnp.reshape(x, shape)
