"""What is read of the mixture: against a plain forward pass, and by hand."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest

from echovlm_jax import demo
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate import mixture
from echovlm_jax.evaluate.mixture import KINDS, Read
from echovlm_jax.load import load_model
from echovlm_jax.phantom import PhantomDataset

SMALL = demo.CONFIG.replace(
    text={"num_layers": 2, "hidden_size": 32, "mlp_dim": 32},
    vision={"depth": 1, "width": 32, "out_width": 32, "num_heads": 2, "mlp_dim": 64},
    moe={"expert_mlp_dim": 16, "shared_mlp_dim": 16},
)
PICTURE = np.random.default_rng(0).integers(0, 255, (56, 84, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo.make_checkpoint(tmp_path_factory.mktemp("model") / "m", SMALL)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


def test_an_answer_is_read_as_a_plain_forward_pass_reads_it(model):
    inputs = model.prepare([PICTURE], "What is it?", max_new_tokens=16)
    read = mixture.read_answer(model, inputs, "a cyst")
    answer = np.array(model.processor.tokenizer.encode("a cyst"))
    ids = np.concatenate([inputs["input_ids"][0], answer])
    assert np.array_equal(read.tokens, ids)
    assert (read.kind == 0).sum() == 2 * 3  # 56 × 84 pixels are 2 × 3 tokens
    assert (read.kind == 2).sum() == len(answer) and (read.kind[-len(answer) :] == 2).all()
    assert read.expert.shape == (2, len(ids), 2) and read.coefficient.shape == (2, len(ids))
    whole = {**inputs, "input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
    logits = np.asarray(model.forward(whole), np.float64)[0, -len(answer) - 1 : -1]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.log(p[np.arange(len(answer)), answer] / p.sum(-1)).mean()
    assert read.log_probability == pytest.approx(expected, abs=1e-5)


def test_sums_by_hand():
    def one(kind, expert, coefficient):
        tokens = np.arange(len(kind))
        return Read(tokens, np.array(kind), np.array(expert), np.array(coefficient), 0.0)

    read = [
        one([0, 0, 1], [[[0, 1], [0, 2], [2, 1]]], [[0.2, 0.4, 0.9]]),
        one([1], [[[2, 0]]], [[0.5]]),
    ]
    found = mixture.mixture_of(read, 3)
    assert found.tokens.tolist() == [2, 2, 0]
    assert found.shares[0, 0].tolist() == [0.5, 0.25, 0.25]
    assert found.shares[0, 1].tolist() == [0.25, 0.25, 0.5]
    assert np.isnan(found.shares[0, 2]).all() and np.isnan(found.coefficient[0, 2])
    assert found.coefficient[0, :2] == pytest.approx([0.3, 0.7])
    by_organ = mixture.shares_by_organ({"liver": read[:1], "breast": read[1:]}, 3, "question")
    assert by_organ.shape == (1, 2, 3)
    assert by_organ[0].tolist() == [[0.5, 0.0, 0.5], [0.0, 0.5, 0.5]]  # breast comes first


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_an_expert_that_is_off_gives_nothing(model, folder, kind):
    """In `down` it is zero; it must be as if its `up` were, whose product is zero as well."""
    model = load_model(folder, quantize=kind) if kind else model
    batch = {"input_ids": np.arange(32, 80)[None], "attention_mask": np.ones((1, 48), np.int64)}
    before = np.asarray(model.forward(batch))
    off = copy.copy(model)
    off.params = mixture.without_expert(model.params, 0, 2)
    found = np.asarray(off.forward(batch))
    change = np.abs(before - found).max()
    assert change > 0
    assert np.array_equal(before, np.asarray(model.forward(batch)))  # the model's own are as before
    if kind is None:
        experts = model.params["text"]["layers"]["moe"]["experts"]
        up = jnp.asarray(experts["up"]["kernel"]).at[0, 2].set(0)
        other = copy.deepcopy(off.params)
        other["text"]["layers"]["moe"]["experts"] = {**experts, "up": {"kernel": up}}
        off.params = other
        assert np.abs(found - np.asarray(off.forward(batch))).max() < change / 20
    for layer, expert in ((2, 0), (0, 4), (-1, 0)):
        with pytest.raises(InputError, match="2 layers of 4 experts"):
            mixture.without_expert(model.params, layer, expert)


def test_the_effect_is_the_difference_of_two_readings(model):
    dataset = PhantomDataset("test", 2, cine=0.0)
    effect = mixture.effect_of_experts(model, dataset, 0)
    off = copy.copy(model)
    off.params = mixture.without_expert(model.params, 0, 3)
    before, after = mixture.read_exams(model, dataset), mixture.read_exams(off, dataset)
    assert set(effect) == set(before) and sum(map(len, before.values())) == 2
    for organ, values in effect.items():
        change = [
            b.log_probability - a.log_probability
            for a, b in zip(before[organ], after[organ], strict=True)
        ]
        assert values.shape == (4,) and values[3] == pytest.approx(np.mean(change), abs=1e-9)


def test_what_can_not_be_read(model, folder, tmp_path):
    inputs = model.prepare(None, "What is it?", max_new_tokens=16)
    with pytest.raises(InputError, match="answer: is empty"):
        mixture.read_answer(model, inputs, "")
    dense = load_model(demo.make_checkpoint(tmp_path / "dense", SMALL.replace(moe=None)))
    with pytest.raises(InputError, match="no mixture"):
        mixture.read_answer(dense, inputs, "a cyst")
    assert len(KINDS) == 3
