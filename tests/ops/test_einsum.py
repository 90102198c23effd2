"""The door for weights against jnp.einsum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echovlm_jax.ops.product.einsum import _merged, einsum


@pytest.mark.parametrize(
    ("spec", "x", "weight"),
    [
        ("BTD,FD->BTF", (2, 3, 4), (5, 4)),
        ("BTD,NHD->BTNH", (2, 3, 4), (5, 6, 4)),
        ("BTEF,EDF->BTD", (2, 3, 4, 5), (4, 6, 5)),
        ("BTNH,DNH->BTD", (2, 3, 4, 5), (6, 4, 5)),
        ("BTD,CNHD->BTCNH", (2, 3, 4), (3, 5, 6, 4)),
        ("BTNH,DHN->BTD", (2, 3, 4, 5), (6, 5, 4)),  # in another order: N and H stay two
        ("ZJECD,EFD->ZJECF", (2, 3, 4, 5, 6), (4, 7, 6)),
        ("Eor,Eri->Eoi", (2, 3, 4), (2, 4, 5)),  # no batch: not an axis of the weight may be merged
        ("BTD,FD->BTF", (2, 0, 4), (5, 4)),
    ],
)
def test_values_and_gradients(spec, x, weight):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (x, weight))
    with jax.default_matmul_precision("float32"):
        wanted, pull = jax.vjp(lambda x, w: jnp.einsum(spec, x, w), x, weight)
        found, ours = jax.vjp(lambda x, w: einsum(spec, x, w), x, weight)
        d = jnp.asarray(rng.standard_normal(wanted.shape), jnp.float32)
        for a, b in zip((found, *ours(d)), (wanted, *pull(d)), strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "merged"),
    [
        ("BTD,FD->BTF", "TD,FD->TF"),
        ("BTD,CNHD->BTCNH", "TD,HD->TH"),
        ("BTNH,DNH->BTD", "TH,DH->TD"),
        ("BTEF,EDF->BTD", "TEF,EDF->TD"),
        ("BTNH,DHN->BTD", "TNH,DHN->TD"),
    ],
)
def test_neighbouring_axes_are_one(spec, merged):
    left, right = (names for names in spec.split("->")[0].split(","))
    sizes = dict(zip("BTDFCNHE", range(2, 10), strict=True))
    x, weight = (jnp.zeros([sizes[name] for name in names]) for names in (left, right))
    found, operands = _merged(spec, x, weight)
    assert found == merged
    assert [a.size for a in operands] == [x.size, weight.size]


def test_the_backward_pass_keeps_operands_as_they_came():
    """x once for two products; of each layer's weights no copy, cast or reshaped."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32)
    one, two = (jnp.asarray(rng.standard_normal((9, 5, n, 4)), jnp.bfloat16) for n in (6, 7))

    def layer(x, weights):
        one, two = (einsum("BTD,NHD->BTNH", x, weight) for weight in weights)
        return x + jnp.tanh(one.mean((2, 3), keepdims=True) + two.mean((2, 3), keepdims=True))[
            ..., 0
        ], ()

    def layers(x, one, two):
        return jax.lax.scan(layer, x, (one, two))[0]

    kept = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(layers, *args)[1], x, one, two))
    shapes = [(leaf.shape, leaf.dtype.name) for leaf in kept if leaf.size > 9 * 2 * 3]
    stacked = ((9, *x.shape), "float32")
    assert sorted(shapes) == sorted([stacked, (one.shape, "bfloat16"), (two.shape, "bfloat16")])


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_is_two_products_and_those_of_jax(x_dtype, out_dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 4)), x_dtype)
    weight = jnp.asarray(rng.standard_normal((5, 6, 4)), jnp.float32)
    spec, d = "BTD,NHD->BTNH", jnp.asarray(rng.standard_normal((2, 3, 5, 6)), out_dtype)

    def gradients(product):
        return lambda x, weight: jax.vjp(product, x, weight)[1](d)

    def plain(x, weight):
        return jnp.einsum(spec, x, weight.astype(x.dtype), preferred_element_type=out_dtype)

    ours = gradients(lambda x, weight: einsum(spec, x, weight, out_dtype=out_dtype))
    assert str(jax.make_jaxpr(ours)(x, weight)).count("dot_general") == 3  # one is the value's
    for a, b in zip(ours(x, weight), gradients(plain)(x, weight), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(g, np.float32) for g in (a, b))
        rounding = 2**-7 if jnp.bfloat16 in (x_dtype, out_dtype) else 1e-6
        np.testing.assert_allclose(a, b, atol=rounding * abs(b).max())
