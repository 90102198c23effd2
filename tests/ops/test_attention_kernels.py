"""Every implementation of attention against float64 formulas, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echovlm_jax.errors import InputError
from echovlm_jax.ops.attention import splash
from echovlm_jax.ops.attention.blocks import block_attention
from echovlm_jax.ops.attention.dispatch import IMPLEMENTATIONS, attention
from echovlm_jax.ops.attention.splash import BLOCKS, MAX_PARTS, block_size

ANYWHERE = ("xla", "splash_interpret", "triton_interpret")


def reference(q, k, v, d_out, q_segments, kv_segments, causal):
    """Attention and its gradients in float64; a query that sees nothing gives and takes nothing."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    heads, kv_heads, dim = q.shape[2], k.shape[2], q.shape[3]
    group = heads // kv_heads
    wide_k, wide_v = (np.repeat(x, group, axis=2) for x in (k, v))
    visible = q_segments[:, :, None] == kv_segments[:, None, :]
    if causal:
        visible &= np.tri(visible.shape[1], dtype=bool)
    visible = visible[:, None]
    scores = np.einsum("btnh,bsnh->bnts", q, wide_k) / np.sqrt(dim)
    weights = np.exp(scores - scores.max(-1, keepdims=True), where=visible, out=0 * scores)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bnts,bsnh->btnh", weights, wide_v)
    d_weights = np.einsum("btnh,bsnh->bnts", d_out, wide_v)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) / np.sqrt(dim)
    dq = np.einsum("bnts,bsnh->btnh", d_scores, wide_k)
    dk = np.einsum("bnts,btnh->bsnh", d_scores, q)
    dv = np.einsum("bnts,btnh->bsnh", weights, d_out)
    dk, dv = (x.reshape(*k.shape[:3], group, dim).sum(3) for x in (dk, dv))
    return out, dq, dk, dv


def segment_rows(kind, length, rng):
    """(of queries, of keys) for two rows, as the model makes them."""
    cut, end = sorted(rng.choice(np.arange(2, length - 2), 2, replace=False))
    keys = np.ones((2, length), np.int32)
    if kind == "packed":  # several documents, then padding
        keys[0, cut:], keys[0, end:], keys[1, end:] = 2, 0, 0
    elif kind == "left":  # prompts of different lengths
        keys[0, :cut], keys[1, :end] = 0, 0
    elif kind == "frames":  # patches; padding is a segment like any other
        keys[0, cut:], keys[1, cut:], keys[:, end:] = 2, 2, 0
        return keys, keys
    else:  # in no order
        keys = rng.integers(1, 4, (2, length)).astype(np.int32)
    return np.where(keys == 0, 1, keys).astype(np.int32), keys


def draw(seed, length, heads, kv_heads, dim):
    rng = np.random.default_rng(seed)
    shapes = [(2, length, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    return rng, [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("causal", "implementation"))
def run(q, k, v, d_out, q_segments, kv_segments, *, causal, implementation):
    def forward(q, k, v):
        return attention(
            q, k, v,
            q_segments=q_segments, kv_segments=kv_segments,
            causal_offset=0 if causal else None, implementation=implementation,
        )  # fmt: skip

    out, pull = jax.vjp(forward, q, k, v)
    return out, *pull(d_out)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)

# Lengths below, at and off a block; 600 is more blocks than the fused backward kernel takes.
CASES = [
    ("packed", True, 300, 4, 2, 16),
    ("left", True, 130, 2, 2, 128),
    ("frames", False, 40, 2, 2, 80),
    ("mixed", True, 200, 3, 3, 16),
    slow("frames", False, 300, 2, 1, 80),
    slow("packed", True, 256, 6, 2, 16),
    slow("packed", True, 600, 4, 2, 16),
    slow("frames", False, 600, 2, 1, 80),
]


@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize(("kind", "causal", "length", "heads", "kv_heads", "dim"), CASES)
def test_equals_the_formulas(implementation, kind, causal, length, heads, kv_heads, dim):
    rng, (q, k, v, d_out) = draw(length, length, heads, kv_heads, dim)
    segments = segment_rows(kind, length, rng)
    used = segments[0] == segments[1]
    d_out *= used[..., None, None]  # no loss reads padding
    args = (q, k, v, d_out, *segments)
    ours = run(*args, causal=causal, implementation=implementation)
    expected = reference(*args, causal)
    np.testing.assert_allclose(np.asarray(ours[0])[used], expected[0][used], atol=5e-6)
    for a, b in zip(ours[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("implementation", ["splash_interpret", "triton_interpret"])
@pytest.mark.parametrize("parts", [4, 1])  # the fused backward kernel, and the two apart
def test_a_query_that_sees_nothing_gets_zero_and_pulls_on_nothing(
    monkeypatch, implementation, parts
):
    monkeypatch.setattr(splash, "MAX_PARTS", parts)
    length = 130 + parts  # not a shape that another case has compiled
    _, (q, k, v, d_out) = draw(7, length, 4, 2, 16)
    keys = np.ones((2, length), np.int32)
    keys[:, :50] = 0  # padding on the left: 50 queries without a key
    queries = np.ones_like(keys)
    args = (q, k, v, 1e3 * d_out, queries, keys)
    out, *gradients = run(*args, causal=True, implementation=implementation)
    assert not np.any(out[:, :50])
    _, *expected = reference(*args, True)
    assert not np.any(gradients[0][:, :50])
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("parts", [4, 1])  # the fused backward kernel, and the two apart
def test_splash_reads_no_block_of_other_segments(monkeypatch, parts):
    """Not-a-number in another segment's block would spread through a weight of 0."""
    monkeypatch.setattr(splash, "MAX_PARTS", parts)
    _, (q, k, v, d_out) = draw(13, 384, 1, 1, 16)
    frames = np.repeat([[1, 2, 3], [1, 1, 2]], 128, axis=1).astype(np.int32)
    expected = reference(q, k, v, d_out, frames, frames, False)
    other = frames == 2
    q, k, v, d_out = (np.where(other[..., None, None], np.nan, x) for x in (q, k, v, d_out))
    args = (q, k, v, d_out, frames, frames)
    ours = jax.jit(
        functools.partial(run.__wrapped__, causal=False, implementation="splash_interpret")
    )
    for a, b in zip(ours(*args), expected, strict=True):
        assert np.isnan(np.asarray(a)[other]).all()
        np.testing.assert_allclose(np.asarray(a)[~other], b[~other], atol=5e-5)


@settings(max_examples=50)
@given(st.data())
def test_block_visits_miss_no_pair_of_a_segment(data):
    ids = st.lists(st.integers(-2, 3), min_size=9, max_size=9)
    q_segments, kv_segments = (np.array([data.draw(ids)], np.int32) for _ in range(2))
    causal = data.draw(st.booleans())
    visits = np.asarray(splash.block_visits(q_segments, kv_segments, 4, causal=causal))[0]
    for t, s in np.argwhere(q_segments[0][:, None] == kv_segments[0]):
        assert visits[t // 4, s // 4] or (causal and s > t)
    if causal:
        assert not np.triu(visits, 1).any()


def test_splash_gives_padding_after_a_document_what_xla_gives_it():
    rng, (q, k, v, d_out) = draw(8, 140, 4, 2, 16)
    args = (q, k, v, d_out, *segment_rows("packed", 140, rng))
    for a, b in zip(
        run(*args, causal=True, implementation="xla"),
        run(*args, causal=True, implementation="splash_interpret"),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_bfloat16_stays_close_and_stays_bfloat16(implementation):
    rng, arrays = draw(9, 130, 2, 1, 80)
    low = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    segments = segment_rows("mixed", 130, rng)
    ours = run(*low, *segments, causal=True, implementation=implementation)
    expected = reference(*(np.asarray(x, np.float32) for x in low), *segments, True)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.02 * np.abs(b).max())


def test_key_gradients_of_many_blocks_add_up_in_float32():
    """Summed in bfloat16, 64 blocks would lose what a single one keeps."""
    _, (q, k, v, d_out) = draw(10, 256, 4, 1, 16)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, d_out)]
    segments = np.ones((2, 256), np.int32)

    def gradient(block):
        def total(k, v):
            out = block_attention(
                low[0], k, v,
                q_segments=segments, kv_segments=segments, causal_offset=0, query_block=block,
            )  # fmt: skip
            return jnp.sum((out * low[3]).astype(jnp.float32))

        return jax.jit(jax.grad(total, argnums=(0, 1)))(*low[1:3])

    exact = reference(*(np.asarray(x, np.float32) for x in low), segments, segments, True)[2:]

    def error(gradients):
        return [
            np.abs(np.asarray(a, np.float64) - b).mean()
            for a, b in zip(gradients, exact, strict=True)
        ]

    for many, one in zip(error(gradient(4)), error(gradient(256)), strict=True):
        assert many < 1.5 * one


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_cache_is_read_by_the_plain_form(implementation):
    """Also by kernels for hardware that is not there."""
    rng, (q, k, v, _) = draw(11, 24, 4, 2, 16)
    segments = rng.integers(0, 3, (2, 24)).astype(np.int32)

    def last(count, implementation):
        return attention(
            q[:, -count:], k, v,
            q_segments=segments[:, -count:], kv_segments=segments,
            causal_offset=24 - count, implementation=implementation,
        )  # fmt: skip

    for count in (1, 5):
        np.testing.assert_array_equal(last(count, implementation), last(count, "xla"))


def test_an_unknown_implementation_is_refused():
    _, (q, k, v, _) = draw(12, 8, 2, 2, 8)
    ones = np.ones((2, 8), np.int32)
    with pytest.raises(
        InputError, match=r"attention 'flash' is unknown; choose one of xla, xla_halves, splash"
    ):
        attention(
            q, k, v,
            q_segments=ones, kv_segments=ones, causal_offset=0, implementation="flash",
        )  # fmt: skip


@pytest.mark.parametrize("length", [1, 128, 129, 256, 300, 1000, 2048, 2049, 8192, 9000])
def test_blocks_waste_little(length):
    block = block_size(length)
    padding = -length % block
    assert block in BLOCKS
    assert padding < BLOCKS[-1] or padding <= length / 8
    if length == 2048:  # the decoder's training rows take the fused backward kernel
        assert block == BLOCKS[0] and length // block <= MAX_PARTS
