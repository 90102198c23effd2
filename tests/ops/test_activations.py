"""The gated hidden layer and its written-out gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from echovlm_jax.ops.activations import swiglu


def both(dtype):
    """Value and gradients: ours, and by default in float32 from the same numbers."""
    rng = np.random.default_rng(0)
    gate, up, weight = (jnp.asarray(4 * rng.standard_normal((64, 33)), dtype) for _ in range(3))

    def run(hidden, *inputs):
        out, back = jax.vjp(hidden, *inputs)
        return out, *back(weight.astype(out.dtype))

    wide = (x.astype(jnp.float32) for x in (gate, up))
    return run(swiglu, gate, up), run(lambda gate, up: jax.nn.silu(gate) * up, *wide)


def test_equals_the_formula_and_its_gradients():
    for ours, theirs in zip(*both(jnp.float32), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5)


def test_bfloat16_is_rounded_a_few_times_only():
    for ours, theirs in zip(*both(jnp.bfloat16), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=0.02, rtol=0.02)
