"""Gathering pieces of a weight and scattering its gradient, inside `Layout.shard_map`."""

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from echovlm_jax.ops import Array
from echovlm_jax.ops.product.weight import as_operand

# XLA:TPU scatters while it reduces only where a group is a ring or a small block of the torus.
# Others become a whole all-reduce, with twice the traffic and a buffer as large as the weight. A
# group larger than this goes in two steps, over rows and over columns: the same bytes in total.
RING = 8


def all_gather(
    x: Array,
    mesh_axes: tuple[str, ...],
    dim: int,
    *,
    dtype: DTypeLike | None = None,
    sum_dtype: DTypeLike | None = None,
) -> jax.Array:
    """The pieces of all devices along mesh_axes, joined along `dim`.

    Its gradient is `reduce_scatter`, in x's dtype.

    Args:
      x: this device's piece.
      mesh_axes: none at all: only `dtype` changes.
      dim: of the pieces.
      dtype: what travels and is returned; x's by default.
      sum_dtype: what the gradient is added up in; its own by default.
    """
    x = jnp.asarray(x)
    kinds = (jnp.dtype(dtype or x.dtype), jnp.dtype(sum_dtype or dtype or x.dtype), x.dtype)
    return cast(jax.Array, _all_gather(x, mesh_axes, dim, kinds))


# The kinds: of the result, of the gradient's sum, of x.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _all_gather(x: Array, mesh_axes: tuple[str, ...], dim: int, kinds: tuple[Any, ...]) -> Any:
    x = as_operand(x, kinds[0])
    return jax.lax.all_gather(x, mesh_axes, axis=dim, tiled=True) if mesh_axes else x


def _all_gather_fwd(
    x: Array, mesh_axes: tuple[str, ...], dim: int, kinds: tuple[Any, ...]
) -> tuple[jax.Array, None]:
    return _all_gather(x, mesh_axes, dim, kinds), None


def _all_gather_bwd(
    mesh_axes: tuple[str, ...], dim: int, kinds: tuple[Any, ...], _: None, gradient: Array
) -> tuple[jax.Array]:
    _, wide, own = kinds
    return (reduce_scatter(gradient.astype(wide), mesh_axes, dim).astype(own),)


_all_gather.defvjp(_all_gather_fwd, _all_gather_bwd)


def reduce_scatter(x: Array, mesh_axes: Sequence[str], dim: int) -> jax.Array:
    """This device's piece, along `dim`, of the sum over all devices along mesh_axes."""
    x = jnp.asarray(x)
    for axis in mesh_axes:  # the first one is the major one, as in a PartitionSpec
        x = _scatter_over(x, axis, dim)
    return x


def _scatter_over(x: jax.Array, axis: str, dim: int) -> jax.Array:
    count = jax.lax.axis_size(axis)
    # Pieces on a leading dimension of their own: then it does not matter to the compiler how the
    # rest lies in memory.
    x = x.reshape(*x.shape[:dim], count, x.shape[dim] // count, *x.shape[dim + 1 :])
    x = jnp.moveaxis(x, dim, 0)
    rows = _rows(count)
    columns = count // rows
    if rows > 1:  # device r · columns + c is in row r and column c
        x = x.reshape(rows, columns, *x.shape[1:])
        x = jax.lax.psum_scatter(
            x, axis, axis_index_groups=[list(range(c, count, columns)) for c in range(columns)]
        )
    groups = [list(range(r * columns, (r + 1) * columns)) for r in range(rows)]
    return jax.lax.psum_scatter(x, axis, axis_index_groups=groups if rows > 1 else None)


def _rows(count: int) -> int:
    """The largest divisor up to the square root, or 1 where a group can go in one step."""
    if count <= RING:
        return 1
    return next(r for r in range(math.isqrt(count), 0, -1) if count % r == 0)
