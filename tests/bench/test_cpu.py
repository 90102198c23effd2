"""`echovlm bench cpu`: both sides are one model at one task."""

import importlib.util
import math

import numpy as np
import pytest

from echovlm_jax.bench import cpu as bench_cpu
from echovlm_jax.config import preset
from echovlm_jax.errors import InputError
from echovlm_jax.model import abstract_params
from echovlm_jax.train.stages import count


def count_parameters(config) -> int:
    return count(abstract_params(config))


def test_the_scaled_model_has_the_released_proportions() -> None:
    model, full = bench_cpu.scaled_model(), preset("echovlm_11b")
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
    assert model.vision.mlp_ratio == full.vision.mlp_ratio
    depths = text.num_layers / released.num_layers, model.vision.depth / full.vision.depth
    assert math.isclose(*depths, rel_tol=0.02)


def test_a_row_is_an_image_and_text_with_labels() -> None:
    model = preset("tiny")
    row = bench_cpu._inputs(model, 512)
    ids, labels = row["input_ids"][0], row["labels"][0]
    assert (ids == model.image_token_id).sum() == 196 and len(ids) == 512
    assert (labels[:198] == -100).all() and (labels[198:] == ids[198:]).all()
    assert row["pixel_values"].shape == (784, model.vision.patch_dim)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "nano_dense"])
def test_both_sides_take_steps_of_one_model(size) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    result = bench_cpu.bench_train(size=size, tokens=256, rounds=1)
    assert result["parameters"] == count_parameters(preset(size))
    assert result["ratio"] == result["theirs"] / result["ours"]
    forms = result["theirs_by_form"]
    assert result["theirs_form"] == min(forms, key=forms.__getitem__)
    assert len(forms) == (2 if size == "nano_dense" else 4)


@pytest.mark.slow
def test_a_failing_side_says_why(monkeypatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench_cpu, "_SIDE", "raise SystemExit('{side} fell over')")
    with pytest.raises(RuntimeError, match="the run of ours failed:\nours fell over"):
        bench_cpu.bench_train(size="tiny", rounds=1)


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_a_missing_library_is_said_in_one_line(monkeypatch, name) -> None:
    if name != "torch":
        pytest.importorskip("torch")  # it would be missed first
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *rest: None if n == name else found(n, *rest)
    )
    with pytest.raises(InputError, match=rf"^[^\n]*{name} is not installed[^\n]*\[bench\][^\n]*$"):
        bench_cpu.bench_train()


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
        bench_cpu.bench_train(**options)


def test_a_model_too_large_for_the_memory_is_refused(monkeypatch) -> None:
    pytest.importorskip("torch")
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 24 * 2**18}
    monkeypatch.setattr(bench_cpu.os, "sysconf", pages.__getitem__)
    with pytest.raises(InputError, match=r"size qwen2_vl_2b needs about 1.. GiB"):
        bench_cpu.bench_train(size="qwen2_vl_2b")


def test_steps_are_timed_and_a_loss_that_is_no_number_stops(monkeypatch, capsys) -> None:
    losses = iter([1.5, math.nan])
    monkeypatch.setattr(bench_cpu.sys, "stdin", ["a\n", "a\n"])
    with pytest.raises(RuntimeError, match="the loss is nan"):
        bench_cpu._serve(7, {"a": lambda: next(losses)})
    first, second = capsys.readouterr().out.splitlines()
    assert first == '{"parameters": 7, "forms": ["a"]}' and np.float64(second) >= 0
