"""Cross-entropy in chunks equals a dense one; no target lies in another segment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from echovlm_jax.mesh import AXES, activation_layout, make_mesh
from echovlm_jax.ops.moe.dispatch import load_balancing_loss
from echovlm_jax.ops.moe.routing import balancing_losses, balancing_part
from echovlm_jax.train.loss import IGNORE, token_losses
from echovlm_jax.train.step import targets

WIDTH = 16


def inputs(vocab: int, rows: int = 4, length: int = 8, ignored: float = 0.3) -> tuple:
    """Hidden states, head, labels, and weights of the tokens, in float32; logits of several."""
    rng = np.random.default_rng(vocab)
    hidden = rng.normal(size=(rows, length, WIDTH)).astype(np.float32)
    head = rng.normal(size=(vocab, WIDTH)).astype(np.float32)
    labels = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    labels[0, :2] = 0, vocab - 1
    labels[rng.random(labels.shape) < ignored] = IGNORE
    weights = rng.normal(size=labels.shape).astype(np.float32)
    return hidden, head, labels, weights


def dense(hidden, head, labels, weights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses, and the gradients of their weighted sum, by the formula, in float64."""
    hidden, head = hidden.astype(np.float64), head.astype(np.float64)
    logits = hidden @ head.T
    logits -= logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    counted = labels != IGNORE
    label = np.eye(len(head))[np.where(counted, labels, 0)]
    losses = np.where(counted, -(log_p * label).sum(axis=-1), 0)
    d_logits = (np.exp(log_p) - label) * (counted * weights)[..., None]
    return losses, d_logits @ head, np.einsum("btv,btd->vd", d_logits, hidden)


def chunked(hidden, head, labels, weights, **options) -> tuple:
    def total(hidden, head):
        losses = token_losses(hidden, head, labels, **options)
        return jnp.sum(losses * weights), losses

    return jax.jit(lambda *xs: jax.grad(total, argnums=(0, 1), has_aux=True)(*xs))(hidden, head)


def check(made: tuple, wanted: tuple, tolerance: float = 2e-6) -> None:
    (d_hidden, d_head), losses = made
    for got, value in zip((losses, d_hidden, d_head), wanted, strict=True):
        error = np.abs(np.asarray(got, np.float64) - value).max() / np.abs(value).max()
        assert error < tolerance


# A column of logits of 4 · 8 tokens is 128 bytes.
@pytest.mark.parametrize(
    ("vocab", "most", "chunks"),
    [(96, 2**20, 1), (96, 128 * 48, 2), (96, 128 * 10, 12), (77, 128 * 11, 7), (77, 128 * 12, 7),
     (61, 128 * 60, 61), (64, 1, 64)],
)  # fmt: skip
def test_any_number_of_chunks_gives_the_dense_loss(vocab, most, chunks):
    data = inputs(vocab)
    check(chunked(*data, logit_bytes=most), dense(*data))
    program = str(jax.make_jaxpr(lambda h, w: token_losses(h, w, data[2], logit_bytes=most))(
        *data[:2]
    ))  # fmt: skip
    assert f"f32[4,8,{vocab // chunks}]" in program
    assert chunks == 1 or f"f32[4,8,{vocab}]" not in program


def test_the_largest_logits_neither_overflow_nor_vanish():
    hidden, head, labels, weights = inputs(40)
    head[:] *= 60
    check(chunked(hidden, head, labels, weights, logit_bytes=128 * 8),
          dense(hidden, head, labels, weights), 1e-4)  # fmt: skip


def test_no_label_at_all_costs_nothing():
    hidden, head, labels, weights = inputs(40)
    (d_hidden, d_head), losses = chunked(
        hidden, head, np.full_like(labels, IGNORE), weights, logit_bytes=128 * 8
    )
    assert not np.any(losses) and not np.any(d_hidden) and not np.any(d_head)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 8, 1), (1, 2, 2, 2, 1), (8, 1, 1, 1, 1), (1, 2, 1, 2, 2)], ids=str
)
@pytest.mark.parametrize("vocab", [96, 8 * 7])
def test_a_head_split_over_a_mesh_gives_the_dense_loss(sizes, vocab):
    """On `tensor` 8 and 56 words, each device's 7 make one chunk or seven."""
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    layout = activation_layout(mesh)
    hidden, head, labels, weights = inputs(vocab, rows=8)
    with jax.set_mesh(mesh):
        tokens = NamedSharding(mesh, layout.spec("batch", "length"))
        placed = (
            jax.device_put(hidden, NamedSharding(mesh, layout.spec("batch", "length", None))),
            jax.device_put(head, NamedSharding(mesh, layout.spec("vocab", "embed"))),
            jax.device_put(labels, tokens),
            jax.device_put(weights, tokens),
        )
        for most in (1, 2**20):
            made = chunked(*placed, layout=layout, logit_bytes=most)
            check(made, dense(hidden, head, labels, weights))
            d_head = made[0][1]
            assert d_head.sharding.is_equivalent_to(placed[1].sharding, 2)


def test_in_bfloat16_the_sums_are_still_of_float32():
    """The loss of bfloat16 inputs is that of the same numbers in float64, not a rounded one."""
    hidden, head, labels, weights = inputs(96)
    low = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    losses = token_losses(*low, labels, logit_bytes=128 * 12)
    wanted = dense(*(x.astype(np.float64) for x in low), labels, weights)[0]
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, wanted, rtol=1e-5, atol=1e-5)


def test_a_tied_head_gets_both_gradients():
    hidden, head, labels, weights = inputs(48)
    tokens = np.random.default_rng(0).integers(0, 48, labels.shape)

    def total(table):
        x = jnp.tanh(table[tokens]) + hidden
        return jnp.sum(token_losses(x, table, labels, logit_bytes=128 * 6) * weights)

    x = np.tanh(head.astype(np.float64)[tokens]) + hidden
    _, d_hidden, wanted = dense(x, head, labels, weights)
    np.add.at(wanted, tokens, d_hidden * (1 - np.tanh(head.astype(np.float64)[tokens]) ** 2))
    np.testing.assert_allclose(jax.grad(total)(head), wanted, atol=2e-6 * np.abs(wanted).max())


def test_a_target_is_the_next_token_of_the_same_segment():
    rng = np.random.default_rng(3)
    lengths = rng.integers(0, 7, (20, 3))
    segments = np.zeros((20, 18), np.int32)
    for row, parts in zip(segments, lengths, strict=True):
        found = np.repeat([5, 1, 2], parts)  # a segment's number need not grow
        row[rng.integers(0, 2) :][: len(found)] = found[: 18 - 1]
    labels = rng.integers(0, 50, segments.shape).astype(np.int32)
    labels[rng.random(labels.shape) < 0.2] = IGNORE
    made = np.asarray(targets(labels, segments))
    for b, t in np.ndindex(*segments.shape):
        last = t + 1 == 18 or segments[b, t + 1] != segments[b, t] or segments[b, t] == 0
        assert made[b, t] == (IGNORE if last else labels[b, t + 1])
    assert (made != IGNORE).any()


def test_the_balancing_loss_of_each_row_is_its_own():
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(2, 3, 6, 4)).astype(np.float32)
    counted = rng.random((3, 6)) < 0.7
    counted[1] = False
    rows = balancing_losses(logits, counted, top_k=2)
    for row in (0, 2):
        probability = np.exp(logits[:, row, counted[row]].astype(np.float64)).reshape(-1, 4)
        probability /= probability.sum(axis=-1, keepdims=True)
        best = np.argsort(-probability, axis=-1)[:, :2]
        share = np.stack([(best == expert).sum() / len(best) for expert in range(4)])
        np.testing.assert_allclose(rows[row], 4 * (share * probability.mean(0)).sum(), rtol=1e-5)
    assert (
        rows[1] == 0
        and np.isfinite(
            jax.grad(lambda x: jnp.sum(balancing_losses(x, counted, top_k=2)))(logits)
        ).all()
    )
    whole = load_balancing_loss(logits[:, 2:], counted[2:], top_k=2)
    np.testing.assert_allclose(rows[2], whole, rtol=1e-6)


def test_the_parts_of_a_batch_add_up_to_its_balancing_loss():
    """The loss of all tokens at once, and its gradient, whatever the parts are."""
    rng = np.random.default_rng(5)
    logits = 2 * rng.normal(size=(3, 4, 6, 4)).astype(np.float32)
    logits[:, 2] += np.float32([3, 0, 0, 0])  # a row of its own taste
    counted = rng.random((4, 6)) < 0.7
    best = np.argsort(-logits[:, counted].reshape(-1, 4), axis=-1)[:, :2]
    chosen = np.bincount(best.ravel(), minlength=4).astype(np.float32)
    tokens = jnp.float32(counted.sum())

    def parts(logits):
        halves = [(logits[:, rows], counted[rows]) for rows in (slice(0, 1), slice(1, 4))]
        return sum(balancing_part(x, mask, chosen, tokens) for x, mask in halves)

    def whole(logits):
        return load_balancing_loss(logits, counted, top_k=2)

    np.testing.assert_allclose(parts(logits), whole(logits), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(parts)(logits), jax.grad(whole)(logits), atol=1e-7)
    rows = balancing_losses(logits, counted, top_k=2)
    by_row = np.sum(rows * counted.sum(-1)) / tokens
    assert abs(by_row - whole(logits)) > 1e-2  # another number than each row's by itself
