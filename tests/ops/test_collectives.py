"""Gathering and scattering over mesh axes, and the einsum that gathers its weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from echovlm_jax.mesh import AXES, activation_layout, make_mesh
from echovlm_jax.ops import collectives
from echovlm_jax.ops.collectives import all_gather, reduce_scatter
from echovlm_jax.ops.product.einsum import add_bias, einsum

MESHES = [(1, 8, 1, 1, 1), (2, 2, 2, 1, 1), (1, 2, 2, 2, 1), (2, 2, 1, 1, 2), (1, 1, 4, 2, 1)]


def mesh_of(sizes: tuple[int, ...]):
    return make_mesh(dict(zip(AXES, sizes, strict=True)))


def values(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(made: jax.Array, wanted: np.ndarray) -> None:
    assert made.shape == wanted.shape
    assert np.abs(np.asarray(made, np.float64) - wanted).max() < 3e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("ring", [8, 2])  # 2: eight devices scatter in two steps
@pytest.mark.parametrize("axes", [("fsdp",), ("fsdp", "expert"), ("expert",)], ids="-".join)
def test_a_piece_of_the_sum_is_where_a_sharding_wants_it(monkeypatch, axes, ring, dim):
    monkeypatch.setattr(collectives, "RING", ring)
    sizes = {"fsdp": 8} if axes == ("fsdp",) else {"fsdp": 2, "expert": 4}
    rest = tuple(axis for axis in sizes if axis not in axes)
    x = values(0, 8, 16, 24)  # each device's own [16, 24]
    spec = [None, None]
    spec[dim] = axes
    scatter = jax.shard_map(
        lambda x: reduce_scatter(x[0], axes, dim)[None],
        mesh=make_mesh(sizes),
        in_specs=PartitionSpec(("fsdp", "expert")),
        out_specs=PartitionSpec(rest or None, *spec),
        check_vma=False,
    )
    wanted = x.astype(np.float64).reshape(2 if rest else 1, -1, 16, 24).sum(axis=1)
    close(jax.jit(scatter)(x), wanted)


def test_large_groups_scatter_over_rows_and_columns(monkeypatch):
    assert [collectives._rows(n) for n in (1, 8, 12, 16, 128, 13)] == [1, 1, 3, 4, 8, 1]
    monkeypatch.setattr(collectives, "RING", 2)
    text = str(
        jax.make_jaxpr(
            jax.shard_map(
                lambda x: reduce_scatter(x, ("fsdp",), 0),
                mesh=make_mesh({"fsdp": 8}),
                in_specs=PartitionSpec(),
                out_specs=PartitionSpec("fsdp"),
                check_vma=False,
            )
        )(values(0, 16, 3))
    )
    assert text.count("reduce_scatter[") == 2 and "psum" not in text.replace("psum_scatter", "")


@pytest.mark.parametrize("ring", [8, 2])
def test_gathering_and_its_gradient(monkeypatch, ring):
    monkeypatch.setattr(collectives, "RING", ring)
    axes = ("fsdp", "expert")
    mesh = make_mesh({"fsdp": 2, "expert": 4})
    x, weights = values(1, 16, 24), values(2, 8, 16, 24)

    def weighted(x, weights):
        whole = all_gather(x, axes, 1)
        return jnp.sum(whole * weights[0]).reshape(1)

    total = jax.shard_map(
        weighted,
        mesh=mesh,
        in_specs=(PartitionSpec(None, axes), PartitionSpec(axes)),
        out_specs=PartitionSpec(axes),
        check_vma=False,
    )
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(total(x, weights))))(x)
    np.testing.assert_allclose(value, (x.astype(np.float64) * weights).sum(), rtol=1e-4)
    close(gradient, weights.astype(np.float64).sum(axis=0))


# Spec, shapes of x and of the weight, the weight's logical axes, those of x after batch and length.
PRODUCTS = {
    "column": ("BTD,FD->BTF", (8, 4, 16), (32, 16), ("mlp", "embed")),
    "row": ("BTF,DF->BTD", (8, 4, 32), (16, 32), ("embed", "mlp")),
    "heads": ("BTD,NHD->BTNH", (8, 4, 16), (8, 4, 16), ("heads", "head_dim", "embed")),
    "from heads": ("BTNH,DNH->BTD", (8, 4, 8, 4), (16, 8, 4), ("embed", "heads", "head_dim")),
    "qkv": ("BTD,CNHD->BTCNH", (8, 4, 16), (3, 8, 4, 16), ("qkv", "heads", "head_dim", "embed")),
    "patches": ("BPCY,DCY->BPD", (8, 4, 3, 4), (16, 3, 4), ("vision_embed", "channel", "patch_h")),
}


@functools.cache
def expected(name: str) -> tuple:
    """Result and gradients of Σ g · result by numpy, in float64, with x, weight and g."""
    spec, x_shape, w_shape, _ = PRODUCTS[name]
    inputs, result = spec.split("->")
    a, b = inputs.split(",")
    x, w = values(3, *x_shape), values(4, *w_shape)
    wide = x.astype(np.float64), w.astype(np.float64)
    y = np.einsum(spec, *wide)
    g = values(5, *y.shape)
    dx = np.einsum(f"{result},{b}->{a}", g, wide[1])
    dw = np.einsum(f"{a},{result}->{b}", wide[0], g)
    return x, w, g, y, dx, dw


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_gathered_weight_changes_no_product(name, sizes):
    spec, _, _, axes = PRODUCTS[name]
    mesh = mesh_of(sizes)
    layout = activation_layout(mesh)
    x, w, g, *wanted = expected(name)

    def run(x, w, g):
        y, back = jax.vjp(lambda x, w: einsum(spec, x, w, axes=axes, layout=layout), x, w)
        return (y, *back(g))

    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, layout.spec(*axes))
        rows = NamedSharding(mesh, layout.spec("batch", "length"))
        x, g = (jax.device_put(array, rows) for array in (x, g))
        made = jax.jit(run)(x, jax.device_put(w, place), g)
    for got, value in zip(made, wanted, strict=True):
        close(got, value)
    # The gradient lies where the weight lies: no device holds the whole of it.
    assert made[2].sharding.is_equivalent_to(place, w.ndim)


def test_dtypes_are_those_of_x_and_of_the_weight():
    mesh = mesh_of((1, 8, 1, 1, 1))
    layout = activation_layout(mesh)
    x, w, g, y, *_ = expected("column")
    low = jnp.asarray(x, jnp.bfloat16)
    for options in ({}, {"axes": ("mlp", "embed"), "layout": layout}):
        with jax.set_mesh(mesh):
            product = functools.partial(einsum, "BTD,FD->BTF", out_dtype=jnp.float32, **options)
            made, back = jax.vjp(jax.jit(product), low, w)
            dx, dw = back(jnp.asarray(g))
        assert (made.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
        np.testing.assert_allclose(made, y, atol=0.02 * np.abs(y).max())


def test_without_a_layout_an_einsum_is_numpys():
    for name, (spec, *_) in PRODUCTS.items():
        x, w, _, y, *_ = expected(name)
        close(einsum(spec, x, w), y)


@pytest.mark.parametrize("sum_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(8, 1, 1, 1, 1), (2, 4, 1, 1, 1)], ids=str)
def test_gradients_are_added_up_in_the_dtype_that_is_set(sizes, sum_dtype):
    """One device's gradient is 256 times each of the others', which bfloat16 would lose."""
    mesh = mesh_of(sizes)
    layout = activation_layout(mesh, sum_dtype=sum_dtype)
    x = jnp.ones((8, 1, 8), jnp.bfloat16)
    g = jnp.ones((8, 1, 16), jnp.bfloat16).at[0].set(256)
    w, b = jnp.zeros((16, 8), jnp.float32), jnp.zeros(16, jnp.float32)

    def run(x, w, b, g):
        def layer(w, b):
            y = einsum("BTD,FD->BTF", x, w, axes=("mlp", "embed"), layout=layout)
            return add_bias(y, b, layout)

        return jax.vjp(layer, w, b)[1](g)

    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, layout.spec("mlp", "embed"))
        rows = NamedSharding(mesh, layout.spec("batch", "length"))
        x, g = (jax.device_put(array, rows) for array in (x, g))
        dw, db = jax.jit(run)(x, jax.device_put(w, place), b, g)
        text = jax.jit(run).lower(x, jax.device_put(w, place), b, g).as_text()
    assert dw.dtype == db.dtype == jnp.float32
    if sum_dtype == "float32":
        assert (np.asarray(dw) == 263).all() and (np.asarray(db) == 263).all()
    elif "reduce_scatter" in text:
        assert (np.asarray(dw) != 263).any()
