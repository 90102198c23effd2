"""The activation that jax.nn does not have."""

from __future__ import annotations

import jax
from jaxtyping import Float

from echovlm_jax.ops import Array


def quick_gelu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """x · sigmoid(1.702 x), the vision tower's GELU (CLIP)."""
    return x * jax.nn.sigmoid(1.702 * x)
