"""The planner: kernels by hand-computed FLOPs, refusals read, and a real plan of the tiny model."""

import importlib
import importlib.util
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from echovlm_jax.config import preset
from echovlm_jax.errors import InputError
from echovlm_jax.flops import Work, model_flops
from echovlm_jax.mesh import make_mesh, topology_devices
from echovlm_jax.model import param_specs
from echovlm_jax.plan import Serving, hlo, plan
from echovlm_jax.plan.hlo import CustomCall
from echovlm_jax.plan.hlo_text import Shape
from echovlm_jax.plan.kernels import kernel_flops
from echovlm_jax.plan.plan import _too_large, _without_padding
from echovlm_jax.plan.programs import nbytes, needed_bytes, serving_mesh, serving_params
from echovlm_jax.plan.report import _padding, report
from echovlm_jax.quantize import recipe, recipe_of, takes
from echovlm_jax.train.config_file import load_config

# `echovlm_jax.plan.plan` is the function too.
epoch_module = importlib.import_module("echovlm_jax.plan.plan")
ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "full_finetune.py"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiles with libtpu: pip install libtpu"
)


def call(name, operands, results=(), flops=0.0, op_name="", count=1):
    def shapes(many):
        return tuple(Shape("bf16", d, 2 * math.prod(d), 2 * math.prod(d), 0) for d in many)

    return CustomCall(
        "tpu_custom_call", name, shapes(operands), shapes(results), flops, op_name, count
    )


def test_attention_kernels_count_by_their_shapes():
    tables = [(1, 4, 4), (1, 4, 4)]
    text = [*tables, (28, 2048, 128), (4, 2048, 128), (4, 2048, 128)]
    square = 28 * 2048 * 2048 * 128
    forward = call("splash_mha_fwd_residuals", text, op_name="jit/text/attn", count=28)
    assert kernel_flops(forward, 784) == 28 * 2 * 2 * square / 2
    # One backward kernel for all gradients returns the queries' in parts; it makes five products.
    parts = [(4, 28, 2048, 128), (4, 2048, 128), (4, 2048, 128)]
    fused = call("splash_mha_dkv_no_residuals", text, parts, op_name="jit/text/attn")
    assert kernel_flops(fused, 784) == 5 * 2 * square / 2
    loop = call(
        "closed_call", text, op_name="jit/text/attn/splash_mha_fwd_residuals/splash", count=56
    )
    assert kernel_flops(loop, 784) == 56 * 2 * 2 * square / 2
    alone = call("splash_mha_dkv_no_residuals", text, parts[1:], op_name="jit/text/attn")
    assert kernel_flops(alone, 784) == 4 * 2 * square / 2


def test_the_vision_towers_kernel_counts_the_blocks_that_frames_touch():
    vision = [(1, 12, 12), (16, 80, 6144), (16, 80, 6144), (16, 80, 6144)]
    forward = call("splash_mha_fwd_residuals", vision, op_name="jit/vision/attn")
    assert kernel_flops(forward, 784) == 2 * 2 * 16 * 80 * 6144 * (784 + 1024)
    assert kernel_flops(forward, 6144) == 2 * 2 * 16 * 80 * 6144 * 6144  # one frame: all of it


def test_other_kernels_count_what_their_author_declared():
    assert kernel_flops(call("gmm", [(4096, 3584)], flops=7.0, count=3), 784) == 21
    assert kernel_flops(call("unknown", [(4096, 3584)]), 784) == 0


@pytest.mark.parametrize(
    ("message", "peak"),
    [
        ("RESOURCE_EXHAUSTED: … Used 17.5G of 15.75G hbm. Exceeded …", 17.5 * 2**30),
        (
            "RESOURCE_EXHAUSTED: … temporaries (512.25M) exceeds available HBM (15.75G).",
            512.25 * 2**20,
        ),
        ("RESOURCE_EXHAUSTED: something else", None),
    ],
)
def test_a_refusal_tells_what_was_asked_for(message, peak):
    found = _too_large(message, 1.0, {})
    assert found["hbm_per_chip"]["peak"] == peak and found["fits"] is False


def test_a_refusals_allocations_are_named():
    message = """Used 20G of 15G hbm. Largest program allocations in hbm:

  1. Size: 1.50G
     Operator: op_name="jit(step)/mlp/dot_general"
     Shape: bf16[28,4096]{1,0:T(8,128)}
     ==========================
"""
    [buffer] = _too_large(message, 1.0, {})["largest_buffers"]
    assert buffer["bytes"] == 1.5 * 2**30
    assert buffer["shape"] == "bf16[28,4096]" and buffer["from"] == "jit(step)/mlp/dot_general"


def test_bad_requests_are_refused():
    config = load_config(CONFIG)
    with pytest.raises(InputError, match="step 'serve' is unknown; choose one of train"):
        plan(config, "v5e:4x4", step="serve")
    with pytest.raises(InputError, match="chip 'v9' is unknown"):
        plan(config, "v9:4x4")


@needs_libtpu
def test_what_goes_between_slices_is_seen():
    """Of half an array each, two slices fetch the other half, by way of their hosts."""
    devices = topology_devices("v5e:2x2", slices=2)
    mesh = make_mesh({"fsdp": 4}, devices, dcn={"data": 2})
    split, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("data", None))
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    step = jax.jit(lambda x: x * 2, in_shardings=split, out_shardings=whole)
    module = hlo.read(step.lower(x).compile().as_text() or "", granules=[0] * 4 + [1] * 4)
    assert module.network_bytes == 4 * 1024 * 1024 / 2


@needs_libtpu
@pytest.mark.parametrize(
    "file",
    [
        pytest.param(f, marks=() if f == CONFIG else pytest.mark.slow, id=f.stem)
        for f in sorted((ROOT / "configs").glob("*.py"))
        if not f.stem.startswith("phantom")  # for two cores: nothing of them is split
    ],
)
def test_every_configuration_compiles_for_a_slice(file):
    """With the tiny model: every key of the contract, and sizes that can be computed by hand."""
    small = {"model": "tiny", "seq_len": 128, "max_patches": 256, "max_image_patches": 64}
    config = load_config(file, {**small, "data": "elsewhere", "grad_accum": 1})
    result = plan(config, "v5e:2x2", rows_per_chip=1)
    check(result)
    saving, bound = result["goodput"], result["roofline_seconds"]
    configured = saving["configured"]["checkpoint_every"]
    assert saving["hosts"] == 1 and configured == config.checkpoint_every
    assert saving["step_seconds"] >= max(bound["compute"], bound["hbm"], bound["ici"])
    state = sum(sum(groups.values()) for groups in result["parameter_bytes_per_chip"].values())
    assert saving["write_seconds"] == pytest.approx(4 * state / 1e9)
    assert f"checkpoint_every={saving['checkpoint_every']}" in result["report"]
    assert result["useful_mfu_upper_bound"] is None  # the data are where the run will be
    assert "padding is unknown: elsewhere: is no dataset" in result["report"]
    assert {"all-gather"} <= set(result["collective_bytes_per_chip"])
    tiny = preset("tiny").text
    held = result["parameter_bytes_per_chip"]
    tables = 2 * tiny.vocab_size * tiny.hidden_size // 4  # embedding and head, a quarter each
    if file.stem == "full_finetune":
        assert result["trainable_params"] == result["params"]
        assert held["parameters"]["embedding"] == 4 * tables
        assert held["optimizer"]["embedding"] == 2 * 4 * tables  # two moments
    else:
        assert result["trainable_params"] < result["params"] / 2
        # Frozen: bfloat16, or a byte a value and scales; no moments.
        few = bool(config.get("quantize"))
        assert few == (tables < held["parameters"]["embedding"] < 2 * tables)
        assert few or held["parameters"]["embedding"] == 2 * tables
        assert "embedding" not in held["optimizer"]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_generation_compiles_for_a_slice(step, kind):
    serving = Serving(rows=2, context=768, patches=256, quantize=kind)
    result = plan(load_config(CONFIG, {"model": "tiny"}), "v5e:2x2", step=step, serving=serving)
    check(result)
    assert result["mesh"] == {"data": 2, "tensor": 2}  # two key/value heads
    assert result["trainable_params"] == 0 and result["rows"] == 2
    assert ("bytes_per_token" in result) == (step == "decode")
    if step == "decode":
        assert 0 < result["needed_bytes_per_token"] < result["bytes_per_token"]
        assert result["largest_reads"][0]["bytes"] > 0


def test_what_a_token_needs_by_hand():
    """The released model's weights, in bytes: int8 and bfloat16 by name, one row and many."""
    model = preset("echovlm_11b")
    specs = param_specs(model)
    mesh = make_mesh({}, jax.devices()[:1])
    text, moe = model.text, model.moe
    decoder = sum(
        math.prod(spec.shape)
        for path, spec in specs.items()
        if path.startswith("text/") and "/experts/" not in path and "/embed/" not in path
    )
    experts = text.num_layers * moe.num_experts * 3 * moe.expert_mlp_dim * text.hidden_size
    for rows, share in ((1, 0.5), (2, 1.0), (8, 1.0)):
        serving = Serving(rows=rows, context=2048)
        tree = serving_params(specs, mesh, jnp.dtype("bfloat16"), None)
        cache = rows * 2048 * (2 * 2 * text.num_layers * text.num_kv_heads * text.head_dim + 4)
        expected = 2 * (decoder + share * experts + rows * text.hidden_size) + cache + 4 * rows
        assert needed_bytes(model, tree, serving, jnp.dtype("bfloat16")) == expected


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_token_needs_quantized_weights_at_their_width(kind):
    model = preset("echovlm_11b")
    specs = param_specs(model)
    mesh = make_mesh({}, jax.devices()[:1])
    tree = serving_params(specs, mesh, jnp.dtype("bfloat16"), kind)
    held = sum(nbytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))
    values = sum(
        math.prod(spec.shape)
        * (recipe_of(spec, recipe(kind)).bits if takes(path, spec) else 16)
        / 8
        for path, spec in specs.items()
    )
    assert values < held < values * 1.07  # scales: 4 bytes for 128 values of half a byte each
    small = Serving(rows=1, context=16, quantize=kind)
    needed = needed_bytes(model, tree, small, jnp.dtype("bfloat16"))
    assert 0.65 < needed / held < 0.95  # no vision tower, no table, half of the experts


def test_a_mesh_that_is_left_open_splits_heads():
    model, devices = preset("echovlm_11b"), jax.devices()
    config = load_config(CONFIG)
    found = dict(serving_mesh(config, devices, model).shape)
    assert {axis: n for axis, n in found.items() if n > 1} == {"data": 2, "tensor": 4}
    asked = load_config(CONFIG, {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2})
    found = dict(serving_mesh(asked, devices, model).shape)
    assert {axis: n for axis, n in found.items() if n > 1} == {"fsdp": 4, "tensor": 2}


@needs_libtpu
def test_a_prompt_needs_room():
    config = load_config(CONFIG, {"model": "tiny"})
    with pytest.raises(
        InputError, match="context 1536 leaves 1024 tokens for a prompt, beside 512"
    ):
        plan(config, "v5e:1x1", step="prefill", serving=Serving(context=1536))


def test_useful_work_is_what_the_data_fill_rows_with(monkeypatch):
    found = {"tokens": 0.9, "patches": 0.5}
    monkeypatch.setattr(epoch_module, "expected_filling", lambda settings: found)
    counted = model_flops(preset("echovlm_11b"), Work(16, 2048, 6144, 784))
    config = load_config(CONFIG)
    told = _without_padding(0.73, counted, config, "train")
    vision = sum(t.forward + t.backward for t in counted.terms if t.name.startswith("vision"))
    share = ((counted.total - vision) * 0.9 + vision * 0.5) / counted.total
    assert told["useful_mfu_upper_bound"] == pytest.approx(0.73 * share) and share < 0.9
    assert told["packing_efficiency"] == found
    assert _without_padding(0.73, counted, config, "prefill") == {"useful_mfu_upper_bound": 0.73}
    result = {"step": "train", **told}
    assert list(_padding(result)) == [
        f"  useful MFU at most {0.73 * share:.1%}: the data fill rows to 90.0% of tokens and 50.0%"
        " of patches"
    ]


def check(result):
    assert result["chips"] == 4 and result["fits"] and result["ok"]
    memory = result["hbm_per_chip"]
    assert memory["arguments"] * 0.9 < memory["peak"] < 2**30
    assert result["roofline_seconds"]["compute"] > 0 and 0 < result["mfu_upper_bound"] <= 1
    assert result["mfu_without_overlap"] <= result["mfu_upper_bound"]
    scheduled = result["mfu_scheduled"]
    slowest = scheduled["products_links_and_memory"]
    assert 0 < slowest <= min(scheduled["products_and_links"], result["mfu_upper_bound"]) + 1e-9
    assert "DOES NOT" not in result["report"] and "MFU at most" in result["report"]


def test_a_report_of_what_does_not_fit_says_what_to_change():
    text = report(
        {
            "step": "train", "topology": "v5e:2x2", "slices": 1, "chips": 4,
            "mesh": {"fsdp": 4}, "rows": 4,
            "rows_per_device": 2,
            "params": 10, "trainable_params": 10, "hbm_capacity": 16 * 2**30, "fits": False,
            "parameter_bytes_per_chip": {"parameters": {"mlp": 2**30}},
            "hbm_per_chip": {"peak": 20 * 2**30},
            "largest_buffers": [{"bytes": 2**30, "shape": "f32[7]", "from": "a/b", "count": 1}],
        }
    )  # fmt: skip
    assert "DOES NOT FIT" in text and "f32[7]" in text and "grad_accum" in text
