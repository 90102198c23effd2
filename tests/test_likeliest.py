"""The likeliest answers: their probabilities are the model's own, and none above them is missed."""

import jax
import numpy as np
import pytest

from echovlm_jax import demo
from echovlm_jax.errors import InputError
from echovlm_jax.generate.likeliest import likeliest
from echovlm_jax.load import load_model
from echovlm_jax.processing.batch import pad_batch

PICTURE = np.full((56, 56, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(demo.make_checkpoint(tmp_path_factory.mktemp("likeliest") / "model"))


@pytest.fixture(scope="module")
def inputs(model):
    return model.prepare([PICTURE], "What is it?", max_new_tokens=8)


def log_p(model, inputs, rows: np.ndarray) -> np.ndarray:
    """Of the next token after the prompt and each row [R, T] of further ones: [R, V]."""
    made = []
    for row in rows:
        ids = np.concatenate([inputs["input_ids"], np.atleast_2d(row)], axis=1)
        made.append({**inputs, "input_ids": ids, "attention_mask": np.ones_like(ids)})
    logits = model.forward(pad_batch(made, 0))[:, -1]
    return np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)


def test_two_tokens_are_as_counting_all_finds(model, inputs) -> None:
    """Every first token that may lead to one of the likeliest pairs is followed."""
    first = log_p(model, inputs, np.zeros((1, 0), np.int64))[0]
    begun = np.argsort(-first)[:16]
    second = log_p(model, inputs, begun[:, None])
    pairs: list[tuple[float, list[int]]] = []
    for token, later in zip(begun.tolist(), second, strict=True):
        if token in model.stop_ids:
            pairs.append((first[token], []))
        else:
            pairs += [(first[token] + later[n], [token, n]) for n in np.argsort(-later)[:16]]
    expected: dict[str, float] = {}
    for score, ids in sorted(pairs, key=lambda pair: -pair[0])[:16]:
        said = [int(token) for token in ids if token not in model.stop_ids]
        text = model.processor.tokenizer.decode(said).strip()
        expected[text] = expected.get(text, 0.0) + float(np.exp(score))
    found = likeliest(model, inputs, count=16, max_new_tokens=2)
    assert found == sorted(found, key=lambda one: -one.probability)
    assert {one.text: one.probability for one in found} == pytest.approx(expected, rel=1e-3)


def test_the_first_of_one_beam_is_the_greedy_answer(model, inputs) -> None:
    [one] = likeliest(model, inputs, count=1, max_new_tokens=8)
    greedy = model.answer([inputs], max_new_tokens=8)[0]["text"]
    assert one.text == greedy.strip()
    several = likeliest(model, inputs, count=5, max_new_tokens=8)
    assert several[0].probability >= one.probability * (1 - 1e-4)


def test_ended_answers_stay_as_they_are(model, inputs, monkeypatch) -> None:
    """With every token an end, an answer is one token: its probability is the first one's."""
    monkeypatch.setitem(model.__dict__, "stop_ids", tuple(range(model.config.text.vocab_size)))
    first = np.exp(log_p(model, inputs, np.zeros((1, 0), np.int64))[0])
    [one] = likeliest(model, inputs, count=4, max_new_tokens=8)  # all of them say nothing
    assert one.text == "" and one.probability == pytest.approx(np.sort(first)[-4:].sum(), rel=1e-4)


def test_bad_numbers_are_refused(model, inputs) -> None:
    for changes in ({"count": 0}, {"count": 65}, {"max_new_tokens": 0}):
        with pytest.raises(InputError):
            likeliest(model, inputs, **changes)
