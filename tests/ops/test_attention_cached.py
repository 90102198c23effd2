"""Attention over a cache: the plain loop over cached and new keys joined."""

import jax.numpy as jnp
import numpy as np
import pytest

from echovlm_jax.ops.attention import cached as module
from echovlm_jax.ops.attention.cached import Stored, cached_attention, pack
from tests.ops.test_attention import reference


def draw(seed, length, columns, rows=3, heads=6, kv=2, dim=8):
    """New tokens, a cache of `columns` of which each row has its own number in use, with padding
    among them; queries of another segment among the new tokens where there are several."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((rows, length, heads, dim)).astype(np.float32)
    k, v = rng.standard_normal((2, rows, length, kv, dim)).astype(np.float32)
    held = rng.standard_normal((2, rows, kv, columns, dim)).astype(np.float32)
    used = np.arange(columns) < np.linspace(0, columns, rows).astype(int)[:, None]
    old = np.where(used & (rng.random((rows, columns)) > 0.2), 1, 0).astype(np.int32)
    new = np.ones((rows, length), np.int32)
    new[-1, length // 2 + 1 :] = 2
    return q, k, v, Stored(*held), new, old


def joined(q, k, v, held, new, old):
    key, value = (np.swapaxes(np.asarray(x), 1, 2) for x in held[:2])
    keys, values = np.concatenate([key, k], 1), np.concatenate([value, v], 1)
    return reference(q, keys, values, new, np.concatenate([old, new], 1), old.shape[1])


@pytest.mark.parametrize(("length", "columns"), [(1, 40), (1, 512), (7, 40), (90, 64)])
def test_two_parts_are_one_softmax(length, columns, monkeypatch):
    monkeypatch.setattr(module, "query_block_of", lambda shape, keys: 32)  # 90 are three blocks
    q, k, v, held, new, old = draw(length, length, columns)
    out = cached_attention(q, k, v, held, q_segments=new, kv_segments=new, cached_segments=old)
    np.testing.assert_allclose(out, joined(q, k, v, held, new, old), atol=2e-6)


def test_int8_is_what_it_holds():
    """Scales outside of the products change nothing: keys and values rounded first are the same."""
    q, k, v, held, new, old = draw(5, 1, 512)
    like = Stored(*[jnp.zeros(1, jnp.int8)] * 2, *[jnp.zeros(1)] * 2)
    rounded = pack(*held[:2], like)
    wide = [
        np.asarray(x, np.float32) * np.asarray(scale)[..., None]
        for x, scale in zip(rounded[:2], rounded[2:], strict=True)
    ]
    segments = {"q_segments": new, "kv_segments": new, "cached_segments": old}
    out = cached_attention(q, k, v, rounded, **segments)
    np.testing.assert_allclose(out, joined(q, k, v, wide, new, old), atol=2e-6)
    assert np.abs(out - joined(q, k, v, held, new, old)).max() > 1e-4


def test_no_bit_depends_on_columns_that_are_not_in_use():
    """From two pieces on: what `generate` gives a row at least."""
    q, k, v, held, new, old = draw(3, 1, 512, rows=2, heads=8, kv=4, dim=128)
    found = []
    for columns in (512, 768, 1024, 3072):
        gap = [(0, 0), (0, columns - 512)]
        wide = Stored(*(np.pad(x, [(0, 0), *gap, (0, 0)]) for x in held[:2]))
        segments = {"q_segments": new, "kv_segments": new, "cached_segments": np.pad(old, gap)}
        found.append(np.asarray(cached_attention(q, k, v, wide, **segments)))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
