"""The optimizer against optax's own parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from echovlm_jax.train.optimizer import global_norm, make_optimizer


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


def test_the_norm_is_that_of_all_numbers():
    rng = np.random.default_rng(1)
    shapes = [(), (7,), (22, 3), (5, 4, 3, 2), (0, 3)]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    wanted = np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in arrays))
    found = jax.jit(global_norm)({str(i): jnp.asarray(x) for i, x in enumerate(arrays)})
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert found.shape == ()


def test_a_given_norm_is_what_clips():
    made = make_optimizer(lambda step: 0.1, clip=1.0)
    grads = {"a": jnp.asarray([3.0, 4.0])}
    for given, wanted in (({}, [0.6, 0.8]), ({"norm": jnp.asarray(10.0)}, [0.3, 0.4])):
        _, state = made.update(grads, made.init(grads), grads, **given)
        moment = optax.tree.get(state, "mu")["a"]
        np.testing.assert_allclose(moment, 0.1 * np.asarray(wanted), rtol=1e-6)
