"""Training over a quantized base: it computes what the model of the dequantized weights does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from echovlm_jax.config import preset
from echovlm_jax.errors import InputError
from echovlm_jax.model import param_specs
from echovlm_jax.ops.product.weight import Quantized, as_operand
from echovlm_jax.quantize import KINDS
from echovlm_jax.train.config_file import load_config, own_config
from echovlm_jax.train.program import Program, init_state, make_program
from echovlm_jax.train.stages import count, training_table
from tests.distributed.train_steps import place, random_batch
from tests.train.test_step import LENGTH, params, program

RULES = load_config(own_config("colab_qlora")).stage_rules
MODEL = preset("tiny").replace(
    text={"num_layers": 2},
    vision={"depth": 1, "patch_size": 4},
    moe={"router_aux_loss_coef": 0.5},
)


def qlora(kind: str | None, devices: int = 1, **changes) -> Program:
    """Without images: the vision tower is not quantized."""
    own = {"stage_rules": RULES, "lora.dropout": 0.0, "quantize": kind, "remat": "none"}
    return program(devices, MODEL, **{"max_patches": 0, **own, **changes})


def started(made: Program, weights: dict):
    """The state of these weights, with updates that aren't zero."""
    rng = np.random.default_rng(2)
    state = init_state(made, jax.random.key(0), jax.tree.map(jnp.array, weights))
    lora = jax.tree.map(
        lambda x: jax.device_put((0.1 * rng.normal(size=x.shape)).astype(x.dtype), x.sharding),
        state.trainable["lora"],
    )
    return state._replace(trainable={**state.trainable, "lora": lora})


def stepped(made: Program, weights: dict) -> tuple[dict, dict]:
    """(metrics, gradients as Adam's first moments have them) of one step."""
    with jax.set_mesh(made.mesh):
        state = started(made, weights)
        frozen = bits(state.frozen)
        batch = place(made, random_batch(0, MODEL, 8, LENGTH, 32))
        after, metrics = made.step(state, batch)
    assert bits(after.frozen) == frozen
    moments = flatten_dict(optax.tree.get(after.opt_state, "mu"), sep="/")
    return jax.device_get(metrics), jax.device_get(moments)


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@functools.cache
def dequantized(kind: str) -> dict:
    """`params` after rounding, as floats."""
    frozen = flatten_dict(started(qlora(kind), params()).frozen, sep="/")
    flat = flatten_dict(params(), sep="/")
    assert sum(isinstance(leaf, Quantized) for leaf in frozen.values()) == 15
    wide = {path: as_operand(frozen.get(path, x), jnp.float32) for path, x in flat.items()}
    return unflatten_dict({path: np.asarray(x) for path, x in wide.items()}, sep="/")


@functools.cache
def of_floats(kind: str) -> tuple[dict, dict]:
    return stepped(qlora(None, moe_dispatch="dense"), dequantized(kind))


# What is computed at all, how often, on how many devices.
FORMS = {
    "ragged": {"moe_dispatch": "ragged"},
    "dense, remat": {"moe_dispatch": "dense", "remat": "full"},
    "einsum, parts": {"moe_dispatch": "einsum", "grad_accum": 2},
}
MESHES = {
    "one": {"devices": 1},
    "all": {"devices": 8, "mesh.data": 1, "mesh.fsdp": 2, "mesh.expert": 2, "mesh.tensor": 2},
    "fsdp": {"devices": 8, "mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2},
}
FAST = {("int4", "dense, remat", "one")}
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in [(k, f, m) for k in ("int8", "int4") for f in FORMS for m in MESHES]
]


@pytest.mark.parametrize(("kind", "form", "mesh"), CASES)
def test_a_step_is_that_of_the_dequantized_weights(kind, form, mesh):
    metrics, moments = stepped(qlora(kind, **MESHES[mesh], **FORMS[form]), params())
    wanted = of_floats(kind)
    for name in ("loss", "ce_loss", "aux_loss", "grad_norm", "labels", "skipped"):
        np.testing.assert_allclose(metrics[name], wanted[0][name], rtol=1e-5, err_msg=name)
    assert moments.keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        error = np.abs(moments[name] - value).max()
        assert value.any() or "vision" in name
        assert error <= 1e-5 * np.abs(value).max(), (name, error)


def test_what_trains_in_full_is_not_quantized():
    rules = (("text/layers/mlp/.*", "full"), *RULES)
    made = qlora("int8", stage_rules=rules)
    flat = flatten_dict(made.state.trainable["params"], sep="/")
    assert flat["text/layers/mlp/up/kernel"].dtype == jnp.float32
    assert isinstance(made.state.frozen["text"]["layers"]["attn"]["q"]["kernel"], Quantized)
    whole = sum(spec.multiply_adds or np.prod(spec.shape) for spec in param_specs(MODEL).values())
    assert count(made.state.frozen) + count(made.state.trainable["params"]) == whole
    assert "int8" in training_table(made.state, made.how)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantize": "w8a8"}, "quantize must be one of int8, int4"),
        ({"stage": "full", "stage_rules": None}, "quantize int8 is of weights that are frozen"),
    ],
)
def test_what_it_refuses(changes, said):
    assert "w8a8" in KINDS
    config = load_config(own_config("colab_qlora"), {"model": "tiny", **changes})
    with pytest.raises(InputError, match=said):
        make_program(config, jax.devices()[:1])
