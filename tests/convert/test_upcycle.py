"""A dense Qwen2-VL gets experts: what it computes stays, and every new parameter can learn."""

import json
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from echovlm_jax.cli import main
from echovlm_jax.config import ModelConfig, from_hf, preset, to_hf
from echovlm_jax.convert import export, inspect, load_params, table
from echovlm_jax.convert.journal import Journal
from echovlm_jax.convert.parity import parity
from echovlm_jax.convert.upcycle import PRESERVED, read_mixture, scaled_mixture, upcycle
from echovlm_jax.errors import InputError
from echovlm_jax.train.program import init_state, make_program
from tests.convert.checkpoints import DENSE, DTYPES, MINI, TIED, Tensors, digests, write
from tests.distributed.train_steps import place, random_batch

LIKE = MINI.moe
MLP = "model.layers.1.mlp"
MOE = "model.layers.1.moe"


def weights(config: ModelConfig = DENSE, dtype: str = "float32") -> Tensors:
    """Values with which layers matter: norms around 1, matrices that keep a vector's length."""
    rng = np.random.default_rng(3)
    out = {}
    for name, slot in table.slots(config).items():
        values = rng.normal(size=slot.shape)
        if slot.path.endswith("scale"):
            values = 1 + 0.2 * values
        else:
            values /= np.sqrt(slot.shape[-1]) if len(slot.shape) > 1 else 5
        out[name] = values.astype(DTYPES[dtype])
    return out


def made(root: Path, config: ModelConfig = DENSE, stored: str = "float32", **options: Any):
    """(result folder, report)."""
    source, target = root / "dense", root / "moe"
    if not source.exists():
        write(source, weights(config, stored), config, shards=2)
    return target, upcycle(source, target, **{"like": LIKE, **options})


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of other things: two models needn't be compiled."""
    monkeypatch.setattr("echovlm_jax.convert.upcycle.logit_change", lambda *_: 0.0)


def tensors(folder: Path, back: Path) -> Tensors:
    """What a converted folder holds, by released name, read by the `safetensors` package."""
    export(folder, back)
    return load_file(back / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "dtype", "init"),
    [
        (DENSE, "bfloat16", "sliced"),
        pytest.param(TIED, "float16", "random", marks=pytest.mark.slow),
    ],
)
def test_preserves_the_function(tmp_path: Path, config: ModelConfig, dtype: str, init: str) -> None:
    target, report = made(tmp_path, config, dtype, init=init)
    assert report["ok"] and report["max_logit_change"] <= PRESERVED
    assert report["dtype"] == dtype
    assert report["params_before"] == inspect(tmp_path / "dense")["params"]
    assert report["params_after"] == inspect(target)["params"]
    assert load_params(target)[0] == config.replace(moe=LIKE)
    assert (target / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("init", ["random", "sliced"])
@pytest.mark.usefixtures("unmeasured")
def test_tensors(tmp_path: Path, init: str) -> None:
    target, _ = made(tmp_path, init=init)
    given, found = weights(), tensors(target, tmp_path / "back")
    assert found.keys() == table.slots(MINI).keys()
    for name, values in given.items():
        factor = 2 if name.endswith("mlp.down_proj.weight") else 1
        np.testing.assert_array_equal(found[name], factor * values, err_msg=name)
    for name in found.keys() - given.keys():
        zero = ".coefficient." in name or "down_proj" in name
        assert found[name].any() != zero, name
        if not zero and (init == "random" or "gate.weight" in name):
            assert abs(found[name].std() / 0.02 - 1) < 0.35, name
    if init == "sliced":
        # 48 neurons: three experts of 16 take each of them once; the shared expert begins again.
        for part in ("gate", "up"):
            dense = given[f"{MLP}.{part}_proj.weight"]
            for e in range(3):
                expert = found[f"{MOE}.experts.{e}.{part}_proj.weight"]
                np.testing.assert_array_equal(expert, dense[16 * e : 16 * e + 16])
            shared = found[f"{MOE}.shared_expert.{part}_proj.weight"]
            np.testing.assert_array_equal(shared, dense[:24])


@pytest.mark.usefixtures("unmeasured")
def test_a_slice_goes_on_at_the_first_neuron(tmp_path: Path) -> None:
    sizes = {"expert_mlp_dim": 20, "shared_mlp_dim": 48}
    target, report = made(tmp_path, init="sliced", sizes=sizes)
    dense = weights()[f"{MLP}.up_proj.weight"]
    found = tensors(target, tmp_path / "back")
    expert = found[f"{MOE}.experts.2.up_proj.weight"]
    np.testing.assert_array_equal(expert, np.roll(dense, -40, axis=0)[:20])
    shared = found[f"{MOE}.shared_expert.up_proj.weight"]
    np.testing.assert_array_equal(shared, np.roll(dense, -12, axis=0))
    assert report["ok"]


def test_released_start_is_bounded_and_preserves_nothing(tmp_path: Path) -> None:
    target, report = made(tmp_path, init="released")
    assert PRESERVED < report["max_logit_change"] <= report["max_logit_change_bound"]
    assert report["ok"]
    given, found = weights(), tensors(target, tmp_path / "back")
    bound = np.linalg.norm(given["lm_head.weight"] * given["model.norm.weight"], axis=1).max()
    np.testing.assert_allclose(report["max_logit_change_bound"], 2 * 32**0.5 * bound, rtol=1e-6)
    for name, values in given.items():
        np.testing.assert_array_equal(found[name], values)
    for name in found.keys() - given.keys():
        assert found[name].any() != name.endswith("coefficient.bias"), name


def test_the_recorded_outputs_of_pytorch_stay(tmp_path: Path) -> None:
    """Every hidden state, the logits and the loss of Hugging Face's Qwen2-VL."""
    pytest.importorskip("torch")
    from echovlm_jax.bench.torch_model import build
    from tests.golden.make_golden import record
    from tests.parity.cases import CONFIGS, TOKENS, inputs
    from tests.parity.torch_echovlm import save

    config = CONFIGS["dense"]
    model = build(config, seed=5)
    source = save(model, config, tmp_path / "dense")
    golden = record(model, inputs("left", config, seed=4), tokens=TOKENS, new_tokens=0)
    np.savez(tmp_path / "golden.npz", **golden)  # pyright: ignore[reportArgumentType]
    assert upcycle(source, tmp_path / "moe", like=LIKE)["ok"]
    report = parity(tmp_path / "moe", tmp_path / "golden.npz", atol=PRESERVED)
    assert report["ok"], report
    assert report["logits"]["max_abs_err"] <= PRESERVED


def test_a_change_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the doubled projection the function is another, and the command says so."""
    module = "echovlm_jax.convert.upcycle"
    monkeypatch.setattr(f"{module}._doubled", lambda read, name: read)
    source = write(tmp_path / "dense", weights(), DENSE)
    assert main(["upcycle", str(source), str(tmp_path / "moe"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["max_logit_change"] > 1e-3 and report["ok"] is False


@pytest.mark.usefixtures("unmeasured")
def test_a_seed_decides_all_random_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for number, (seed, chunk) in enumerate([(0, 2**24), (0, 700), (1, 2**24)]):
        monkeypatch.setattr("echovlm_jax.storage.writer.CHUNK_BYTES", chunk)
        monkeypatch.setattr("echovlm_jax.convert.upcycle._BLOCK", 64)
        target, _ = made(tmp_path / str(number), seed=seed)
        export(target, tmp_path / str(number) / "back")
        found.append(digests(tmp_path / str(number) / "back"))
    assert found[0] == found[1]
    same = {name for name in found[0] if found[0][name] == found[2][name]}
    random = {n for n in table.slots(MINI) if ".moe." in n and "down_proj" not in n}
    assert same == table.slots(MINI).keys() - random
    drawn = [digest for name, (_, digest, _) in found[0].items() if name in random]
    assert len(set(drawn)) == len(random), "two tensors have the same values"


@pytest.mark.usefixtures("unmeasured")
def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = made(tmp_path / "whole")
    original, left = Journal.add, 30

    def add(self: Journal, name: str, digest: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        original(self, name, digest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "add", add)
        made(tmp_path)
    assert not (tmp_path / "moe").exists()
    with pytest.raises(InputError, match="with other settings"):
        made(tmp_path, seed=1)
    target, report = made(tmp_path)
    assert report["resumed"] == 29 and report["ok"]
    assert made(tmp_path)[1]["resumed"] == 29, "what is there already was made again"
    for folder in (whole, target):
        export(folder, tmp_path / "back" / folder.parent.name)
    back = [digests(folder) for folder in sorted((tmp_path / "back").iterdir())]
    assert back[0] == back[1]


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
def test_twenty_steps_of_alignment_move_every_new_parameter(tmp_path: Path) -> None:
    target, _ = made(tmp_path)
    model, params = load_params(target)
    config = runpy.run_path("configs/alignment.py")["get_config"]()
    small = {"steps": 20, "global_batch_size": 4, "seq_len": 48, "max_patches": 32}
    cheap = {"moe_dispatch": "dense", "remat": "none", "dtype": "float32"}
    config.optimization_level = "O0"
    config.update_from_flattened_dict({**small, **cheap})
    program = make_program(config, jax.devices()[:1], model=model)
    before = {path: np.asarray(x) for path, x in table.flatten(params).items()}
    update = program.compile()
    with jax.set_mesh(program.mesh):
        state = init_state(program, jax.random.key(0), params)
        for step in range(20):
            batch = place(program, random_batch(step, model, 4, 48, 32))
            state, _ = update(state, batch)
    after = flatten_dict(state.trainable["params"], sep="/")
    names = table.slots(model).keys() - table.slots(DENSE).keys()
    assert {table.slots(model)[name].path for name in names} < after.keys()
    for name in names:
        slot = table.slots(model)[name]
        moved = np.asarray(after[slot.path])[slot.index] != before[slot.path][slot.index]
        assert moved.mean() > 0.99, name


# --- Sizes ----------------------------------------------------------------------------------------


def test_default_sizes_are_the_released_ones_in_proportion() -> None:
    released = preset("echovlm_11b").moe
    assert scaled_mixture(preset("qwen2_vl_7b")) == released
    small = scaled_mixture(preset("qwen2_vl_2b"))
    assert (small.expert_mlp_dim, small.shared_mlp_dim) == (640, 2560)
    assert (small.num_experts, small.top_k) == (4, 2)
    assert scaled_mixture(DENSE).expert_mlp_dim == 8


@pytest.mark.usefixtures("unmeasured")
def test_sizes_come_from_a_preset_a_folder_a_file_or_a_training_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_hf(MINI)))
    assert read_mixture("tiny") == preset("tiny").moe
    assert read_mixture(tmp_path) == read_mixture(tmp_path / "config.json") == LIKE
    source = write(tmp_path / "dense", weights(), DENSE)
    words = ["upcycle", str(source), str(tmp_path / "moe"), "--json"]
    words += ["--config", "configs/alignment.py", "--expert-mlp-dim", "16", "--top-k", "1"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    sizes = {"num_experts": 4, "top_k": 1, "expert_mlp_dim": 16, "shared_mlp_dim": 5632}
    assert sizes.items() <= report["moe"].items()


@pytest.mark.usefixtures("unmeasured")
def test_config_json_keeps_what_it_said(tmp_path: Path) -> None:
    """A newer exporter's nested form, with keys that we don't read."""
    source = write(tmp_path / "dense", weights(), DENSE)
    flat = to_hf(DENSE)
    top = ("architectures", "model_type", "vision_config", "image_token_id")
    nested = {key: flat.pop(key) for key in top} | {"text_config": flat, "transformers": "5"}
    nested["text_config"]["initializer_range"] = 0.5
    (source / "config.json").write_text(json.dumps(nested))
    target, _ = made(tmp_path)
    raw = json.loads((target / "config.json").read_text())
    assert from_hf(raw) == MINI
    assert raw["text_config"]["num_experts"] == 3 and raw["transformers"] == "5"
    assert raw["architectures"] == ["Qwen2VLMOEForConditionalGeneration"]
    drawn = tensors(target, tmp_path / "back")[f"{MOE}.experts.0.up_proj.weight"]
    assert abs(drawn.std() / 0.5 - 1) < 0.2


# --- Refusals -------------------------------------------------------------------------------------


def _with_experts(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(to_hf(MINI)))


def _of_another_kind(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(to_hf(DENSE) | {"model_type": "llama"}))


def _without_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def _with_an_infinity(folder: Path) -> None:
    bad = weights()
    bad[f"{MLP}.down_proj.weight"][1, 1] = 3e38
    _without_weights(folder)
    save_file(bad, folder / "model.safetensors")


def _nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("harm", "options", "said"),
    [
        (_with_experts, {}, "3 experts a layer and is an EchoVLM already"),
        (_of_another_kind, {}, "model_type 'llama' is not supported; known are qwen2_vl"),
        (_without_weights, {}, "no weights"),
        (_with_an_infinity, {}, f"{MLP}.down_proj.weight holds a value"),
        (_nothing, {"init": "zero"}, "init 'zero' is unknown"),
        (_nothing, {"seed": -1}, "seed -1 must be"),
        (_nothing, {"sizes": {"top_k": 4}}, "num_experts_per_tok 4 exceeds num_experts 3"),
        (_nothing, {"sizes": {"expert_mlp_dim": 0}}, "moe_intermediate_size"),
        (_nothing, {"init": "sliced", "sizes": {"shared_mlp_dim": 49}}, "49 exceeds the dense"),
        (_nothing, {"dtype": "int8"}, "dtype int8 is not supported"),
    ],
)
def test_refuses(tmp_path: Path, harm: Any, options: dict, said: str) -> None:
    source = write(tmp_path / "dense", weights(), DENSE)
    harm(source)
    with pytest.raises(InputError) as caught:
        made(tmp_path, **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_refuses_what_is_there_and_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "mine").write_text("")
    with pytest.raises(InputError, match="exists"):
        made(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        upcycle(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(InputError, match="has no mixture"):
        read_mixture("qwen2_vl_7b")
    with pytest.raises(InputError, match="neither a preset"):
        read_mixture("echovlm_12b")
