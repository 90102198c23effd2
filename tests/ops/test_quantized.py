"""Products of quantized weights against jnp.einsum with the weight that they stand for."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echovlm_jax.ops.layout import Layout
from echovlm_jax.ops.product import weight as weights
from echovlm_jax.ops.product.einsum import _added_up, einsum
from echovlm_jax.ops.product.weight import Quantized, as_operand, lookup, one_of
from echovlm_jax.train.loss import token_losses

FORMS = [
    # product, x, weight, its axes of outputs and of inputs
    ("BTD,FD->BTF", (2, 3, 8), (5, 8), 1, 1),
    ("BTD,NHD->BTNH", (2, 3, 8), (5, 6, 8), 2, 1),
    ("BTNH,DNH->BTD", (2, 3, 4, 8), (6, 4, 8), 1, 2),
    ("ECD,EFD->ECF", (3, 2, 8), (3, 5, 8), 1, 1),
    # All experts on every token: E is made by the first product, and summed over by the second.
    ("BTD,EFD->BTEF", (2, 3, 8), (3, 5, 8), 1, 1),
    ("BTEF,EDF->BTD", (2, 3, 3, 8), (3, 5, 8), 1, 1),
]


def random_weight(shape, outputs, inputs, group, seed=0, **more):
    rng = np.random.default_rng(seed)
    lead, last = shape[: len(shape) - inputs], shape[-1]
    stacked = lead[: len(lead) - outputs]
    values, scale = shape, lead
    if group:
        values = (*shape[:-1], last // group, group)
        scale = (*stacked, *shape[len(lead) : -1], last // group, *lead[len(stacked) :])
    return Quantized(
        jnp.asarray(rng.integers(-7, 8, values), jnp.int4 if group else jnp.int8),
        jnp.asarray(rng.uniform(0.1, 1, scale), jnp.float32),
        outputs=outputs,
        inputs=inputs,
        grouped=bool(group),
        **more,
    )


def meant(weight):
    """The float weight, place by place."""
    out = np.zeros(weight.shape, np.float32)
    values, scale = np.asarray(weight.values, np.float32), np.asarray(weight.scale)
    flat = values.reshape(weight.shape)
    lead = weight.shape[: len(weight.shape) - weight.inputs]
    stacked = len(lead) - weight.outputs
    for place in np.ndindex(*weight.shape):
        key = place[: len(lead)]
        if weight.grouped:
            size = values.shape[-1]
            rest = place[len(lead) : -1]
            key = (*place[:stacked], *rest, place[-1] // size, *place[stacked : len(lead)])
        out[place] = flat[place] * scale[key]
    return out


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize(("spec", "x", "shape", "outputs", "inputs"), FORMS)
def test_values_and_gradients(spec, x, shape, outputs, inputs, group):
    weight = random_weight(shape, outputs, inputs, group)
    dense = meant(weight)
    np.testing.assert_allclose(as_operand(weight, jnp.float32), dense, rtol=1e-6)
    x = jnp.asarray(np.random.default_rng(1).standard_normal(x), jnp.float32)
    wanted, pull = jax.vjp(lambda x: jnp.einsum(spec, x, dense), x)
    found, ours = jax.vjp(lambda x: einsum(spec, x, weight), x)
    d = jnp.asarray(np.random.default_rng(2).standard_normal(wanted.shape), jnp.float32)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    np.testing.assert_allclose(ours(d)[0], pull(d)[0], atol=1e-4)


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize(("spec", "x", "shape", "outputs", "inputs"), FORMS[:-1])
def test_the_sum_of_products_that_cards_compute(spec, x, shape, outputs, inputs, group):
    weight = random_weight(shape, outputs, inputs, group)
    x = jnp.asarray(np.random.default_rng(1).standard_normal(x), jnp.float32)
    found = _added_up(spec, x, weight, jnp.float32)
    np.testing.assert_allclose(found, jnp.einsum(spec, x, meant(weight)), atol=1e-4)


@pytest.mark.parametrize("group", [None, 4])
def test_in_a_loop_over_stacked_weights(group):
    weight = random_weight((3, 8, 8), 1, 1, group)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 2, 8)), jnp.float32)

    def run(x, weight):
        return jax.lax.scan(lambda x, w: (jnp.tanh(einsum("BTD,FD->BTF", x, w)), None), x, weight)[
            0
        ]

    wanted, pull = jax.vjp(lambda x: run(x, jnp.asarray(meant(weight))), x)
    found, ours = jax.vjp(lambda x: run(x, weight), x)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(ours(x)[0], pull(x)[0], atol=1e-4)


@pytest.mark.parametrize("group", [None, 4])
def test_one_of_the_stacked_weights(group):
    weight = random_weight((3, 5, 8), 1, 1, group)
    for number in range(3):
        found = as_operand(one_of(weight, jnp.int32(number)), jnp.float32)
        np.testing.assert_allclose(found, meant(weight)[number], rtol=1e-6)


def test_a_gradient_of_the_weight_is_none_at_all():
    weight = random_weight((5, 8), 1, 1, None)
    x = jnp.ones((1, 2, 8))
    found = jax.grad(lambda w: einsum("BTD,FD->BTF", x, w).sum(), allow_int=True)(weight)
    assert found.values.dtype == jax.dtypes.float0
    assert not np.asarray(found.scale).any()


@pytest.mark.parametrize("group", [None, 4])
def test_rows_of_a_table(group):
    table = random_weight((7, 8), 1, 1, group)
    for tokens in ([[0, 6, 3], [3, 3, 1]], [[5], [0], [6]]):
        for way in (lookup, weights._one_by_one):  # the second is a TPU's
            found = way(table, jnp.asarray(tokens), jnp.float32)
            np.testing.assert_allclose(found, meant(table)[np.asarray(tokens)], rtol=1e-6)


@pytest.mark.parametrize("group", [None, 4])
def test_the_loss_of_a_quantized_head_in_chunks(group):
    head = random_weight((12, 8), 1, 1, group)
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.standard_normal((2, 3, 8)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 12, (2, 3)), jnp.int32)

    def loss(hidden, head):
        return token_losses(hidden, head, labels, logit_bytes=6 * 4 * 4).sum()  # three chunks

    wanted = jax.value_and_grad(loss)(hidden, jnp.asarray(meant(head)))
    found = jax.value_and_grad(loss)(hidden, head)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_int8_products_are_exact_where_both_sides_are_whole_numbers():
    weight = dataclasses.replace(random_weight((5, 8), 1, 1, None), int8_products=True)
    x = np.random.default_rng(1).integers(-127, 128, (2, 3, 8)).astype(np.float32)
    x[..., 0] = 127  # so that a row's scale is 1
    np.testing.assert_allclose(
        einsum("BTD,FD->BTF", jnp.asarray(x), weight), x @ meant(weight).T, rtol=1e-6, atol=1e-3
    )
    text = jax.jit(lambda x: einsum("BTD,FD->BTF", x, weight)).lower(x).as_text()
    assert "(tensor<2x3x8xi8>, tensor<5x8xi8>) -> tensor<2x3x5xi32>" in text


@pytest.mark.parametrize("group", [None, 4, 16])
def test_split_over_devices(group):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("fsdp", "tensor"))
    rules = (("batch", ("fsdp",)), ("embed", ("fsdp",)), ("mlp", ("tensor",)))
    weight = random_weight((16, 32), 1, 1, group)
    x = np.random.default_rng(1).standard_normal((2, 3, 32)).astype(np.float32)
    specs = weight.placed(
        ["tensor", "fsdp"], lambda entry: math.prod(mesh.shape[e] for e in [entry] if e)
    )
    held = jax.device_put(weight, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    assert held.values.addressable_shards[0].data.size * 8 == weight.values.size
    layout = Layout(rules)

    def run(x, weight):
        return einsum("BTD,FD->BTF", x, weight, axes=("mlp", "embed"), layout=layout)

    with jax.set_mesh(mesh):
        there = jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp")))
        found, pull = jax.vjp(lambda x: jax.jit(run)(x, held), there)
        (back,) = pull(found)
    wanted = x @ meant(weight).T
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    np.testing.assert_allclose(back, wanted @ meant(weight), rtol=1e-4, atol=1e-3)
