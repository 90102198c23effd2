"""Rotary positions: three rows for the decoder (M-RoPE), two for the vision tower.

A rotation table is a pair (cos, sin) of shape [B, T, H / 2] in float32, made once a forward pass;
`apply_rope` turns channel i together with channel i + H / 2 (the "rotate half" form).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from echovlm_jax.ops import Array

RopeTable = tuple[Float[Array, "B T h"], Float[Array, "B T h"]]


def mrope_table(
    positions: Int[Array, "B 3 T"], *, head_dim: int, theta: float, section: tuple[int, int, int]
) -> RopeTable:
    """The decoder's rotation table.

    Channel i of the first half turns by position[row(i)] · theta^(−2i / H), where the first
    section[0] channels follow the time row, the next section[1] the height row, the rest the width
    row (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Args:
      positions: time, height and width position of each token.
      head_dim: H.
      theta: base of the frequencies.
      section: channels of each row; they sum to H / 2.
    """
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    row = np.repeat(np.arange(3), section)
    angle = positions[:, row, :].swapaxes(1, 2).astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def vision_table(
    positions: Int[Array, "B P 2"], *, head_dim: int, theta: float = 10000.0
) -> RopeTable:
    """The vision tower's rotation table: H / 4 frequencies times h, then the same times w."""
    frequency = theta ** (-np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2))
    angle = positions[..., None].astype(jnp.float32) * frequency  # [B, P, 2, H / 4]
    angle = angle.reshape(*positions.shape[:2], head_dim // 2)
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: Float[Array, "B T N H"], table: RopeTable) -> Float[Array, "B T N H"]:
    """Rotates queries or keys in float32; the result has x's dtype."""
    cos, sin = (t[:, :, None, :] for t in table)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
