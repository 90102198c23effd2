"""What is quantized, and how a weight becomes values and scales.

Rounding is to the nearest, without calibration data. 8 bits: scale = max|w| / 127. 4 bits: the
value w with the largest |w| is −8 steps, scale = −w / 8, and what would be 8 steps is 7. Compared
with max|w| / 7, the divergence from the wide model is a third smaller.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding

from echovlm_jax.config import ModelConfig
from echovlm_jax.errors import InputError
from echovlm_jax.model import ParamSpec, param_specs
from echovlm_jax.ops import Array
from echovlm_jax.ops.product.weight import Quantized

# The decoder's products, embedding and head. The vision tower, the router, the mixture's two
# coefficients and gates stay wide: 6 % of the parameters.
_TAKEN = re.compile(
    r"text/(embed/embedding|lm_head/kernel|layers/(attn|mlp|moe/shared|moe/experts)/\w+/kernel)"
)


GROUP = 128
_TABLE = ("vocab", "embed")
_EIGHT = {"heads", "kv_heads", "expert"}  # axes of attention's weights and of the experts'


@dataclass(frozen=True)
class Recipe:
    """How weights are rounded.

    Attributes:
      bits: 8 or 4, sign included.
      group: inputs that share a scale, along the last input axis; None: all of an output's.
      int8_products: see `Quantized`.
    """

    bits: int
    group: int | None = None
    int8_products: bool = False


KINDS: Mapping[str, Recipe] = {
    "int8": Recipe(8),
    "int4": Recipe(4, group=GROUP),
    "w8a8": Recipe(8, int8_products=True),
}


def recipe(kind: str) -> Recipe:
    """A recipe by name. Raises InputError for another."""
    if kind not in KINDS:
        raise InputError(f"quantize {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    return KINDS[kind]


def recipe_of(spec: ParamSpec, how: Recipe) -> Recipe:
    """A recipe as it applies to a parameter: with groups that divide the last axis.

    A table, embedding or head, has 8 bits in groups whatever the recipe. Groups, because XLA:TPU
    has no way to take one row of an int8 matrix, whose tiles are of 32 rows, and copies all of it
    for every token.

    In int4 the dense MLP and the shared expert have 4 bits, 63 % of the released weights; all else
    has 8. With 4 bits in attention's output and the experts too, the divergence of the demo's
    model was 2.5 times as large, and its reports lost two points of BLEU-1.
    """
    if spec.axes == _TABLE:
        how = Recipe(8, GROUP)
    elif how.bits == 4 and _EIGHT & set(spec.axes):
        how = Recipe(8)
    if how.group is None:
        return how
    return replace(how, group=_group(spec.shape[-1], how.group), int8_products=False)


def takes(path: str, spec: ParamSpec) -> bool:
    """Whether a parameter is quantized, by its path in `param_specs`."""
    return bool(spec.inputs and _TAKEN.fullmatch(path))


def abstract(spec: ParamSpec, how: Recipe) -> Quantized:
    """The quantized form of a weight, of jax.ShapeDtypeStruct."""
    _, outputs, inputs = spec.cut(spec.shape)
    lead, how = spec.shape[: spec.stacked], recipe_of(spec, how)
    group = how.group
    values, scale = spec.shape, (*lead, *outputs)
    if group:
        groups = inputs[-1] // group
        values = (*spec.shape[:-1], groups, group)
        scale = (*lead, *inputs[:-1], groups, *outputs)
    return Quantized(
        jax.ShapeDtypeStruct(values, jnp.int8 if how.bits == 8 else jnp.int4),
        jax.ShapeDtypeStruct(scale, jnp.float32),
        outputs=len(outputs),
        inputs=len(inputs),
        grouped=bool(group),
        int8_products=how.int8_products,
    )


def _group(size: int, most: int) -> int:
    """The largest group that divides an axis, up to the recipe's."""
    return next(n for n in range(min(size, most), 0, -1) if size % n == 0)


@functools.partial(jax.jit, static_argnames=("spec", "how"))
def quantize(weight: Array, spec: ParamSpec, how: Recipe) -> Quantized:
    """Values and scales of a weight, or of one place of its first stacked axes.

    Args:
      weight: of any float dtype, of the spec's shape, or without some of its first axes.
      spec: the parameter's description.
      how: the recipe.
    """
    gone = len(spec.shape) - weight.ndim
    spec = replace(
        spec, shape=spec.shape[gone:], axes=spec.axes[gone:], stacked=spec.stacked - gone
    )
    form = abstract(spec, how)
    wide = jnp.asarray(weight, jnp.float32).reshape(form.values.shape)
    over = (-1,) if form.grouped else tuple(range(-form.inputs, 0))
    top, bottom = (f(wide, axis=over, keepdims=True) for f in (jnp.max, jnp.min))
    bounds = jnp.iinfo(form.values.dtype)
    low, high = int(bounds.min), int(bounds.max)
    if form.values.dtype == jnp.int4:
        scale = jnp.where(top > -bottom, top, bottom) / low
    else:
        scale = jnp.maximum(top, -bottom) / high
    scale = jnp.where(scale == 0, 1, scale)  # not finite where a value isn't
    values = jnp.clip(jnp.round(wide / scale), low, high).astype(form.values.dtype)
    scale = jnp.squeeze(scale, over)
    if form.grouped:
        made = range(spec.stacked, spec.stacked + form.outputs)
        scale = jnp.moveaxis(scale, made, range(-form.outputs, 0))
    return replace(form, values=values, scale=scale)


def quantize_params(params: Any, config: ModelConfig, kind: str) -> Any:
    """The tree of parameters with those that `takes` names quantized. Raises InputError."""
    how, specs = recipe(kind), param_specs(config)
    flat = flatten_dict(params, sep="/")
    return unflatten_dict(
        {
            path: quantize(leaf, specs[path], how) if takes(path, specs[path]) else leaf
            for path, leaf in flat.items()
        },
        sep="/",
    )


def placed(form: Quantized, sharding: NamedSharding) -> Quantized:
    """The shardings of values and scale of a weight that would be laid out like this."""
    mesh = sharding.mesh

    def pieces(entry: Any) -> int:
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        count = 1
        for name in names:
            count *= mesh.shape[name]
        return count

    entries = [*sharding.spec, *[None] * (form.ndim - len(sharding.spec))]
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), form.placed(entries, pieces))
