"""Adapters of every setting: merged as PEFT merges them, or refused in one line.

PEFT makes and loads each of them, on a skeleton that has a model's modules and no forward pass.
"""

import copy
import dataclasses
import json
import math
import random
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

from echovlm_jax import pattern_child, patterns  # noqa: E402
from echovlm_jax.child import Child  # noqa: E402
from echovlm_jax.config import ModelConfig, MoEConfig, TextConfig, VisionConfig  # noqa: E402
from echovlm_jax.convert import peft_config, table  # noqa: E402
from echovlm_jax.convert.peft import open_adapter  # noqa: E402
from echovlm_jax.errors import InputError  # noqa: E402

CONFIG = ModelConfig(
    text=TextConfig(
        vocab_size=11,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        mlp_dim=6,
        mrope_section=(1, 1, 0),
    ),
    vision=VisionConfig(depth=2, width=8, out_width=8, num_heads=2, mlp_dim=8, patch_size=2),
    moe=MoEConfig(num_experts=2, top_k=1, expert_mlp_dim=5, shared_mlp_dim=3),
    vision_start_token_id=1,
    vision_end_token_id=2,
    vision_pad_token_id=3,
    image_token_id=4,
    video_token_id=5,
)
TIED = CONFIG.replace(text={"tie_word_embeddings": True})


class Norm(nn.Module):
    """A layer that can't have an update."""


def skeleton(config: ModelConfig, newer: bool) -> nn.Module:
    """Modules with the checkpoint's names, and random weights."""
    torch.manual_seed(0)
    root = nn.Module()
    slots = table.slots(config)
    for name, slot in slots.items():
        if not name.endswith(".weight"):
            continue
        path = (table.newer_name(name) if newer else name).split(".")[:-1]
        parent = root
        for part in path[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        bias = name.removesuffix("weight") + "bias" in slots
        shape = slot.shape
        if name == table.EMBEDDING:
            made = nn.Embedding(*shape)
        elif len(shape) == 2:
            made = nn.Linear(shape[1], shape[0], bias=bias)
        elif len(shape) == 5:
            made = nn.Conv3d(shape[1], shape[0], shape[2:], shape[2:], bias=bias)
        else:
            made = Norm()
            made.weight = nn.Parameter(torch.randn(shape))
            if bias:
                made.bias = nn.Parameter(torch.randn(shape))
        parent.add_module(path[-1], made)
    assert {table.released_name(name) for name in root.state_dict()} == set(slots)
    return root


BASES = {newer: skeleton(CONFIG, newer) for newer in (False, True)}
MODULES = {
    newer: sorted({key.rpartition(".")[0] for key in base.state_dict()})
    for newer, base in BASES.items()
}
LEAVES = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv", "proj"),
    *("fc1", "fc2", "gate", "coefficient", "shared_expert_gate", "lm_head", "embed_tokens"),
    *("mlp.0", "mlp.2", "patch_embed.proj", "self_attn.q_proj", "experts.1.up_proj"),
]
REGEXES = [
    r".*\.(q|v)_proj",
    r".*self_attn\.(q_proj|o_proj)",
    r"^(?!.*visual).*(?:q_proj|down_proj).*",
    r"(model|language_model)\.(.*\.)?layers\.1\..*_proj",
    r".*experts\.\d+\.(up|down)_proj|lm_head",
    r".*attn\.proj",
    "all-linear",
    "ALL-LINEAR",
    r".*embed_tokens",
    r".*layers.*",
    "q_proj",
]
PATTERNS = ["q_proj", "layers.0.*", r"^model\..*v_proj", r"experts\.\d+\.up_proj", "up|down_proj"]
PATTERNS += ["o_proj$", r"layers\.1\.self_attn\.q_proj", "proj", ".*"]
SAVED = ["coefficient", "norm", "norm1", "moe", "lm_head", "embed_tokens", "merger", "ln_q", "fc2"]
SAVED += ["layers.0.mlp", "classifier", "0", "shared_expert"]
ODD = [None, True, False, 0, 1, -1, 8, 1.5, math.inf, math.nan, "x", "", "(", [], ["q_proj"]]
ODD += [[0], [None], {}, {"q_proj": 3}, {"(": 2}, {"q_proj": "3"}, {"q_proj": None}, 10**400, "0"]
INITS = ["gaussian", "eva", "orthogonal", "pissa", "pissa_niter_2", "olora", "mica", "GAUSSIAN"]


def settings(rng: random.Random) -> dict:
    """A configuration that PEFT may make an adapter of."""
    out = {"r": rng.choice([1, 2, 4]), "lora_alpha": rng.choice([1, 3, 8, 16, 0, -2, 0.5])}
    some = rng.sample(LEAVES, rng.randint(1, 4))
    out["target_modules"] = rng.choice(REGEXES) if rng.random() < 0.25 else some
    chance = rng.random
    if chance() < 0.3:
        out["use_rslora"] = True
    if chance() < 0.3:
        out["rank_pattern"] = {p: rng.choice([1, 2, 3]) for p in rng.sample(PATTERNS, 2)}
    if chance() < 0.3:
        out["alpha_pattern"] = {p: rng.choice([1, 5, 0.25]) for p in rng.sample(PATTERNS, 2)}
    if chance() < 0.2:
        out["modules_to_save"] = rng.sample(SAVED, rng.randint(1, 2))
    if chance() < 0.2:
        out["exclude_modules"] = rng.choice(
            [["q_proj"], ["fc1", "lm_head"], r".*\.0\..*", ".*gate"]
        )
    if chance() < 0.2 and not isinstance(out["target_modules"], str):
        out["layers_to_transform"] = rng.choice([0, 1, [0], [1], [0, 1], [], [7]])
        if chance() < 0.5:
            out["layers_pattern"] = rng.choice(["layers", "blocks", ["blocks", "layers"], [], ""])
    if chance() < 0.1:
        out["use_dora"] = True
    if chance() < 0.1:
        out["lora_bias"] = True
    if chance() < 0.1:
        out["bias"] = rng.choice(["all", "lora_only"])
    if chance() < 0.15:
        out["fan_in_fan_out"] = True
    if chance() < 0.2:
        out["init_lora_weights"] = rng.choice(INITS)
    if chance() < 0.05:
        out["trainable_token_indices"] = [1, 3]
    if chance() < 0.2:
        out["task_type"] = rng.choice(["CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"])
    if chance() < 0.1:
        out["lora_dropout"] = 0.1
    return out


def make(folder: Path, told: dict, base: nn.Module, rng: random.Random) -> None:
    """An adapter that PEFT saves, with random values in all that it holds."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**told))
    torch.manual_seed(rng.randrange(2**31))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p))
    model.save_pretrained(folder, save_embedding_layers=rng.choice(["auto", False]))


def spoil(folder: Path, rng: random.Random) -> None:
    """Changes a setting or a tensor of a saved adapter, one time in two."""
    what, told = rng.random(), json.loads((folder / "adapter_config.json").read_text())
    if what < 0.2:
        told[rng.choice(sorted(told))] = rng.choice(ODD)
    elif what < 0.25:
        told[rng.choice(["a_new_scale", "use_new", "lora_gamma"])] = rng.choice(ODD)
    elif what < 0.3:
        told.pop(rng.choice(sorted(told)))
    (folder / "adapter_config.json").write_text(json.dumps(told))
    if 0.3 <= what < 0.5:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        name = rng.choice(sorted(tensors) or ["none"])
        value = tensors.pop(name, torch.ones(2))
        to = [
            name.replace(".layers.0.", ".layers.1."),
            name.replace("lora_A.weight", "lora_magnitude_vector"),
            name.replace("lora_B.weight", "lora_B.bias"),
            name.replace(".weight", ".bias"),
            name.replace("base_model.model.", ""),
            "base_model.model.model.norm.weight",
            "base_model.model.lm_head.weight",
            name,
        ]
        change = rng.random()
        if change < 0.5:
            tensors[rng.choice(to)] = value
        elif change < 0.7:
            tensors |= {name: value, rng.choice(to): value.clone()}
        elif change < 0.85:
            tensors[name] = value.to(rng.choice([torch.bfloat16, torch.float16, torch.float64]))
        save_file(tensors, path)


def theirs(folder: Path, base: nn.Module) -> dict[str, np.ndarray]:
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    state = loaded.merge_and_unload().state_dict()
    return {table.released_name(name): value.numpy() for name, value in state.items()}


def loaded(folder: Path, base: nn.Module) -> dict[str, np.ndarray] | None:
    """`theirs`; without the settings that have no effect or say nothing, where PEFT stumbles over
    one of another type; None for modules to save within one another, which it can't load."""
    try:
        return theirs(folder, base)
    except Exception:
        path = folder / "adapter_config.json"
        told = json.loads(path.read_text())
        told = {k: v for k, v in told.items() if k in peft_config.APPLIED and v is not None}
        path.write_text(json.dumps(told))
    try:
        return theirs(folder, base)
    except KeyError as error:
        names = told.get("modules_to_save") or []
        parts = str(error).split(".")
        within = [i for i in range(len(parts)) if any(parts[i].endswith(one) for one in names)]
        assert len(within) > 1, told
        return None


def ours(folder: Path, base: nn.Module, config: ModelConfig = CONFIG) -> dict[str, np.ndarray]:
    adapter = open_adapter(folder, config)
    out = {}
    for own, value in base.state_dict().items():
        name, values = table.released_name(own), value.numpy()
        row = values.size // values.shape[0]
        # In two pieces, the second of which begins within a row.
        flat, cut = values.reshape(-1), values.size // 2 + 1
        parts = (
            adapter.merged(name, flat[:cut], 0, row),
            adapter.merged(name, flat[cut:], cut, row),
        )
        out[name] = np.concatenate(parts).reshape(values.shape)
    return out


def run(seeds: range, tmp_path: Path) -> dict[str, int]:
    counts = dict.fromkeys(("merged", "refused", "not made", "PEFT fails"), 0)
    for seed in seeds:
        rng = random.Random(seed)
        base, told = BASES[newer := rng.random() < 0.5], settings(rng)
        folder = tmp_path / str(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                make(folder, told, base, rng)
            except Exception:
                counts["not made"] += 1  # PEFT refuses it: the settings alone are still read
                folder.mkdir(exist_ok=True)
                (folder / "adapter_config.json").write_text(
                    json.dumps(told | {"peft_type": "LORA"})
                )
                save_file({"none": torch.ones(1)}, folder / "adapter_model.safetensors")
            spoil(folder, rng)
            try:
                made = ours(folder, base)
            except InputError as error:
                assert "\n" not in str(error) and len(str(error)) < 700, (seed, str(error))
                counts["refused"] += 1
                continue
            wanted = loaded(folder, base)
            if wanted is None:
                counts["PEFT fails"] += 1
                continue
            for name, value in wanted.items():
                scale = max(1.0, float(np.abs(value).max()))
                wrong = float(np.abs(made[name] - value).max()) / scale
                assert wrong < 1e-5, (seed, newer, name, wrong, told)
            counts["merged"] += 1
    return counts


def test_every_setting_merges_as_peft_does_or_is_refused(tmp_path):
    counts = run(range(40), tmp_path)
    assert counts["merged"] > 8 and counts["refused"] > 8, counts


@pytest.mark.slow
def test_five_thousand_adapters(tmp_path):
    counts = run(range(5_000), tmp_path)
    print(counts)
    assert counts["merged"] > 1_000 and counts["refused"] > 1_000, counts
    assert counts["PEFT fails"] < 100, counts


def test_the_table_of_settings_is_pefts():
    """A new version of PEFT with a new setting fails here, not in somebody's results."""
    known = {**peft_config.APPLIED, **peft_config.WITHOUT_EFFECT, **peft_config.REFUSED}
    parts = (peft_config.APPLIED, peft_config.WITHOUT_EFFECT, peft_config.REFUSED)
    assert len(known) == sum(map(len, parts))
    fields = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    assert known.keys() == fields
    defaults = peft.LoraConfig().to_dict()
    for key in known.keys() - {"peft_type", "peft_version", "runtime_config"}:
        assert known[key] == defaults[key], key


def saved_by_peft(folder: Path, base: nn.Module | None = None, **told) -> Path:
    make(folder, told, base or BASES[False], random.Random(1))
    return folder


@pytest.mark.parametrize("newer", [False, True])
def test_embeddings_and_the_head_are_merged(newer, tmp_path):
    base = BASES[newer]
    told = {"target_modules": ["embed_tokens", "lm_head"], "r": 2, "lora_alpha": 3}
    saved_by_peft(tmp_path, base, **told)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("embed_tokens.lora_embedding" in name for name in tensors) == 2
    # As transformers' models do, with the base's own values beside the update.
    own = table.newer_name(table.EMBEDDING) if newer else table.EMBEDDING
    value = base.state_dict()[own] + 1
    tensors["base_model.model." + own.replace(".weight", ".base_layer.weight")] = value
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    made, wanted = ours(tmp_path, base), theirs(tmp_path, base)
    for name in (table.EMBEDDING, table.HEAD):
        np.testing.assert_allclose(made[name], wanted[name], atol=1e-5)
    assert np.abs(made[table.EMBEDDING] - value.numpy()).max() > 0.1


def test_what_a_tied_embedding_can_be(tmp_path):
    base = skeleton(TIED, False)
    path = saved_by_peft(tmp_path / "a", base, target_modules=["embed_tokens"])
    with pytest.raises(InputError, match="tie_word_embeddings"):
        ours(path, base, TIED)
    path = saved_by_peft(
        tmp_path / "b", base, target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    )
    with pytest.raises(InputError, match="ensure_weight_tying"):
        ours(path, base, TIED)
    told = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(told | {"ensure_weight_tying": True}))
    made = ours(path, base, TIED)[table.EMBEDDING]
    np.testing.assert_array_equal(made, theirs(path, base)[table.EMBEDDING])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.up"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"megatron_config": {"x": 1}}, "megatron_config"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"init_lora_weights": 1}, "init_lora_weights"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"bias": "lora_only"}, "bias"),
        ({"peft_type": "ADALORA"}, "peft_type"),
        ({"a_new_way": 0.5}, "a_new_way"),
        ({"a_new_way": 0}, "a_new_way"),
        ({"r": 3}, "r or rank_pattern"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": ["k_proj"]}, "target_modules"),
        ({"target_modules": ["q_proj", "k_proj"]}, "no update of it"),
        ({"target_modules": ["q_proj", "input_layernorm"]}, "target_modules"),
        ({"target_modules": ["q_proj", "self_attn"]}, "no layer"),
        ({"exclude_modules": ["q_proj"]}, "target_modules"),
        ({"layers_to_transform": [0]}, "target_modules"),
        ({"modules_to_save": ["coefficient"]}, "modules_to_save"),
        ({"modules_to_save": "norm"}, "modules_to_save"),
        ({"use_rslora": "yes"}, "use_rslora"),
    ],
)
def test_what_is_not_applied_is_named(change, said, tmp_path):
    path = saved_by_peft(tmp_path, target_modules=["q_proj"], r=2) / "adapter_config.json"
    ours(tmp_path, BASES[False])
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=said) as caught:
        ours(tmp_path, BASES[False])
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"target_modules": r"(.|.)*\.no_such_layer"}, "target_modules"),
        ({"exclude_modules": r"((.?){600}){600}!"}, "exclude_modules"),
        ({"rank_pattern": {"(.+)+!": 2}}, "rank_pattern"),
    ],
)
def test_expressions_that_would_match_for_ever_are_refused(change, key, tmp_path, monkeypatch):
    """Of time, and of memory; whatever it is that makes them take it."""
    told = patterns._told | {"seconds": 0.5}
    monkeypatch.setattr(patterns, "_matcher", Child(pattern_child.__file__, told, 10**6))
    path = saved_by_peft(tmp_path, target_modules=["q_proj"], r=2) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=rf"adapter_config\.json: {key}, .* takes more") as caught:
        ours(tmp_path, BASES[False])
    assert "\n" not in str(caught.value)


def test_repeats_of_repeats_that_end_are_as_pefts(tmp_path):
    path = saved_by_peft(tmp_path, target_modules=r"(.*\.)*q_proj", r=2)
    made, wanted = ours(path, BASES[False]), theirs(path, BASES[False])
    assert any("q_proj" in name for name in made)
    for name, value in made.items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-5)
