"""Adapters both ways: what training leaves works in PEFT on PyTorch, and PEFT's works here."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import jax  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from echovlm_jax.bench.torch_model import build, released_names  # noqa: E402
from echovlm_jax.checkpoint import open_checkpoints  # noqa: E402
from echovlm_jax.cli import main  # noqa: E402
from echovlm_jax.config import to_hf  # noqa: E402
from echovlm_jax.convert import table  # noqa: E402
from echovlm_jax.convert.from_torch import convert  # noqa: E402
from echovlm_jax.convert.load import load_params  # noqa: E402
from echovlm_jax.convert.peft import adapter_updates, export_adapter, open_adapter  # noqa: E402
from echovlm_jax.convert.to_torch import export  # noqa: E402
from echovlm_jax.errors import InputError  # noqa: E402
from echovlm_jax.model import EchoVLM, param_specs, shapes_of  # noqa: E402
from echovlm_jax.processing.batch import make_batch  # noqa: E402
from echovlm_jax.train.config_file import load_config  # noqa: E402
from echovlm_jax.train.lora import lora_specs, scaled  # noqa: E402
from echovlm_jax.train.stages import match_rules, read_rules, split  # noqa: E402
from echovlm_jax.train.step import TrainState  # noqa: E402
from tests.golden.make_golden import rope_positions  # noqa: E402
from tests.parity.cases import CONFIGS, TOKENS, inputs  # noqa: E402
from tests.parity.test_qwen2_5_vl import CONFIGS as QWEN2_5  # noqa: E402
from tests.parity.torch_echovlm import save  # noqa: E402
from tests.parity.torch_released import Released  # noqa: E402

CONFIG = CONFIGS["released_shape"]
QWEN2_5_VL = QWEN2_5["irregular_tied"]
LORA = {"rank": 3, "alpha": 5, "dropout": 0.1}
STAGES = {
    "instruction": None,
    # A convolution, experts and a router with updates; of the merger only a part in full.
    "own": (
        ("vision/patch_embed/kernel", "lora"),
        ("text/layers/moe/(experts|shared)/.*", "lora"),
        ("text/layers/moe/router/kernel", "lora"),
        ("text/layers/(coefficient|attn_norm)/.*", "full"),
        ("vision/merger/fc2/.*", "full"),
        ("text/embed/.*", "full"),
        (".*", "frozen"),
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint in released form."""
    folder = tmp_path_factory.mktemp("peft") / "base"
    folder.mkdir()
    state = {n: t.contiguous().clone() for n, t in Released(CONFIG, 1).state_dict().items()}
    save_file({name: state[name] for name in table.slots(CONFIG)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(to_hf(CONFIG, dtype="float32")))
    return folder


def torch_base(base) -> torch.nn.Module:
    model = Released(CONFIG, 2)  # other weights, which the base's replace
    missing, unexpected = model.load_state_dict(load_file(base / "model.safetensors"), strict=False)
    assert not unexpected and not [name for name in missing if "inv_freq" not in name]
    return model


@pytest.fixture(scope="module")
def run(base):
    """stage → a run's folder."""

    def make(stage: str):
        folder = base.parent / f"run-{stage}"
        return folder if folder.exists() else trained(base, folder, STAGES[stage])

    return make


def trained(base, folder, rules):
    """A run's folder, as training leaves it, with random values in all that trains."""
    rng = np.random.default_rng(3)
    config, params = load_params(base)
    matched = match_rules(params, read_rules("instruction", rules), folder.name)
    how = {path: rule.how for path, rule in matched.items()}
    full, frozen = split(params, how)
    trainable = {
        "params": jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), full),
        "lora": jax.tree.map(
            lambda s: 0.2 * rng.normal(size=s.shape),
            shapes_of(lora_specs(param_specs(config), how, LORA["rank"])),
        ),
    }
    trainable = jax.tree.map(lambda x: np.asarray(x, np.float32), trainable)
    (folder / "model").mkdir(parents=True)
    settings = {"model": str(base), "lora": LORA}
    (folder / "config.json").write_text(json.dumps(settings))
    described = (base / "config.json").read_text()
    (folder / "model" / "config.json").write_text(described)
    saved = open_checkpoints(folder / "checkpoints", keep=1)
    state = TrainState(np.int32(1), trainable, frozen, {"count": np.int32(1)})
    saved.save(1, state, {"config": settings})
    saved.wait()
    saved.close()
    return folder


BATCH = {name: x for name, x in inputs("image", CONFIG, seed=7).items() if name != "labels"}


@jax.jit
def forward(variables):
    return EchoVLM(CONFIG).apply(variables, make_batch(CONFIG, BATCH), method="forward")


def ours(folder) -> np.ndarray:
    return np.asarray(forward({"params": load_params(folder)[1]}))


def theirs(model: torch.nn.Module) -> np.ndarray:
    given = {name: torch.from_numpy(x) for name, x in BATCH.items()}
    positions = torch.from_numpy(rope_positions(BATCH, TOKENS, 2))
    with torch.no_grad():
        return model.eval()(**given, position_ids=positions, use_cache=False).numpy()


def differs(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("stage", STAGES)
def test_an_adapter_written_here_loads_in_peft(stage, base, run, tmp_path, recwarn):
    report = export_adapter(run(stage), tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(torch_base(base), str(tmp_path / "adapter"))
    missing = [str(w.message) for w in recwarn if "missing" in str(w.message).lower()]
    assert not missing, missing
    wanted = ours(run(stage))
    assert differs(theirs(model), wanted) < 1e-4
    assert differs(ours(base), wanted) > 1e-2  # the adapter does something
    told = model.peft_config["default"]
    assert (told.r, told.lora_alpha, told.lora_dropout) == (3, 5, 0.1)
    assert told.base_model_name_or_path == str(base)
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    # What PEFT would save of it is what we wrote, to the name.
    assert written.keys() == peft.get_peft_model_state_dict(model).keys()
    assert report["tensors"] == len(written)
    assert report["bytes"] == sum(t.numel() * 4 for t in written.values())
    if stage == "instruction":
        assert told.modules_to_save == ["coefficient", "moe"]
    else:
        assert "base_model.model.model.layers.1.moe.experts.3.up_proj.lora_B.weight" in written


MERGER_IN_FULL = (("vision/merger/.*", "full"), (r"text/(final_norm|layers/attn_norm)/.*", "full"))


@pytest.mark.parametrize("rules", [(), MERGER_IN_FULL], ids=["v2_lora", "in full"])
def test_an_adapter_of_a_dense_model_loads_in_transformers_own(rules, tmp_path):
    """Whose modules have other names than the tensors of released files."""
    recipe = load_config(Path(__file__).parents[2] / "configs/v2_lora.py").stage_rules
    model = build(QWEN2_5_VL, seed=4)
    base = save(model, QWEN2_5_VL, tmp_path / "base")
    run = trained(base, tmp_path / "run", (*rules, *recipe))
    export_adapter(run, tmp_path / "adapter")
    changed = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert written.keys() == peft.get_peft_model_state_dict(changed).keys()
    merged = released_names(dict(changed.merge_and_unload().named_parameters()))
    wanted = table.flatten(load_params(run)[1])
    for name, slot in table.slots(QWEN2_5_VL).items():
        value = wanted[slot.path][slot.index].reshape(slot.shape)
        np.testing.assert_allclose(merged[name].detach(), value, atol=1e-5, err_msg=name)
    convert(base, tmp_path / "merged", adapter=tmp_path / "adapter")
    made = table.flatten(load_params(tmp_path / "merged")[1])
    for path, value in wanted.items():
        np.testing.assert_allclose(made[path], value, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("stage", [pytest.param("instruction", marks=pytest.mark.slow), "own"])
def test_it_comes_back_as_it_was(stage, base, run, tmp_path):
    """Merged into the base it is the run; as updates it is what the run stored."""
    export_adapter(run(stage), tmp_path / "adapter")
    convert(base, tmp_path / "merged", adapter=tmp_path / "adapter")
    made, wanted = (table.flatten(load_params(f)[1]) for f in (tmp_path / "merged", run(stage)))
    for path, value in wanted.items():
        np.testing.assert_allclose(made[path], value, atol=1e-5, err_msg=path)
    adapter = open_adapter(tmp_path / "adapter", CONFIG)
    updates, scale = adapter_updates(adapter, CONFIG)
    assert scale == pytest.approx(5 / 3)
    params = table.flatten(load_params(base)[1])
    for name, slot in table.slots(CONFIG).items():
        if name in adapter.full:
            params[slot.path] = wanted[slot.path]
    variables = {"params": table.unflatten(params), "lora": scaled(updates, scale)}
    # Nothing is added to a weight here: this is LoRA merged against unmerged.
    assert differs(np.asarray(forward(variables)), ours(run(stage))) < 1e-5


def test_an_adapter_made_by_peft_is_read(base, tmp_path):
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=7,
        use_rslora=True,
        target_modules=["qkv", "q_proj", "o_proj", "proj", "down_proj", "fc2", "gate", "mlp.2"],
        modules_to_save=["coefficient", "norm1"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={r"experts\.\d+\.down_proj": 3},
        init_lora_weights=False,
    )
    model = peft.get_peft_model(torch_base(base), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "adapter")
    command = ["convert", str(base), str(tmp_path / "ours"), "--adapter", str(tmp_path / "adapter")]
    assert main([*command, "--json"]) == 0
    wanted = theirs(model)
    assert differs(ours(tmp_path / "ours"), wanted) < 1e-4
    assert differs(ours(base), wanted) > 1e-2
    # The same conversion is there already; without the adapter it is another one.
    assert main([*command, "--json"]) == 0
    assert main([*command[:3]]) == 2
    # The updates by themselves: ranks and scales that differ become one.
    adapter = open_adapter(tmp_path / "adapter", CONFIG)
    updates, scale = adapter_updates(adapter, CONFIG)
    assert updates["text"]["layers"]["attn"]["q"]["a"].shape == (2, 4, 64)
    assert updates["text"]["layers"]["moe"]["experts"]["down"]["b"].shape == (2, 4, 64, 4)
    before, after = (table.flatten(load_params(f)[1]) for f in (base, tmp_path / "ours"))
    for path, low in table.flatten(updates).items():
        if path.endswith("/a"):
            kernel = before[path[:-1] + "kernel"]
            high = table.flatten(updates)[path[:-1] + "b"]
            lead = kernel.shape[: low.ndim + high.ndim - kernel.ndim - 2]
            added = high.reshape(*lead, -1, 4) @ low.reshape(*lead, 4, -1)
            merged = kernel + scale * added.reshape(kernel.shape)
            made = after[path[:-1] + "kernel"]
            np.testing.assert_allclose(made, merged, atol=1e-5, err_msg=path)


def test_what_cannot_be_an_adapter_is_refused(base, run, tmp_path):
    with pytest.raises(InputError, match="is no training run's folder"):
        export_adapter(base, tmp_path / "a")
    with pytest.raises(InputError, match="no low-rank updates to merge; leave --merge-lora out"):
        export(base, tmp_path / "a", merge_lora=True)
    assert main(["export", str(base), str(tmp_path / "a"), "--merge-lora"]) == 2
    good = run("instruction")
    export_adapter(good, tmp_path / "adapter")
    with pytest.raises(InputError, match="exists; delete it"):
        export_adapter(good, tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for key, value, said in (
        ("peft_type", "IA3", "only LORA is read"),
        ("use_dora", True, "use_dora is True, which is not read"),
        ("bias", "all", "only none is read"),
        ("lora_alpha", "x", "lora_alpha is no number: x"),
    ):
        changed = json.dumps({**told, key: value})
        (tmp_path / "adapter" / "adapter_config.json").write_text(changed)
        with pytest.raises(InputError, match=said) as error:
            convert(base, tmp_path / "b", adapter=tmp_path / "adapter")
        assert "\n" not in str(error.value)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(told))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    first = min(name for name in tensors if "q_proj.lora_A" in name)
    for change, said in (
        ({first: None}, "lora_A and lora_B don't fit"),
        ({first: tensors[first][:, 1:].contiguous()}, r"has shape \[3, 63\], expected \[3, 64\]"),
        ({"base_model.model.x.lora_A.weight": tensors[first].clone()}, "has no place"),
        ({first: tensors[first].to(torch.int8)}, "the dtype int8"),
    ):
        content = {name: t for name, t in (tensors | change).items() if t is not None}
        save_file(content, tmp_path / "adapter" / "adapter_model.safetensors")
        with pytest.raises(InputError, match=said) as error:
            convert(base, tmp_path / "b", adapter=tmp_path / "adapter")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.partial").exists()
