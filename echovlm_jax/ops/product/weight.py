"""How a product takes its weight: nothing else knows in what form weights are stored."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from echovlm_jax.ops import Array


def as_operand(weight: Array, dtype: DTypeLike) -> jax.Array:
    """The weight as an array of a product's dtype, whatever it is stored in."""
    return jnp.asarray(weight, dtype)


def lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """The product of a table with one-hot tokens: each token's row."""
    return as_operand(jnp.take(table, tokens, axis=0), dtype)
