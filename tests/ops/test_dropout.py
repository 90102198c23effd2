"""Dropout: shares, independence, and the same mask wherever the array lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echovlm_jax.ops.dropout import dropout

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(8, 64, 96)) + 3, jnp.float32)
draw = jax.jit(dropout)


def keep(share: float) -> jax.Array:
    return jnp.asarray(share, jnp.float32)


@pytest.mark.parametrize("share", [0.95, 0.5, 0.125])
def test_what_is_kept_is_divided_by_its_share(share):
    made = np.asarray(draw(X, jax.random.key(1), keep(share)))
    kept = made != 0
    np.testing.assert_allclose(made[kept], np.asarray(X)[kept] / share, rtol=1e-6)
    error = (share * (1 - share) / X.size) ** 0.5
    assert abs(kept.mean() - share) < 5 * error
    # In every row and column too.
    for axes in ((1, 2), (0, 2), (0, 1)):
        means = kept.mean(axis=axes)
        assert np.abs(means - share).max() < 5.5 * error * means.size**0.5


def test_the_mean_over_keys_is_the_input():
    x, keys = X[0, :4], jax.random.split(jax.random.key(2), 4000)
    made = np.asarray(jax.jit(jax.vmap(lambda key: dropout(x, key, keep(0.75))))(keys))
    error = np.asarray(x) * (0.25 / 0.75 / len(keys)) ** 0.5
    assert np.abs((made.mean(axis=0) - x) / error).max() < 5
    assert made.std(axis=0).min() > 0.9 * (error * len(keys) ** 0.5).min()


def test_values_are_kept_or_not_by_themselves():
    """Neighbours along each axis, places that share bits, other keys: no two agree more often."""
    keys = jax.random.split(jax.random.key(3), 2)
    first, second = (np.asarray(draw(X, key, keep(0.5))) != 0 for key in keys)
    pairs = [(first, second)]
    for axis, size in enumerate(first.shape):
        for shift in (1, 2, size // 2):
            pairs.append((first, np.roll(first, shift, axis)))
    pairs.append((first[:, :, :64], first.swapaxes(1, 2)[:, :64, :64]))
    for a, b in pairs:
        assert abs((a == b).mean() - 0.5) < 5 * 0.5 / a.size**0.5


def test_it_is_the_same_on_one_device_and_on_eight():
    wanted = draw(X, jax.random.key(4), keep(0.5))
    assert len(jax.devices()) == 8
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("a", "b", "c"))
    for spec in (("a", "b", "c"), (("a", "b", "c"),), (None, None, ("c", "a")), (None,)):
        place = NamedSharding(mesh, PartitionSpec(*spec))
        placed = jax.device_put(X, place)
        compiled = jax.jit(dropout, out_shardings=place).lower(placed, jax.random.key(4), keep(0.5))
        compiled = compiled.compile()
        np.testing.assert_array_equal(compiled(placed, jax.random.key(4), keep(0.5)), wanted)
        text = compiled.as_text()
        assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all"))


def test_nothing_is_lost_where_almost_all_is_kept():
    np.testing.assert_array_equal(draw(X, jax.random.key(5), keep(1 - 1e-9)), X)
