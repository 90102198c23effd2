"""Activations that jax.nn does not have, or not with the gradient that we want."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from echovlm_jax.ops import Array


@jax.custom_vjp
def quick_gelu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """x · sigmoid(1.702 x), the vision tower's GELU (CLIP).

    The forward pass leaves the derivative to the backward pass, not its three ingredients.
    """
    return x * jax.nn.sigmoid(1.702 * x)


def _quick_gelu_forward(x):
    wide = x.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(1.702 * wide)
    slope = sigmoid * (1 + 1.702 * wide * (1 - sigmoid))
    return quick_gelu(x), slope.astype(x.dtype)


def _quick_gelu_backward(slope, gradient):
    return (gradient * slope,)


quick_gelu.defvjp(_quick_gelu_forward, _quick_gelu_backward)


@jax.custom_vjp
def swiglu(gate: Float[Array, "*B"], up: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """silu(gate) · up, the gated MLP's hidden layer (Shazeer, arXiv 2002.05202).

    The forward pass leaves both derivatives to the backward pass, which then only multiplies. By
    default it would find their ingredients and compute the sigmoid's derivative as often as a
    product reads it: on a CPU twice, once of them transposed and slowly.
    """
    return jax.nn.silu(gate) * up


def _swiglu_forward(gate, up):
    silu, wide = jax.nn.silu(gate), gate.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(wide)
    by_gate = up * sigmoid * (1 + wide * (1 - sigmoid))
    return silu * up, (by_gate.astype(up.dtype), silu)


def _swiglu_backward(derivatives, gradient):
    by_gate, by_up = derivatives
    return gradient * by_gate, gradient * by_up


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
