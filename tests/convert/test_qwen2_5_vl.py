"""Checkpoints of the second architecture: there and back, experts, few bits, full sizes."""

import json
from pathlib import Path

import numpy as np
import pytest

from echovlm_jax.config import ModelConfig, preset, to_hf
from echovlm_jax.convert import convert, export, inspect, load_params, table
from echovlm_jax.convert.upcycle import PRESERVED, upcycle
from echovlm_jax.storage import writer as store
from tests.convert.checkpoints import DENSE, MINI, digests, new_name, tensors, write
from tests.convert.test_upcycle import weights

UNTIED = DENSE.replace(
    vision={
        "depth": 3,
        "mlp_dim": 52,
        "norm": "rms",
        "mlp": "gated",
        "window_size": 56,
        "full_attention_layers": (1,),
    },
    tokens_per_second=2,
)
TIED = UNTIED.replace(text={"tie_word_embeddings": True, "num_kv_heads": 1})


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["7B-like", "3B-like"])
def test_every_bit_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: ModelConfig, newer: bool
) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 3000)
    values = tensors(config)
    named = {new_name(name): value for name, value in values.items()} if newer else values
    source = write(tmp_path / "source", named, config, shards=2)
    report = convert(source, tmp_path / "ours")
    assert report["missing"] == report["unexpected"] == []
    export(tmp_path / "ours", tmp_path / "back")
    wanted = write(tmp_path / "old", values, config) if newer else source
    assert digests(tmp_path / "back") == digests(wanted)
    assert (tmp_path / "back/config.json").read_bytes() == (source / "config.json").read_bytes()
    assert load_params(tmp_path / "ours")[0] == config


def test_names_of_the_released_files() -> None:
    """As the released index files list them."""
    names = {name for name in table.slots(UNTIED) if name.startswith("visual.")}
    block = {"norm1.weight", "norm2.weight"}
    for part in ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        block |= {f"{part}.weight", f"{part}.bias"}
    merger = {"ln_q.weight", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"}
    assert names == {
        "visual.patch_embed.proj.weight",
        *(f"visual.merger.{name}" for name in merger),
        *(f"visual.blocks.{n}.{name}" for n in range(3) for name in block),
    }


@pytest.mark.parametrize(
    "name",
    [
        "qwen2_5_vl_3b",
        pytest.param("qwen2_5_vl_7b", marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl_32b", marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl_72b", marks=pytest.mark.slow),
    ],
)
def test_full_sizes_are_pytorchs(name: str) -> None:
    """Every tensor's shape, of models without weights on both sides."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = preset(name)
    hf = transformers.AutoConfig.for_model(**to_hf(config))
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(hf)
    theirs = {table.released_name(n): tuple(p.shape) for n, p in model.named_parameters()}
    assert {name: slot.shape for name, slot in table.slots(config).items()} == theirs


@pytest.mark.parametrize(
    ("config", "init"),
    [(UNTIED, "random"), pytest.param(TIED, "sliced", marks=pytest.mark.slow)],
)
def test_experts_beside_it_preserve_its_function(
    tmp_path: Path, config: ModelConfig, init: str
) -> None:
    source = write(tmp_path / "dense", weights(config), config)
    report = upcycle(source, tmp_path / "moe", like=MINI.moe, init=init)
    assert report["ok"] and report["max_logit_change"] <= PRESERVED
    made = load_params(tmp_path / "moe")[0]
    assert made == config.replace(moe=MINI.moe)
    raw = json.loads((tmp_path / "moe/config.json").read_text())
    assert raw["model_type"] == "qwen2_5_vl"
    assert raw["architectures"] == ["Qwen2_5_VLMOEForConditionalGeneration"]
    # A logit does change where the dense path no longer counts double.
    wrong = upcycle(source, tmp_path / "wrong", like=MINI.moe, init="released")
    assert wrong["max_logit_change"] > PRESERVED


def test_few_bits_leave_the_tower_wide(tmp_path: Path) -> None:
    source = write(tmp_path / "source", weights(UNTIED), UNTIED)
    report = convert(source, tmp_path / "int8", quantize="int8")
    assert set(report["quantized"]) == {"int8"}
    wide, few = inspect(source)["bytes_by_module"], inspect(tmp_path / "int8")["bytes_by_module"]
    for module, size in wide.items():
        if module.startswith("vision"):
            assert few[module] == size, module
    params = load_params(tmp_path / "int8")[1]
    kept = params["vision"]["blocks"]["mlp"]["down"]["kernel"]
    slots = [n for n, slot in table.slots(UNTIED).items() if slot.path.endswith("mlp/down/kernel")]
    stored = weights(UNTIED)
    assert len([n for n in slots if n.startswith("visual.")]) == len(kept) == 3
    np.testing.assert_array_equal(kept[2], stored["visual.blocks.2.mlp.down_proj.weight"])
