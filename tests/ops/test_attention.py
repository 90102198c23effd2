"""Attention against a plain loop, and its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echovlm_jax.ops.attention.blocks import (
    MAX_QUERY_BLOCK,
    MIN_QUERY_BLOCK,
    SCORES,
    block_attention,
    query_block_of,
)
from echovlm_jax.ops.attention.dispatch import attention


def reference(q, k, v, q_segments, kv_segments, causal_offset):
    """One query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, dim = q.shape
    group = heads // k.shape[2]
    out = np.zeros_like(q)
    for b in range(batch):
        for t in range(length):
            sees = np.flatnonzero(kv_segments[b] == q_segments[b, t])
            if causal_offset is not None:
                sees = sees[sees <= t + causal_offset]
            for n in range(heads):
                if not len(sees):
                    out[b, t, n] = v[b, :, n // group].mean(0)
                    continue
                scores = k[b, sees, n // group] @ q[b, t, n] / np.sqrt(dim)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, sees, n // group]
    return out


def arrays(seed, batch=2, length=13, keys=13, heads=6, kv=2, dim=8):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, length, heads, dim)).astype(np.float32)
    k, v = (rng.standard_normal((batch, keys, kv, dim)).astype(np.float32) for _ in "kv")
    return q, k, v, rng


@pytest.mark.parametrize("causal_offset", [None, 0, 4])
@pytest.mark.parametrize("query_block", [512, 4, 5, 13])
def test_equals_the_loop(causal_offset, query_block):
    keys = 13 + (causal_offset or 0)
    q, k, v, rng = arrays(1, keys=keys)
    segments = rng.integers(0, 3, (2, keys)).astype(np.int32)
    q_segments = rng.integers(0, 3, (2, 13)).astype(np.int32)
    ours = block_attention(
        q, k, v,
        q_segments=q_segments, kv_segments=segments,
        causal_offset=causal_offset, query_block=query_block,
    )  # fmt: skip
    expected = reference(q, k, v, q_segments, segments, causal_offset)
    np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize("length", [63, 64, 98, 132, 194, 512])
def test_rows_that_halve_and_rows_that_do_not(length):
    q, k, v, rng = arrays(7, batch=1, length=length, keys=length)
    q = 20 * q  # one key has nearly all the weight: no other one may be taken for the largest
    segments = rng.integers(1, 3, (1, length)).astype(np.int32)
    weights = rng.standard_normal(q.shape).astype(np.float32)

    def run(implementation):
        def total(q, k, v):
            out = attention(
                q, k, v,
                q_segments=segments, kv_segments=segments,
                causal_offset=None, implementation=implementation,
            )  # fmt: skip
            return jnp.sum(weights * out), out

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    (gradients, out), (plainly, _) = run("xla_halves"), run("xla")
    np.testing.assert_allclose(out, reference(q, k, v, segments, segments, None), atol=2e-5)
    for a, b in zip(gradients, plainly, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_a_query_that_sees_nothing_is_finite_with_finite_gradients():
    q, k, v, _ = arrays(2)
    q_segments, segments = np.full((2, 13), 7, np.int32), np.ones((2, 13), np.int32)

    def total(q, k, v):
        out = attention(q, k, v, q_segments=q_segments, kv_segments=segments, causal_offset=0)
        return jnp.sum(out**2)

    for grad in jax.grad(total, argnums=(0, 1, 2))(q, k, v):
        assert np.isfinite(grad).all()


def plain(q, k, v, q_segments, kv_segments, causal_offset):
    """The whole square of weights by jax.nn.softmax, for jax to differentiate."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    sees = q_segments[:, :, None] == kv_segments[:, None, :]
    if causal_offset is not None:
        sees &= np.arange(k.shape[1]) <= np.arange(q.shape[1])[:, None] + causal_offset
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / q.shape[-1] ** 0.5
    hidden = jnp.where(sees, 0, jnp.finfo(jnp.float32).min)[:, None]
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores + hidden), v)


@pytest.mark.parametrize("causal_offset", [None, 0, 4])
@pytest.mark.parametrize("query_block", [512, 5])
def test_gradients_are_those_of_the_plain_formula(causal_offset, query_block):
    keys = 13 + (causal_offset or 0)
    q, k, v, rng = arrays(5, keys=keys)
    segments = rng.integers(0, 3, (2, keys)).astype(np.int32)
    q_segments = rng.integers(0, 4, (2, 13)).astype(np.int32)  # 3 sees nothing
    weights = rng.standard_normal(q.shape).astype(np.float32)

    def ours(q, k, v):
        out = block_attention(
            q, k, v,
            q_segments=q_segments, kv_segments=segments,
            causal_offset=causal_offset, query_block=query_block,
        )  # fmt: skip
        return jnp.sum(weights * out)

    def theirs(q, k, v):
        return jnp.sum(weights * plain(q, k, v, q_segments, segments, causal_offset))

    expected = jax.grad(theirs, argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(jax.grad(ours, argnums=(0, 1, 2))(q, k, v), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)
    low = jax.grad(ours, argnums=(0, 1, 2))(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)))
    for a, b in zip(low, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.15)


@pytest.mark.parametrize("length", [0, 1])
def test_few_queries_need_no_filling(length):
    q, k, v, _ = arrays(6, length=length)
    ones = np.ones((2, 13), np.int32)
    out = attention(
        q, k, v, q_segments=ones[:, :length], kv_segments=ones, causal_offset=13 - length
    )  # fmt: skip
    expected = reference(q, k, v, ones[:, :length], ones, 13 - length)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_the_result_is_kept_once_for_its_reader_and_for_the_gradient():
    q, k, v, _ = arrays(8, heads=2)
    ones = np.ones((2, 13), np.int32)

    def run(q, k, v):
        return block_attention(
            q, k, v, q_segments=ones, kv_segments=ones, causal_offset=0, query_block=5
        )  # fmt: skip

    out, pull = jax.vjp(run, *map(jnp.asarray, (q, k, v)))
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= q.size]
    assert len(kept) == 4  # q, k, v ...
    assert any(leaf is out for leaf in kept)  # ... and the result itself


def test_blocks_have_the_same_gradients():
    q, k, v, rng = arrays(3)
    segments = rng.integers(1, 3, (2, 13)).astype(np.int32)

    def total(q, k, v, block):
        out = block_attention(
            q, k, v,
            q_segments=segments, kv_segments=segments, causal_offset=0, query_block=block,
        )  # fmt: skip
        return jnp.sum(jnp.sin(3 * out))

    whole = jax.grad(total, argnums=(0, 1, 2))(q, k, v, 512)
    blocks = jax.grad(total, argnums=(0, 1, 2))(q, k, v, 4)
    for a, b in zip(whole, blocks, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("length", [1, 511, 513, 784, 2049, 6144])
@pytest.mark.parametrize("batch", [1, 16])
def test_blocks_are_even_and_bounded(length, batch):
    block = query_block_of((batch, length, 16, 80), length)
    count = -(-length // block)
    assert block <= MAX_QUERY_BLOCK
    assert batch * 16 * length * block <= max(SCORES, batch * 16 * length * MIN_QUERY_BLOCK)
    assert count * block - length < 8 * count  # filled up by less than 8 a block
    most = min(max(SCORES // (batch * 16 * length), MIN_QUERY_BLOCK), MAX_QUERY_BLOCK)
    assert block >= min(length, most // 4)  # a power of two, halved by evenness at worst


def test_no_square_of_scores_beyond_a_block():
    """The compiled program's largest float buffer has query_block rows, not T."""
    length = 2048
    q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def run(q, segments):
        return block_attention(
            q, q, q, q_segments=segments, kv_segments=segments, causal_offset=0, query_block=128
        )

    memory = jax.jit(run).lower(q, segments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * length * length * 4


def test_bfloat16_stays_close_to_float32():
    q, k, v, _ = arrays(4)
    segments = np.ones((2, 13), np.int32)
    low = attention(
        *(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)),
        q_segments=segments, kv_segments=segments, causal_offset=0,
    )  # fmt: skip
    assert low.dtype == jnp.bfloat16
    expected = reference(q, k, v, segments, segments, 0)
    np.testing.assert_allclose(np.asarray(low, np.float32), expected, atol=0.06)
