"""The optimizer against optax's own parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from echovlm_jax.train.optimizer import make_optimizer


@pytest.mark.parametrize("clip", [0.1, 1.0, 1e3])
def test_clips_and_steps_as_optax_does(clip):
    """Gradients of norm 5 or so: clipped twice, and left alone."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b": (7,)}

    def tree():
        return {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}

    ours = make_optimizer(lambda step: 0.1 / (1 + step), clip=clip)
    theirs = optax.chain(optax.clip_by_global_norm(clip), optax.adam(lambda step: 0.1 / (1 + step)))
    params = tree()
    states = [made.init(params) for made in (ours, theirs)]
    for _ in range(3):
        grads = tree()
        updates = []
        for i, made in enumerate((ours, theirs)):
            update, states[i] = made.update(grads, states[i], params)
            updates.append(update)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), *updates)
    moments = [optax.tree.get(state, "mu") for state in states]  # the clipping shows in these
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), *moments)
