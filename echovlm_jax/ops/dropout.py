"""Dropout (Srivastava et al., JMLR 2014) whose mask is a function of key and position alone."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Key

from echovlm_jax.ops import Array


def dropout(
    x: Float[Array, "B *T"], key: Key[Array, ""], keep: Float[Array, ""]
) -> Float[Array, "B *T"]:
    """Each value kept with probability `keep`, above 0, and divided by it; the others are 0.

    The mask is a hash of the key and of each value's place in the whole array: the same however the
    array lies on devices, and no device draws another's. `jax.random` would do as well, with five
    times the work for each value and a program that takes twice as long to compile; these bits have
    to look random to a sum, not to an adversary.
    """
    first, second = jax.random.key_data(key)
    bits = jnp.full((1,) * x.ndim, first)
    for axis, size in enumerate(x.shape):
        shape = [size if i == axis else 1 for i in range(x.ndim)]
        bits = _mixed(bits ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) + second
    below = jnp.minimum(keep.astype(jnp.float32) * 2.0**32, 2.0**32 - 256).astype(jnp.uint32)
    return jnp.where(bits < below, x / keep.astype(x.dtype), 0)


def _mixed(bits: jax.Array) -> jax.Array:
    """MurmurHash3's last step: each bit of 32 depends on all of them."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
