"""Norms, rotary positions, routing: against plain numpy, and their properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echovlm_jax.ops.moe.dispatch import Experts, load_balancing_loss, moe, route
from echovlm_jax.ops.norms import layer_norm, rms_norm
from echovlm_jax.ops.product.einsum import einsum
from echovlm_jax.ops.rope import apply_rope, mrope_table, vision_table


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_einsum_keeps_the_activations_dtype():
    x, w = jnp.asarray(normal(0, 2, 3, 4), jnp.bfloat16), normal(1, 5, 4)
    assert einsum("BTD,FD->BTF", x, w).dtype == jnp.bfloat16
    wide = einsum("BTD,FD->BTF", x, w, out_dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    expected = np.asarray(x, np.float32) @ np.asarray(jnp.asarray(w, jnp.bfloat16), np.float32).T
    np.testing.assert_allclose(wide, expected, rtol=1e-5)


def test_norms_are_computed_in_float32():
    """In bfloat16 itself the mean of these squares would be off by percents."""
    x = jnp.asarray(200 + normal(2, 2, 3, 512), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    scale, bias = normal(3, 512), normal(4, 512)
    rms = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(np.asarray(rms_norm(x, scale, 1e-6), np.float64), rms, rtol=8e-3)
    centred = wide - wide.mean(-1, keepdims=True)
    layer = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias
    ours = np.asarray(layer_norm(x, scale, bias, 1e-6), np.float64)
    np.testing.assert_allclose(ours, layer, atol=3e-2, rtol=8e-3)


def test_rope_depends_on_distance_alone():
    """The same shift of all positions changes no product of a query and a key."""
    q, k = normal(5, 1, 4, 1, 16), normal(6, 1, 4, 1, 16)
    positions = np.random.default_rng(7).integers(0, 50, (1, 3, 4)).astype(np.int32)

    def scores(shift):
        table = mrope_table(positions + shift, head_dim=16, theta=1e4, section=(2, 3, 3))
        return np.einsum("btnh,bsnh->bts", apply_rope(q, table), apply_rope(k, table))

    np.testing.assert_allclose(scores(0), scores(1000), atol=2e-3)
    other = positions.copy()
    other[0, 1, 2] += 5
    table = mrope_table(other, head_dim=16, theta=1e4, section=(2, 3, 3))
    changed = np.einsum("btnh,bsnh->bts", apply_rope(q, table), apply_rope(k, table))
    assert np.abs(changed - scores(0)).max() > 1e-2


@pytest.mark.parametrize("row", [0, 1, 2])
def test_mrope_sections_follow_their_row(row):
    section = (2, 3, 3)
    zero = np.zeros((1, 3, 1), np.int32)
    moved = zero.copy()
    moved[0, row] = 9
    base, other = (
        mrope_table(p, head_dim=16, theta=1e4, section=section)[1][0, 0] for p in (zero, moved)
    )
    changed = np.flatnonzero(np.asarray(base) != np.asarray(other))
    start = sum(section[:row])
    assert changed.tolist() == list(range(start, start + section[row]))


def test_vision_table_turns_height_channels_then_width_channels():
    cos, sin = vision_table(np.array([[[3, 5]]], np.int32), head_dim=8)
    frequency = np.array([1.0, 10000.0**-0.5])
    angle = np.concatenate([3 * frequency, 5 * frequency])
    np.testing.assert_allclose(cos[0, 0], np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(sin[0, 0], np.sin(angle), atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_moe_equals_a_loop_over_tokens(top_k, normalize):
    experts = Experts(normal(8, 5, 7, 6), normal(9, 5, 7, 6), normal(10, 5, 6, 7))
    x, logits = normal(11, 2, 9, 6), normal(12, 2, 9, 5)
    ours, _ = moe(x, route(logits, top_k=top_k, normalize=normalize), experts)
    gate, up, down = (np.asarray(w, np.float64) for w in experts)
    expected = np.zeros(x.shape)
    for b, t in np.ndindex(2, 9):
        p = np.exp(logits[b, t].astype(np.float64))
        p /= p.sum()
        best = np.argsort(-p)[:top_k]
        total = p[best].sum() if normalize else 1.0
        for e in best:
            g = gate[e] @ x[b, t]
            expected[b, t] += p[e] / total * (down[e] @ (g / (1 + np.exp(-g)) * (up[e] @ x[b, t])))
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_ties_go_to_the_first_expert():
    routing = route(jnp.zeros((1, 1, 4)), top_k=2, normalize=False)
    assert routing.expert.tolist() == [[[0, 1]]]
    np.testing.assert_allclose(routing.weight, 0.25)


def test_balancing_loss_is_least_when_even_and_ignores_padding():
    rng = np.random.default_rng(13)
    logits = rng.standard_normal((2, 1, 4000, 4)).astype(np.float32)
    even = load_balancing_loss(logits, np.ones((1, 4000), bool), top_k=2)
    assert float(even) == pytest.approx(2.0, abs=0.02)
    skewed = logits + np.array([3, 0, 0, 0], np.float32)
    assert load_balancing_loss(skewed, np.ones((1, 4000), bool), top_k=2) > 2.3
    half = np.arange(4000)[None] < 2000
    masked = np.where(half[None, ..., None], logits, skewed)
    kept = load_balancing_loss(masked, half, top_k=2)
    expected = load_balancing_loss(logits[:, :, :2000], np.ones((1, 2000), bool), top_k=2)
    np.testing.assert_allclose(kept, expected, rtol=1e-6)


def test_router_gradient_reaches_every_expert():
    experts = Experts(normal(14, 3, 7, 6), normal(15, 3, 7, 6), normal(16, 3, 6, 7))
    x = normal(17, 1, 40, 6)

    def total(logits):
        return jnp.sum(moe(x, route(logits, top_k=1, normalize=False), experts)[0])

    gradient = jax.grad(total)(normal(18, 1, 40, 3))
    assert (np.abs(np.asarray(gradient)).sum((0, 1)) > 1e-3).all()
