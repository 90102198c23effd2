"""The one description of the parameters: what a product sums over, makes and stacks."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echovlm_jax.config import PRESETS, preset
from echovlm_jax.model import abstract_params, init_params, logical_axes, param_specs
from echovlm_jax.model.layers import Linear
from echovlm_jax.model.params import _init, describe
from echovlm_jax.train.lora import lora_specs, takes_update


@pytest.mark.parametrize("name", PRESETS)
def test_every_dimension_is_stacked_made_or_summed_over(name: str) -> None:
    config = preset(name)
    specs = param_specs(config)
    assert specs
    for path, spec in specs.items():
        stacked, outputs, inputs = spec.cut(spec.shape)
        assert (*stacked, *outputs, *inputs) == spec.shape, path
        assert len(spec.axes) == len(spec.shape), path
        assert bool(inputs) == path.endswith(("kernel", "embedding")), path
        layers = path.startswith(("text/layers/", "vision/blocks/"))
        assert len(stacked) == layers + ("/experts/" in path), path
        assert spec.multiply_adds == (math.prod(spec.shape) if inputs else 0)
    text = config.text
    q = specs["text/layers/attn/q/kernel"]
    wanted = (text.num_layers,), (text.num_heads, text.head_dim), (text.hidden_size,)
    assert q.cut(q.shape) == wanted
    o = specs["text/layers/attn/o/kernel"]
    wanted = (text.num_layers,), (text.hidden_size,), (text.num_heads, text.head_dim)
    assert o.cut(o.shape) == wanted


def test_shapes_axes_and_values_are_views_of_it() -> None:
    config = preset("tiny")
    specs = param_specs(config)
    leaves = {_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(abstract_params(config))}
    assert {path: (x.shape, x.dtype) for path, x in leaves.items()} == {
        path: (spec.shape, spec.dtype) for path, spec in specs.items()
    }
    axes = jax.tree_util.tree_leaves_with_path(
        logical_axes(config), is_leaf=lambda x: isinstance(x, tuple)
    )
    assert {_name(p): names for p, names in axes} == {p: spec.axes for p, spec in specs.items()}
    made = init_params(config, jax.random.key(0))
    for key, values in jax.tree_util.tree_leaves_with_path(made):
        spec = specs[_name(key)]
        assert values.shape == spec.shape
        if spec.inputs and values.size > 4000:
            inputs = math.prod(spec.cut(spec.shape)[2])
            np.testing.assert_allclose(np.std(values) * inputs**0.5, 1, rtol=0.05)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@pytest.mark.parametrize(
    ("spec", "shape", "cut"),
    [
        ("BTD,NHD->BTNH", (2, 3, 5), ((), (2, 3), (5,))),
        ("BTNH,DNH->BTD", (7, 2, 3), ((), (7,), (2, 3))),
        ("BTD,FD->BTF", (4, 5), ((), (4,), (5,))),
        ("ETD,EFD->ETF", (6, 4, 5), ((6,), (4,), (5,))),
    ],
)
def test_a_product_describes_itself(spec: str, shape: tuple, cut: tuple) -> None:
    """And so does one that nobody has thought of yet."""
    sizes = dict(zip(spec.split(",")[1].split("-")[0], shape, strict=True)) | {"B": 2, "T": 3}
    x = jnp.ones([sizes.get(letter, 2) for letter in spec.split(",")[0]])
    module = Linear(spec, shape, tuple(f"axis{n}" for n in range(len(shape))), bias=not cut[0])
    found = describe(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    assert found["kernel"].cut(shape) == cut
    if not cut[0]:
        assert found["bias"].shape == cut[1] and found["bias"].inputs == 0


def test_an_order_that_has_no_description_is_refused() -> None:
    with pytest.raises(ValueError, match="order the weight's axes"):
        Linear("BTD,DF->BTF", (5, 4), ("a", "b")).init(jax.random.key(0), jnp.ones((1, 2, 5)))


@pytest.mark.parametrize("name", ["tiny", "echovlm_11b"])
def test_updates_take_a_weights_inputs_and_make_its_outputs(name: str) -> None:
    specs = param_specs(preset(name))
    how = {path: "lora" if takes_update(path) else "frozen" for path in specs}
    updates = lora_specs(specs, how, 8)
    assert len(updates) == 2 * sum(one == "lora" for one in how.values())
    for path in (path for path, one in how.items() if one == "lora"):
        stacked, outputs, inputs = specs[path].cut(specs[path].shape)
        module = path.removesuffix("/kernel")
        assert updates[f"{module}/a"].shape == (*stacked, 8, *inputs)
        assert updates[f"{module}/b"].shape == (*stacked, *outputs, 8)


@pytest.mark.parametrize("name", ["nano", "nano_dense", "qwen2_vl_2b"])
def test_every_linear_layer_reads_its_inputs_and_returns_its_outputs(name: str) -> None:
    """By the arrays that really go in and come out, whatever the einsum's letters are."""
    config, seen = preset(name), {}

    def record(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if isinstance(context.module, Linear) and context.method_name == "__call__":
            path = "/".join((*context.module.path, "kernel"))
            seen[path] = args[0].shape[2:], y.shape[2:]
        return y

    with nn.intercept_methods(record):
        jax.eval_shape(lambda key: _init(config, key), jax.random.key(0))
    specs = {path: spec for path, spec in param_specs(config).items() if spec.inputs}
    others = {path for path in specs if "experts" in path or path.endswith("embedding")}
    assert seen.keys() == specs.keys() - others
    for path, (taken, made) in seen.items():
        _, outputs, inputs = specs[path].cut(specs[path].shape)
        assert (inputs, outputs) == (taken, made), path


def test_stacked_weights_have_a_bias_and_an_update_each() -> None:
    rng = np.random.default_rng(0)
    module = Linear("BTED,EFD->BTEF", (3, 4, 5), ("expert", "mlp", "embed"), bias=True)
    x, kernel, bias, a, b = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 2, 3, 5), (3, 4, 5), (3, 4), (3, 2, 5), (3, 4, 2))
    )
    found = describe(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    assert found["bias"].cut(found["bias"].shape) == ((3,), (4,), ())
    made = module.apply({"params": {"kernel": kernel, "bias": bias}, "lora": {"a": a, "b": b}}, x)
    wanted = np.einsum("BTED,EFD->BTEF", x, kernel + np.matmul(b, a)) + bias
    np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-5)
