"""What the attention kernels share."""

import jax
import jax.numpy as jnp

from echovlm_jax.ops import Array

# What a rematerialisation policy calls the kernel's result and the row sums that its backward pass
# needs: a policy that saves the name keeps the forward kernel from running twice.
RESIDUALS = "attention_kernel"
# Rows and columns of a block of splash attention's scores, the largest first: multiples of 128.
BLOCKS = (512, 256, 128)


def near_block(reach: int) -> int:
    """The smallest block that holds a segment of `reach` positions, else the largest."""
    return next((block for block in BLOCKS[::-1] if reach <= block), BLOCKS[0])


def pad_length(x: Array, length: int, value: int = 0) -> jax.Array:
    """x [B, T, …] with its second axis filled up to a length."""
    widths = [(0, length - x.shape[1] if axis == 1 else 0) for axis in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)
