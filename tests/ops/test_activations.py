"""Activations and their written-out gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echovlm_jax.ops.activations import quick_gelu, swiglu

FORMULAS = {
    swiglu: lambda gate, up: jax.nn.silu(gate) * up,
    quick_gelu: lambda x: x * jax.nn.sigmoid(1.702 * x),
}
each = pytest.mark.parametrize("activation", FORMULAS, ids=lambda f: f.__name__)


def both(activation, dtype):
    """Value and gradients: ours, and by default in float32 from the same numbers."""
    rng = np.random.default_rng(0)
    weight, *inputs = (
        jnp.asarray(4 * rng.standard_normal((64, 33)), dtype)
        for _ in range(3 if activation is swiglu else 2)
    )

    def run(hidden, *inputs):
        out, back = jax.vjp(hidden, *inputs)
        return out, *back(weight.astype(out.dtype))

    wide = (x.astype(jnp.float32) for x in inputs)
    return run(activation, *inputs), run(FORMULAS[activation], *wide)


@each
def test_equals_the_formula_and_its_gradients(activation):
    for ours, theirs in zip(*both(activation, jnp.float32), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5)


@each
def test_bfloat16_is_rounded_a_few_times_only(activation):
    for ours, theirs in zip(*both(activation, jnp.bfloat16), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=0.02, rtol=0.02)


def test_a_low_slope_is_rounded_once():
    """Its ingredients in float32: rounded one by one they are off by four times as much."""
    x = np.linspace(-12, 12, 4001)
    sigmoid = 1 / (1 + np.exp(-1.702 * x))
    slope = sigmoid * (1 + 1.702 * x * (1 - sigmoid))
    low = jnp.asarray(x, jnp.bfloat16)
    exact = np.interp(np.asarray(low, np.float64), x, slope)
    (found,) = jax.vjp(quick_gelu, low)[1](jnp.ones_like(low))
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, atol=5e-3)


def test_a_gelu_between_two_products_keeps_its_slope_and_its_result():
    x, weight = jnp.ones((2, 3, 4)), jnp.ones((5, 4))

    def run(x, weight):
        hidden = quick_gelu(jnp.einsum("BTD,FD->BTF", x, weight))
        return jnp.einsum("BTF,FD->BTD", hidden, weight)

    kept = jax.tree.leaves(jax.vjp(run, x, weight)[1])
    assert sum(leaf.shape == (2, 3, 5) for leaf in kept) == 2
