"""Logits processors against Hugging Face's, and the draw's distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echovlm_jax.ops.sampling import (
    FEW,
    SamplingOptions,
    choose,
    draw,
    filter_logits,
    penalise_repetition,
    sampling,
)

VOCAB = 50


def keys(seed, count):
    return jnp.broadcast_to(jax.random.key(seed), count)


def settings(**changes):
    rows = changes.pop("rows", range(4))
    return sampling(SamplingOptions(**{"temperature": 1.0, **changes}), rows)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, VOCAB + 5])
@pytest.mark.parametrize("top_p", [1e-6, 0.4, 0.93, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
def test_same_logits_as_hugging_face(temperature, top_k, top_p, penalty):
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(top_k)
    logits = rng.normal(0, 3, (4, VOCAB)).astype(np.float32)
    ids = rng.integers(0, VOCAB, (4, 30))
    ids[:, 0] = logits.argmax(-1)
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(ids), torch.tensor(logits))
    expected = hf.TemperatureLogitsWarper(temperature)(None, expected)
    if top_k:
        expected = hf.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = hf.TopPLogitsWarper(top_p)(None, expected)
    seen = np.zeros((4, VOCAB), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    s = settings(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    ours = filter_logits(
        penalise_repetition(logits, seen, s.repetition_penalty),
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
    )
    assert np.isfinite(ours).any(axis=-1).all()
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)


def test_top_k_keeps_what_equals_the_kth():
    logits = np.array([[3.0, 1.0, 2.0, 2.0, 0.0]], np.float32)
    s = settings(top_k=2, rows=[0])
    kept = filter_logits(logits, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)
    assert np.isfinite(kept).tolist() == [[True, False, True, True, False]]


def test_draws_follow_the_probabilities():
    """A chi-squared statistic of 20,000 draws stays under its 99.9 % point for 4 degrees."""
    probabilities = np.array([0.4, 0.3, 0.15, 0.1, 0.05, 0.0])
    count = 20_000
    with np.errstate(divide="ignore"):
        logits = np.tile(np.log(probabilities), (count, 1)).astype(np.float32)
    drawn = np.asarray(draw(logits, keys(0, count), np.arange(count), np.zeros(count, np.int32)))
    found = np.bincount(drawn, minlength=6)
    assert found[5] == 0
    expected = count * probabilities[:5]
    assert ((found[:5] - expected) ** 2 / expected).sum() < 18.5


def test_a_draw_depends_on_seed_row_and_step_alone():
    logits = np.zeros((4, 1000), np.float32)

    def tokens(step=0, rows=(0, 1, 2, 3), **changes):
        s = settings(rows=rows, **changes)
        steps = np.full(4, step, np.int32)
        return np.asarray(draw(logits, keys(s.seed[0], 4), s.rows, steps)).tolist()

    base = tokens()
    assert len(set(base)) == 4
    assert tokens() == base
    assert tokens(step=1) != base and tokens(seed=1) != base
    assert tokens(rows=(3, 2, 1, 0)) == base[::-1]


def test_greedy_takes_the_likeliest_after_the_penalty():
    logits = np.array([[1.0, 3.0, 2.9], [-1.0, -3.0, -1.1]], np.float32)
    seen = np.array([[False, True, False], [True, False, False]])
    own = settings(temperature=0.0, repetition_penalty=1.2, rows=range(2))
    chosen = choose(logits, seen, own, np.zeros(2, np.int32))
    assert chosen.tolist() == [2, 2]


MIXED = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 2.0},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": FEW},
    {"top_k": FEW + 1},
    {"top_k": 10**6},
    {"top_p": 0.6},
    {"top_k": 9, "top_p": 0.9, "repetition_penalty": 1.2},
]


def test_a_row_draws_the_same_whatever_the_others_ask_for():
    """Each branch for itself, and all rows in the one that sorts; ties at the k-th logit too."""
    rng = np.random.default_rng(0)
    count, vocab = len(MIXED), 200
    rows = [settings(**own, seed=n, rows=[n]) for n, own in enumerate(MIXED)]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)
    chosen, compiled = set(), jax.jit(choose)
    for step in range(30):
        logits = rng.integers(-4, 5, (count, vocab)).astype(np.float32) / 2
        seen = rng.random((count, vocab)) < 0.3
        steps = np.full(count, step, np.int32)
        mixed = np.asarray(compiled(logits, seen, joined, steps))
        for n, own in enumerate(rows):
            one = slice(n, n + 1)
            assert compiled(logits[one], seen[one], own, steps[one])[0] == mixed[n]
            chosen.add(int(mixed[n]))
    assert len(chosen) > 20
    # Rows whose token doesn't matter change nothing either.
    idle = np.arange(count) > 6
    found = np.asarray(compiled(logits, seen, joined, steps, idle))
    np.testing.assert_array_equal(found[~idle], mixed[~idle])


def test_only_top_p_and_a_large_top_k_sort_the_vocabulary():
    logits, seen = np.zeros((4, 200), np.float32), np.zeros((4, 200), bool)
    program = jax.make_jaxpr(choose)(logits, seen, settings(), np.zeros(4, np.int32))
    [switch] = [eqn for eqn in program.eqns if eqn.primitive.name == "cond"]
    likeliest, top, full = map(str, switch.params["branches"])
    assert [(" sort[" in text, " top_k[" in text) for text in (likeliest, top, full)] == [
        (False, False), (False, True), (True, False)
    ]  # fmt: skip
    assert "random_bits" not in likeliest and "random_bits" in top
