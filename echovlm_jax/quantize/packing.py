"""Values of 4 bits, two a byte: the first in its low half, of the last axis. An odd axis ends with
half a byte of 0."""

import jax
import jax.numpy as jnp
import numpy as np

from echovlm_jax.ops import Array

_LOW, _HIGH = 0x0F, 0xF0


def pack(values: Array) -> jax.Array:
    """int8 [..., N] of -8 to 7 → uint8 [..., N / 2, rounded up]."""
    values = jnp.asarray(values, jnp.int8)
    odd = values.shape[-1] % 2
    values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, odd)])
    pairs = values.reshape(*values.shape[:-1], -1, 2)
    # As one number of 16 bits: XLA:CPU then works on many at a time.
    both = jax.lax.bitcast_convert_type(pairs, jnp.uint16)
    return ((both & _LOW) | ((both >> 4) & _HIGH)).astype(jnp.uint8)


def unpack(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., M] → int8 [..., 2 M]; on the host, because XLA:CPU takes ten times as long."""
    return np.take(_PAIRS, packed).view(np.int8)


def _pairs() -> np.ndarray:
    """The two values of every byte, as one number of 16 bits."""
    byte = np.arange(256)
    halves = np.stack([byte & _LOW, byte >> 4], -1)
    return ((halves ^ 8) - 8).astype(np.int8).view(np.uint16)[:, 0]


_PAIRS = _pairs()
