"""`echovlm bench cpu`: both sides are one model at one task."""

import importlib.util
import math

import numpy as np
import pytest

from echovlm_jax.bench.cpu import generation, sides, train
from echovlm_jax.config import preset
from echovlm_jax.errors import InputError
from echovlm_jax.model import abstract_params
from echovlm_jax.train.stages import count


def count_parameters(config) -> int:
    return count(abstract_params(config))


def test_the_scaled_model_has_the_released_proportions() -> None:
    model, full = sides.scaled_model(), preset("echovlm_11b")
    assert 140e6 < count_parameters(model) < 160e6
    text, released = model.text, full.text
    assert text.num_heads / text.num_kv_heads == released.num_heads / released.num_kv_heads
    assert text.mlp_dim / text.hidden_size == released.mlp_dim / released.hidden_size
    assert text.vocab_size / text.hidden_size == released.vocab_size / released.hidden_size
    assert model.moe and full.moe
    assert (model.moe.num_experts, model.moe.top_k) == (full.moe.num_experts, full.moe.top_k)
    for name in ("expert_mlp_dim", "shared_mlp_dim"):
        share = getattr(model.moe, name) / text.hidden_size
        assert share == getattr(full.moe, name) / released.hidden_size
    assert model.vision.head_dim == full.vision.head_dim
    assert model.vision.mlp_dim * 8 == full.vision.mlp_dim
    depths = text.num_layers / released.num_layers, model.vision.depth / full.vision.depth
    assert math.isclose(*depths, rel_tol=0.02)


def test_a_row_is_an_image_and_text_with_labels() -> None:
    model = preset("tiny")
    row = sides.inputs(model, 512)
    ids, labels = row["input_ids"][0], row["labels"][0]
    assert (ids == model.image_token_id).sum() == 196 and len(ids) == 512
    assert (labels[:198] == -100).all() and (labels[198:] == ids[198:]).all()
    assert row["pixel_values"].shape == (784, model.vision.patch_dim)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "nano_dense"])
def test_both_sides_take_steps_of_one_model(size) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    result = train.bench_train(size=size, tokens=256, rounds=1)
    assert result["parameters"] == count_parameters(preset(size))
    assert result["ratio"] == result["theirs"] / result["ours"]
    forms = result["theirs_by_form"]
    assert result["theirs_form"] == min(forms, key=forms.__getitem__)
    assert len(forms) == (2 if size == "nano_dense" else 4)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "nano_dense"])
def test_both_sides_give_the_same_answers(size) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    result = generation.bench_generate(size=size, new_tokens=9, batches=(1, 2), rounds=1)
    assert result["parameters"] == count_parameters(preset(size))
    assert result["same_tokens"] == 1.0
    for phase in ("prefill", "decode"):
        assert list(result[phase]) == ["1", "2"]
        for figures in result[phase].values():
            assert len(figures["theirs_by_form"]) == (2 if size == "nano_dense" else 6)
            # Seconds are better small, tokens a second large.
            faster = figures["theirs"] / figures["ours"]
            assert figures["ratio"] == pytest.approx(faster if phase == "prefill" else 1 / faster)
    assert result["ratio"] == min(figures["ratio"] for figures in result["decode"].values())


def test_each_phase_is_held_against_its_own_fastest_form() -> None:
    """Seconds by hand: the form that is fast in prefill is slow in decoding."""
    theirs = {"a": {"prefill": 1.0, "decode": 8.0}, "b": {"prefill": 3.0, "decode": 4.0}}
    asked = []

    def ask(question):
        asked.append((question["form"], question["new_tokens"]))
        return theirs[question["form"]] | {"tokens": [[1, 2, 3]] * 2}

    def answer(question):
        return {"prefill": 0.5, "decode": 1.0, "tokens": [[1, 2, 4]] * 2}

    sides_ = {"ours": answer, "theirs": ask}
    found = generation._compare(sides_, 2, ["a", "b"], 3, 2, lambda n: None)
    assert found["prefill"]["theirs_form"] == "a" and found["prefill"]["ratio"] == 2.0
    assert found["decode"]["theirs_form"] == "b" and found["decode"]["ratio"] == 4.0
    assert (found["prefill"]["ours"], found["prefill"]["theirs"]) == (0.5, 1.0)
    assert (found["decode"]["ours"], found["decode"]["theirs"]) == (4.0, 1.0)  # 2 rows, 2 tokens
    assert found["same_tokens"] == pytest.approx(2 / 3)
    assert asked.count(("a", 3)) == asked.count(("b", 3)) == 3  # one more is not timed


@pytest.mark.slow
def test_a_failing_side_says_why(monkeypatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setattr(sides, "PROGRAM", "raise SystemExit('{side} fell over')")
    with pytest.raises(RuntimeError, match="the run of ours failed:\nours fell over"):
        train.bench_train(size="tiny", rounds=1)


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_a_missing_library_is_said_in_one_line(monkeypatch, name) -> None:
    if name != "torch":
        pytest.importorskip("torch")  # it would be missed first
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *rest: None if n == name else found(n, *rest)
    )
    with pytest.raises(InputError, match=rf"^[^\n]*{name} is not installed[^\n]*\[bench\][^\n]*$"):
        train.bench_train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 199}, "tokens must be at least 200, found 199"),
        ({"rounds": 0}, "rounds must be at least 1, found 0"),
        ({"threads": 0}, "threads must be at least 1, found 0"),
        ({"size": "small"}, "preset 'small' is unknown"),
    ],
)
def test_wrong_settings_are_refused(options, message) -> None:
    pytest.importorskip("torch")
    with pytest.raises(InputError, match=message):
        train.bench_train(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 199}, "prompt must be at least 200, found 199"),
        ({"new_tokens": 1}, "new_tokens must be at least 2, found 1"),
        ({"batches": (4, 0)}, "batches must be at least 1, found 0"),
    ],
)
def test_wrong_settings_of_answers_are_refused(options, message) -> None:
    pytest.importorskip("torch")
    with pytest.raises(InputError, match=message):
        generation.bench_generate(**options)


def test_a_model_too_large_for_the_memory_is_refused(monkeypatch) -> None:
    pytest.importorskip("torch")
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 24 * 2**18}
    monkeypatch.setattr(sides.os, "sysconf", pages.__getitem__)
    with pytest.raises(InputError, match=r"size qwen2_vl_2b needs about 1.. GiB"):
        train.bench_train(size="qwen2_vl_2b")


def test_steps_are_timed_and_a_loss_that_is_no_number_stops(monkeypatch, capsys) -> None:
    losses = iter([1.5, math.nan])
    monkeypatch.setattr(sides.sys, "stdin", ['"a"\n', '"a"\n'])
    with pytest.raises(RuntimeError, match="the loss is nan"):
        train._serve(7, {"a": lambda: next(losses)})
    first, second = capsys.readouterr().out.splitlines()
    assert first == '{"parameters": 7, "forms": ["a"]}' and np.float64(second) >= 0
