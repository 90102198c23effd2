"""A run over a quantized base: it resumes, and its folder is a model with all updates."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from echovlm_jax.convert.folder import open_model
from echovlm_jax.convert.load import load_params
from echovlm_jax.convert.peft import export_adapter, open_adapter
from echovlm_jax.convert.to_torch import export
from echovlm_jax.load import load_model
from echovlm_jax.model import EchoVLM, param_specs
from echovlm_jax.ops.product.weight import Quantized
from echovlm_jax.quantize import abstract, quantize, recipe, takes
from echovlm_jax.storage.verify import verify
from echovlm_jax.train.loop import train
from echovlm_jax.train.lora import scaled
from echovlm_jax.train.stages import merge
from tests.distributed.train_steps import random_batch
from tests.train import test_loop
from tests.train.test_loop import MODEL, assert_same_run, config, lines, stored
from tests.train.test_qlora import RULES

compiled_once, model_folder = test_loop.compiled_once, test_loop.model_folder
one_device = test_loop.one_device
STEPS, SPECS = 4, param_specs(MODEL)


def of_kind(model_folder, kind, **changes):
    own = {"stage_rules": RULES, "lora.dropout": 0.0, "quantize": kind, "warmup_fraction": 0.0}
    return config(model_folder, steps=STEPS, **own, **changes)


@pytest.fixture(scope="session", params=[pytest.param("int8", marks=pytest.mark.slow), "int4"])
def run(request, model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qlora") / request.param
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: devices)
        train(of_kind(model_folder, request.param), folder)
    return folder


def base(run) -> dict[str, Quantized]:
    """The quantized weights of a checkpoint, as Orbax alone reads them."""
    how = recipe(run.name)
    frozen = stored(run, STEPS)["frozen"]
    found = {}
    for path, spec in SPECS.items():
        if takes(path, spec):
            part = frozen
            for name in path.split("/"):
                part = part[name]
            assert part.keys() == {"values", "scale"}
            found[path] = dataclasses.replace(abstract(spec, how), **part)
    assert len(found) == 15
    return found


def test_the_base_is_stored_as_it_was_rounded(run, model_folder):
    _, weights = load_params(model_folder)
    for path, kept in base(run).items():
        made = quantize(flatten_dict(weights, sep="/")[path], SPECS[path], recipe(run.name))
        for part in ("values", "scale"):
            ours, wanted = (np.asarray(getattr(one, part)) for one in (kept, made))
            assert ours.dtype == wanted.dtype and (ours == wanted).all(), path
    losses = [line["loss"] for line in lines(run) if "loss" in line]
    assert len(losses) == STEPS and min(losses[1:]) < losses[0]
    assert [line["step"] for line in lines(run) if "eval_loss" in line] == [4]
    assert verify(run)["ok"]


def test_it_resumes_exactly(run, model_folder, tmp_path):
    again = tmp_path / run.name
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "4")
    train(of_kind(model_folder, run.name), again)
    assert_same_run(again, run, STEPS)


def test_it_is_a_model_of_floats(run, tmp_path):
    """Its base times its scales, its updates added: the logits that it trained with."""
    tree = stored(run, STEPS)
    frozen = flatten_dict(tree["frozen"], sep="/")
    plain = {path: x for path, x in frozen.items() if path in SPECS}
    params = merge(tree["trainable"]["params"], unflatten_dict({**plain, **base(run)}, sep="/"))
    variables = {"params": params, "lora": scaled(tree["trainable"]["lora"], 16 / 8)}
    batch = random_batch(3, MODEL, 2, 48, 32)
    batch["patches"] = batch["patches"].astype(np.float32)
    trained = EchoVLM(MODEL, np.float32).apply(variables, batch, method="forward")
    model = load_model(run)
    assert np.abs(model.forward(batch) - trained).max() < 1e-5 * np.abs(trained).max()
    export(run, tmp_path / "merged", merge_lora=True)
    again = load_model(tmp_path / "merged")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_a_block_of_it_is_that_block(run):
    """However a mesh cuts a weight, within its groups too."""
    model = open_model(run)
    for path in ("text/layers/mlp/down/kernel", "text/layers/attn/o/kernel", "text/lm_head/kernel"):
        whole = model.read(path, tuple(slice(0, size) for size in SPECS[path].shape))
        cut = tuple(slice(size // 4, size - size // 3) for size in whole.shape)
        np.testing.assert_allclose(model.read(path, cut), whole[cut], rtol=1e-6, atol=1e-7)


def test_its_adapter_has_every_experts_update(run, tmp_path):
    export_adapter(run, tmp_path / "adapter")
    found = open_adapter(tmp_path / "adapter", MODEL)
    lora = stored(run, STEPS)["trainable"]["lora"]["text"]["layers"]["moe"]["experts"]["up"]
    for layer in range(MODEL.text.num_layers):
        for expert in range(4):
            name = f"model.layers.{layer}.moe.experts.{expert}.up_proj.weight"
            update = found.updates[name]
            low = update.a.read(0, lora["a"][layer, expert].size)
            np.testing.assert_array_equal(low, lora["a"][layer, expert].reshape(-1))
            assert update.scale == 2
    assert "model.layers.0.moe.gate.weight" in found.full
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "experts" in settings["target_modules"]
