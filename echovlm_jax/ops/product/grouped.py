"""Rows times the matrix of their group, where the rows of a group lie together."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Float, Int

ROW_TILE = 256
_WIDTH_TILE = 1536
_LANES = 128


def padded_rows(rows: int) -> int:
    """How many rows a buffer needs for at least this many: a multiple of the kernel's row tile."""
    tile = ROW_TILE if rows > ROW_TILE else 16
    return -(-rows // tile) * tile


@jax.custom_vjp
def grouped_matmul(
    rows: Float[jax.Array, "R K"], weight: Float[jax.Array, "E O K"], sizes: Int[jax.Array, "E"]
) -> Float[jax.Array, "R O"]:
    """rows[r] · weight[e]ᵀ, where the first sizes[0] rows are of group 0, the next of group 1 …

    On TPU by Pallas's kernels (megablox), which skip tiles of rows without a group and accumulate
    in float32; XLA's `ragged_dot` there multiplies every row by all E matrices, and elsewhere too.

    Args:
      rows: as many as `padded_rows` gives. Those past the sum of `sizes` may hold anything; their
        results, and their gradients, are then anything too.
      weight: of the rows' dtype. A group without rows has a gradient of exactly 0.
      sizes: rows of each group, in int32.
    """
    return _by_platform(kernel, _ragged_dot, rows, weight, sizes)


def _forward(rows: jax.Array, weight: jax.Array, sizes: jax.Array) -> tuple[Any, Any]:
    return grouped_matmul(rows, weight, sizes), (rows, weight, sizes)


def _backward(saved: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    rows, weight, sizes = saved
    return (
        _by_platform(kernel_rows, _ragged_dot_rows, g, weight, sizes),
        _by_platform(kernel_weight, _ragged_dot_weight, g, rows, sizes),
        None,
    )


grouped_matmul.defvjp(_forward, _backward)


def _by_platform(
    tpu: Callable[..., jax.Array], elsewhere: Callable[..., jax.Array], *args: jax.Array
) -> jax.Array:
    """Chosen when the program is compiled, for the platform that it is compiled for."""
    if args[0].dtype not in (jnp.bfloat16, jnp.float32):  # all that the kernels take
        return elsewhere(*args)
    return jax.lax.platform_dependent(*args, tpu=tpu, default=elsewhere)


def kernel(
    rows: jax.Array, weight: jax.Array, sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """`grouped_matmul` by the TPU's kernel. `interpret` runs it, slowly, on any platform."""
    return gmm(rows, weight, sizes, rows.dtype, _tiling, transpose_rhs=True, interpret=interpret)


def kernel_rows(
    g: jax.Array, weight: jax.Array, sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """The gradient of `rows`."""
    return gmm(g, weight, sizes, g.dtype, _tiling, interpret=interpret)


def kernel_weight(
    g: jax.Array, rows: jax.Array, sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """The gradient of `weight`. The kernel visits groups without rows too, and writes zeros."""
    return tgmm(g.swapaxes(0, 1), rows, sizes, rows.dtype, _tiling, interpret=interpret)


def _tiling(m: int, k: int, n: int) -> tuple[int, int, int]:
    """Tiles of rows, of the summed width and of the result's width."""
    return min(m, ROW_TILE), _width_tile(k), _width_tile(n)


def _width_tile(size: int) -> int:
    """The widest tile of whole vector lanes that divides the size and stays under the limit."""
    if size <= _WIDTH_TILE:
        return size
    widths = range(_WIDTH_TILE, 0, -_LANES)
    return next((w for w in widths if size % w == 0), 512)


def _dimensions(lhs: int, rhs: int, group: list[int]) -> jax.lax.RaggedDotDimensionNumbers:
    return jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((lhs,), (rhs,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=group,
    )


def _ragged_dot(rows: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot_general(rows, weight, sizes, _dimensions(1, 2, [0]))


def _ragged_dot_rows(g: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot_general(g, weight, sizes, _dimensions(1, 1, [0]))


def _ragged_dot_weight(g: jax.Array, rows: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot_general(g, rows, sizes, _dimensions(0, 0, []))
