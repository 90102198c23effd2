"""The product of activations and a weight, by its einsum."""

import functools
import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from echovlm_jax.ops import Array
from echovlm_jax.ops.collectives import reduce_scatter
from echovlm_jax.ops.layout import Layout
from echovlm_jax.ops.product.weight import Quantized, Weight, as_operand, no_gradient

Axes = tuple[str, ...]

# By cards' rates in float32, so many rows are added up in about the time that reading takes: on a
# T4 in 0.6 of it for int8, 1.2 for int4.
_FEW_ROWS = 8


def weight_axes(spec: str) -> tuple[str, str, str]:
    """The weight's axes in the einsum of its product: stacked, made and summed over, in this order.

    Stacked axes count copies of a weight, each with an x and a result of its own.

    Example: "BTD,NHD->BTNH" gives ("", "NH", "D"), "ECD,EFD->ECF" gives ("E", "F", "D").

    Raises:
      ValueError: the weight has them in another order.
    """
    x, weight, result = re.split(",|->", spec)
    stacked = "".join(axis for axis in weight if axis in x and axis in result)
    made = "".join(axis for axis in weight if axis not in x)
    summed = "".join(axis for axis in weight if axis not in result)
    if weight != stacked + made + summed:
        raise ValueError(f"{spec}: order the weight's axes as stacked, outputs, inputs")
    return stacked, made, summed


def einsum(
    spec: str,
    x: Array,
    weight: Weight,
    *,
    axes: Axes | None = None,
    layout: Layout = Layout(),
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """`jnp.einsum(spec, x, weight)` in x's dtype, whatever form the weight is stored in.

    Where the weight is split over devices that have rows of their own (ZeRO, arXiv 1910.02054), it
    is gathered in x's dtype for this one product, and its gradient is reduced and scattered at
    once: it is never whole for longer, and no device holds the whole sum. A gradient is added up
    over devices in the layout's sum_dtype.

    Args:
      spec: an einsum of two operands, in the axis alphabet of `ops`; x has the batch first and the
        length second, as has the result.
      x: activations; their dtype is the dtype of the product.
      weight: the weight, of any float dtype, or quantized: then it has no gradient.
      axes: the weight's logical axes; without them the compiler decides what travels.
      layout: where x and the weight lie.
      out_dtype: dtype of the result (the accumulation is at least this wide); x's by default.

    The gradient is written out, so that forward mode (`jax.jvp`) is refused by JAX.
    """
    out_dtype = out_dtype or x.dtype
    shared = set(layout.mesh_axes("batch"))
    if axes is None or not any(shared & set(layout.mesh_axes(axis)) for axis in axes):
        return _product(x, weight, spec, jnp.dtype(out_dtype), layout.sums(x.dtype))
    return _gathered(x, weight, spec, axes, layout, jnp.dtype(out_dtype))


# Whoever keeps what the backward pass reads keeps x and the weight as they came: x once for all its
# products, and no copy of the weight, cast or reshaped, for each layer of a loop.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x: Array, weight: Weight, spec: str, out_dtype: Any, sums: Any) -> jax.Array:
    return _compute(spec, x, weight, out_dtype)


def _product_fwd(
    x: Array, weight: Weight, spec: str, out_dtype: Any, sums: Any
) -> tuple[jax.Array, tuple[Array, Weight]]:
    return _product(x, weight, spec, out_dtype, sums), (x, weight)


def _product_bwd(
    spec: str, out_dtype: Any, sums: Any, saved: tuple[Array, Weight], gradient: Array
) -> tuple[jax.Array, Weight]:
    x, weight = saved
    if isinstance(weight, Quantized):
        return _input_gradient(spec, weight, gradient, x.dtype), no_gradient(weight)
    # Transposed, not differentiated: `jax.vjp` would compute the product once more.
    (dx,) = jax.linear_transpose(lambda x: _compute(spec, x, weight, out_dtype), x)(gradient)
    if _mesh_size() > 1 and jnp.promote_types(x.dtype, weight.dtype) == sums != x.dtype:
        # Where the compiler puts a sum over devices, it is one of this product's dtype.
        inputs, letters, result = re.split(",|->", spec)
        dw = jnp.einsum(f"{inputs},{result}->{letters}", x, gradient, preferred_element_type=sums)
        return dx, dw.astype(weight.dtype)
    (dw,) = jax.linear_transpose(lambda w: _compute(spec, x, w, out_dtype), weight)(gradient)
    return dx, dw


_product.defvjp(_product_fwd, _product_bwd)


def _compute(spec: str, x: Array, weight: Weight, out_dtype: DTypeLike) -> jax.Array:
    if isinstance(weight, Quantized):
        return _quantized(spec, x, weight, out_dtype)
    weight = as_operand(weight, x.dtype)
    inputs, letters, result = re.split(",|->", spec)
    rows = inputs[:2]
    if rows != result[:2] or set(rows) & set(letters) or _mesh_size() > 1:
        return jnp.einsum(spec, x, weight, preferred_element_type=out_dtype)
    # Without a mesh of several devices in the context, axes that lie side by side in both of their
    # operands are one: XLA:CPU copies an operand, transposed, for a sum over two axes (batch and
    # length, in the weight's gradient) or for a weight with two axes that are not summed.
    merged, operands = _merged(spec, x, weight)
    y = jnp.einsum(merged, *operands, preferred_element_type=out_dtype)
    sizes = dict(zip(inputs + letters, x.shape + weight.shape, strict=True))
    return y.reshape([sizes[name] for name in result])


def _quantized(spec: str, x: Array, weight: Quantized, out_dtype: DTypeLike) -> jax.Array:
    """`_compute` of a quantized weight, by the way that reads its few bits alone."""
    _, letters, result = re.split(",|->", spec)
    few = math.prod(x.shape[:2]) <= _FEW_ROWS and not weight.int8_products
    if not few or not set(letters[: -weight.inputs]) <= set(result):
        return _multiplied(spec, x, weight, out_dtype)
    ways = {"cuda": _added_up, "default": _multiplied}
    ways = {name: functools.partial(way, spec, out_dtype=out_dtype) for name, way in ways.items()}
    return jax.lax.platform_dependent(x, weight, **ways)


def _added_up(spec: str, x: Array, weight: Quantized, out_dtype: DTypeLike) -> jax.Array:
    """The product without a `dot`, for few rows on a card.

    XLA:GPU 0.10.2 gives a `dot` to Triton or to cuBLAS. Below compute capability 8.0 there is no
    Triton, and int4 in groups goes to cuBLAS everywhere: for each token the weight is then written
    to memory wide, and read again. A sum is fused with what makes its terms. In groups the scales
    come after the first sum: with several rows XLA would not fuse them.
    """
    inputs, letters, result = re.split(",|->", spec)
    values, scale = jnp.asarray(weight.values, jnp.float32), jnp.asarray(weight.scale)
    x, made = jnp.asarray(x, jnp.float32), letters[: -weight.inputs]
    if not weight.grouped:
        y = _sum_of_products(inputs, x, letters, values, result)
        return (y * _aligned(made, scale, result)).astype(out_dtype)
    *_, groups, size = weight.values.shape
    stacked, rest, last = made[: weight.stacked], letters[-weight.inputs : -1], letters[-1]
    place = inputs.index(last)
    x = jnp.reshape(x, (*x.shape[:place], groups, size, *x.shape[place + 1 :]))
    inputs = inputs.replace(last, f"g{last}")
    parts = f"{result}{rest}g"
    y = _sum_of_products(inputs, x, f"{made}{rest}g{last}", values, parts)
    scales = f"{stacked}{rest}g{made[weight.stacked :]}"
    return _sum_of_products(parts, y, scales, scale, result).astype(out_dtype)


def _sum_of_products(a: str, x: jax.Array, b: str, y: jax.Array, result: str) -> jax.Array:
    """`jnp.einsum(f"{a},{b}->{result}", x, y)` by a product of all pairs and a sum."""
    axes = result + "".join(axis for axis in b if axis not in result)
    return jnp.sum(_aligned(a, x, axes) * _aligned(b, y, axes), axis=range(len(result), len(axes)))


def _aligned(names: str, x: jax.Array, axes: str) -> jax.Array:
    """x with the axes of `names` in the order of `axes`; those that it lacks have size 1."""
    x = jnp.transpose(x, [names.index(axis) for axis in axes if axis in names])
    return jnp.expand_dims(x, [n for n, axis in enumerate(axes) if axis not in names])


def _multiplied(spec: str, x: Array, weight: Quantized, out_dtype: DTypeLike) -> jax.Array:
    """The product by `jnp.einsum`: where a result has one scale, it goes to the result."""
    inputs, letters, result = re.split(",|->", spec)
    scaled = letters[: -weight.inputs]
    if weight.grouped:
        last = letters[-1]
        place, count = inputs.index(last), weight.values.shape[-2]
        # Without the barrier XLA:TPU moves the reshape up, into the product that made x: its weight
        # is then written wide, in the reshape's form.
        x = jnp.reshape(
            jax.lax.optimization_barrier(x), (*x.shape[:place], count, -1, *x.shape[place + 1 :])
        )
        spec = spec.replace(last, f"g{last}")
    if weight.grouped or not set(scaled) <= set(result):
        return jnp.einsum(spec, x, weight.split(x.dtype), preferred_element_type=out_dtype)
    if weight.int8_products:
        rest = "".join(axis for axis in inputs if axis in result)
        whole, own = _rounded(x, tuple(inputs.index(axis) for axis in letters[-weight.inputs :]))
        y = jnp.einsum(spec, whole, weight.values, preferred_element_type=jnp.int32)
        y = jnp.einsum(f"{result},{rest}->{result}", y.astype(jnp.float32), own)
    else:
        y = _compute(spec, x, jnp.asarray(weight.values).astype(x.dtype), jnp.float32)
    return jnp.einsum(f"{result},{scaled}->{result}", y, weight.scale).astype(out_dtype)


def _rounded(x: Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """x in int8, and its scales: one for all of these axes together."""
    wide = jnp.asarray(x, jnp.float32)
    top = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
    scale = jnp.where(top > 0, top, 1) / 127
    return jnp.round(wide / scale).astype(jnp.int8), jnp.squeeze(scale, axes)


def _input_gradient(spec: str, weight: Quantized, gradient: Array, dtype: Any) -> jax.Array:
    """The gradient of a quantized weight's x."""
    inputs, letters, result = re.split(",|->", spec)
    scaled = letters[: -weight.inputs]
    if weight.grouped or not set(scaled) <= set(result):
        whole = as_operand(weight, dtype)
    else:
        gradient = jnp.einsum(f"{result},{scaled}->{result}", gradient, weight.scale)
        whole = jnp.asarray(weight.values).astype(dtype)
    return jnp.einsum(
        f"{result},{letters}->{inputs}", gradient.astype(dtype), whole, preferred_element_type=dtype
    )


def _mesh_size() -> int:
    return jax.sharding.get_abstract_mesh().size


def _merged(spec: str, x: Array, weight: Array) -> tuple[str, list[jax.Array]]:
    """The same einsum with neighbouring axes as one, where that copies nothing."""
    names = re.split(",|->", spec)
    arrays = [jnp.asarray(x), jnp.asarray(weight)]
    for pair in [a + b for one in names[:2] for a, b in itertools.pairwise(one)]:
        # Who has one of the two has both, the second after the first.
        if not all(pair in one or not set(pair) & set(one) for one in names):
            continue
        for n, array in enumerate(arrays):
            if (k := names[n].find(pair)) >= 0:
                shape = array.shape
                arrays[n] = array.reshape(*shape[:k], shape[k] * shape[k + 1], *shape[k + 2 :])
        # The merged axis has the second one's name: a third may follow it.
        names = [one.replace(pair, pair[1]) for one in names]
    return "{},{}->{}".format(*names), arrays


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _gathered(
    x: Array, weight: Weight, spec: str, axes: Axes, layout: Layout, out_dtype: Any
) -> jax.Array:
    return _compute(spec, x, _whole(weight, x.dtype, axes, layout), out_dtype)


def _whole(weight: Weight, dtype: Any, axes: Axes, layout: Layout) -> Weight:
    """The weight, split no more over devices with rows of their own."""
    shared = layout.mesh_axes("batch")
    kept = [tuple(m for m in layout.mesh_axes(axis) if m not in shared) or None for axis in axes]
    if isinstance(weight, Quantized):  # its few bits travel
        sizes = jax.sharding.get_abstract_mesh().shape
        specs = weight.placed(kept, lambda entry: math.prod(sizes[m] for m in entry or ()))
        return jax.lax.with_sharding_constraint(weight, specs)
    return jax.lax.with_sharding_constraint(as_operand(weight, dtype), PartitionSpec(*kept))


def _gathered_fwd(
    x: Array, weight: Weight, spec: str, axes: Axes, layout: Layout, out_dtype: Any
) -> tuple[jax.Array, tuple[Array, Weight]]:
    return _gathered(x, weight, spec, axes, layout, out_dtype), (x, weight)


def _gathered_bwd(
    spec: str, axes: Axes, layout: Layout, out_dtype: Any, saved: Any, gradient: Array
) -> tuple[jax.Array, Weight]:
    x, weight = saved
    gradient = gradient.astype(x.dtype)
    inputs, letters, result = re.split(",|->", spec)
    whole = _whole(weight, x.dtype, axes, layout)
    if isinstance(whole, Quantized):
        return _input_gradient(spec, whole, gradient, x.dtype), no_gradient(weight)
    dx = _compute(f"{result},{letters}->{inputs}", gradient, whole, x.dtype)

    batch, length = layout.mesh_axes("batch"), layout.mesh_axes("length")
    targets = [layout.mesh_axes(axis) for axis in axes]
    scattered = {m for target in targets for m in target if m in batch}

    def local(x: Array, gradient: Array) -> jax.Array:
        dw = jnp.einsum(
            f"{inputs},{result}->{letters}",
            x,
            gradient,
            preferred_element_type=layout.sums(x.dtype),
        )
        for dim, target in enumerate(targets):
            dw = reduce_scatter(dw, [m for m in target if m in batch], dim)
        rest = [m for m in (*batch, *length) if m not in scattered]
        return jax.lax.psum(dw, rest) if rest else dw

    def activation(names: str) -> PartitionSpec:
        """Batch and length first, then what the weight's axes say, rows' own devices left out."""
        kept = dict(zip(letters, targets, strict=True))
        rest = [tuple(m for m in kept.get(n, ()) if m not in batch) or None for n in names[2:]]
        return PartitionSpec(batch or None, length or None, *rest)

    dw = jax.shard_map(
        local,
        in_specs=(activation(inputs), activation(result)),
        out_specs=PartitionSpec(*[target or None for target in targets]),
        check_vma=False,
    )(x, gradient)
    return dx, dw.astype(weight.dtype)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


def add_bias(y: Array, bias: Array, layout: Layout = Layout()) -> jax.Array:
    """y + bias, in y's dtype, over y's last axes; the bias's gradient is a sum as a weight's is."""
    y = jnp.asarray(y)
    if layout.sums(y.dtype) == y.dtype:
        return y + bias.astype(y.dtype)
    return _biased(y, bias, layout.sums(y.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _biased(y: Array, bias: Array, sums: Any) -> jax.Array:
    return jnp.asarray(y) + bias.astype(y.dtype)


def _biased_bwd(sums: Any, bias: Array, gradient: Array) -> tuple[jax.Array, jax.Array]:
    over = tuple(range(gradient.ndim - bias.ndim))
    return jnp.asarray(gradient), jnp.sum(gradient, axis=over, dtype=sums).astype(bias.dtype)


_biased.defvjp(lambda y, bias, sums: (_biased(y, bias, sums), bias), _biased_bwd)
