"""Which weights are quantized, into what, and how near the model stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from echovlm_jax.config import preset
from echovlm_jax.errors import InputError
from echovlm_jax.model import EchoVLM, init_params, param_specs
from echovlm_jax.ops.product.weight import Quantized, as_operand
from echovlm_jax.quantize import KINDS, abstract, quantize, recipe, takes

TINY = preset("tiny")


@pytest.fixture(scope="module")
def params():
    return flatten_dict(init_params(TINY, jax.random.key(0)), sep="/")


def quantized(params, kind):
    specs = param_specs(TINY)
    return {
        path: quantize(leaf, specs[path], recipe(kind)) if takes(path, specs[path]) else leaf
        for path, leaf in params.items()
    }


def test_what_is_taken_and_what_stays_wide():
    specs = param_specs(preset("echovlm_11b"))
    taken = {path for path, spec in specs.items() if takes(path, spec)}
    wide = {path for path in specs if path.endswith(("kernel", "embedding"))} - taken
    assert {path.split("/")[-2] for path in wide if not path.startswith("vision")} == {
        *("router", "coefficient", "shared_gate"),
    }
    sizes = {path: int(np.prod(spec.shape)) for path, spec in specs.items()}
    assert sum(sizes[path] for path in taken) > 0.94 * sum(sizes.values())


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_nearest_and_the_form_is_the_described_one(params, kind):
    specs = param_specs(TINY)
    for path, weight in quantized(params, kind).items():
        if not isinstance(weight, Quantized):
            continue
        form = abstract(specs[path], recipe(kind))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), weight) == jax.tree.map(
            lambda x: (x.shape, x.dtype), form
        )
        assert weight.shape == params[path].shape
        # Half a step at most, of the largest scale there is; a whole one of 8 steps of 4 bits.
        error = jnp.max(jnp.abs(as_operand(weight, jnp.float32) - params[path]))
        steps = 1.001 if weight.values.dtype == jnp.int4 else 0.5001
        assert 0 < error <= steps * jnp.max(jnp.abs(weight.scale))


def test_int4_has_sixteen_values_and_keeps_what_costs_most_in_eight_bits(params):
    found = {p: w for p, w in quantized(params, "int4").items() if isinstance(w, Quantized)}
    four = {path for path, weight in found.items() if weight.values.dtype == jnp.int4}
    names = ("gate", "up", "down")
    assert four == {f"text/layers/{mlp}/{n}/kernel" for mlp in ("mlp", "moe/shared") for n in names}
    for path in four:  # the largest of each group is −8 steps
        assert (found[path].values.astype(jnp.int32).min(-1) == -8).all(), path


@pytest.mark.parametrize("path", ["moe/experts/down", "mlp/down"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_place_of_the_stacked_axes_by_itself_is_that_place_of_the_whole(params, kind, path):
    path = f"text/layers/{path}/kernel"
    spec, how = param_specs(TINY)[path], recipe(kind)
    whole, one = quantize(params[path], spec, how), quantize(params[path][1], spec, how)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(a[1], b)


def test_a_row_of_zeros_stays_one():
    spec = param_specs(TINY)["text/lm_head/kernel"]
    for kind in ("int8", "int4"):
        found = quantize(jnp.zeros(spec.shape), spec, recipe(kind))
        assert not as_operand(found, jnp.float32).any()
        assert np.isfinite(found.scale).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_model_computes_with_the_weights_that_are_meant(params, kind):
    rng = np.random.default_rng(0)
    batch = {
        "tokens": jnp.asarray(rng.integers(0, TINY.text.vocab_size, (2, 9)), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 3, 9)),
        "segment_ids": jnp.ones((2, 9), jnp.int32),
    }
    small = quantized(params, kind)
    wide = {
        path: as_operand(leaf, jnp.float32) if isinstance(leaf, Quantized) else leaf
        for path, leaf in small.items()
    }
    found, wanted = (
        EchoVLM(TINY).apply({"params": unflatten_dict(tree, sep="/")}, batch, method="forward")
        for tree in (small, wide)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="int8, int4"):
        recipe("int3")
