"""The one door through which every weight is multiplied."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from echovlm_jax.ops import Array


def einsum(spec: str, x: Array, weight: Array, *, out_dtype: DTypeLike | None = None) -> jax.Array:
    """`jnp.einsum(spec, x, weight)` in x's dtype, whatever dtype the weight is stored in.

    Args:
      spec: an einsum of two operands, in the axis alphabet of `ops`.
      x: activations; their dtype is the dtype of the product.
      weight: the weight, of any float dtype.
      out_dtype: dtype of the result (the accumulation is at least this wide); x's by default.
    """
    return jnp.einsum(
        spec, x, jnp.asarray(weight, x.dtype), preferred_element_type=out_dtype or x.dtype
    )
