"""Low-rank updates beside frozen weights (Hu et al., arXiv 2106.09685): a tree of their own.

Beside a kernel [*out, *in] lie a [rank, *in] and b [*out, rank]; the layer adds
scale · b (a x), with scale = alpha / rank. b starts at zero, and with it the update. Dropout, in
training alone, is of this branch's x, each value of it.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from echovlm_jax.model import ParamSpec


def takes_update(path: str) -> bool:
    """Whether an update can lie beside a parameter: beside the kernels of products, and not beside
    the output head, which the loss multiplies in pieces."""
    return path.endswith("/kernel") and path != "text/lm_head/kernel"


def of_experts(specs: Mapping[str, ParamSpec], how: Mapping[str, str]) -> list[str]:
    """The routed experts' weights that have updates."""
    return [path for path, one in how.items() if one == "lora" and "expert" in specs[path].axes]


def lora_specs(
    specs: Mapping[str, ParamSpec], how: Mapping[str, str], rank: int
) -> dict[str, ParamSpec]:
    """The updates, in float32, of the kernels that `how` says lora: "…/a" and "…/b" for "…/kernel".

    As PEFT begins them: b zero, a uniform within ±1 / sqrt(inputs). The rank's logical axis is
    "rank".
    """
    made = {}
    for path, spec in specs.items():
        if how[path] != "lora":
            continue
        (stacked, outputs, inputs), axes = spec.cut(spec.shape), spec.cut(spec.axes)
        module = path.removesuffix("/kernel")
        made[f"{module}/a"] = dataclasses.replace(
            spec,
            shape=(*stacked, rank, *inputs),
            axes=(*axes[0], "rank", *axes[2]),
            init=functools.partial(_uniform, bound=math.prod(inputs) ** -0.5),
        )
        made[f"{module}/b"] = dataclasses.replace(
            spec,
            shape=(*stacked, *outputs, rank),
            axes=(*axes[0], *axes[1], "rank"),
            init=jax.nn.initializers.zeros,
            inputs=1,
        )
    return made


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any, *, bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def init_lora(specs: Mapping[str, ParamSpec], key: jax.Array) -> Any:
    """The tree of first values of `lora_specs`."""
    keys = jax.random.split(key, len(specs))
    made = {
        path: spec.init(own, spec.shape, spec.dtype)
        for (path, spec), own in zip(sorted(specs.items()), keys, strict=True)
    }
    return unflatten_dict(made, sep="/")


def scaled(lora: Any, scale: float) -> Any:
    """The tree with `scale` in b: what the model's layers read."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x * scale if path[-1].key == "b" else x, lora
    )


def with_dropout(lora: Any, specs: Mapping[str, ParamSpec], key: jax.Array, rate: float) -> Any:
    """The tree with a key for each matrix and layer, and the share of its inputs that is kept.

    Args:
      lora: of `scaled`.
      specs: the model's parameters.
      key: of this step, and of this part of its batch.
      rate: the share of inputs that count as 0; the others count 1 / (1 - rate).
    """
    flat: dict[str, Any] = flatten_dict(lora, sep="/")
    for path in [path for path in flat if path.endswith("/a")]:
        module = path.removesuffix("/a")
        own = jax.random.fold_in(key, zlib.crc32(module.encode()))
        shape = flat[path].shape[: specs[f"{module}/kernel"].stacked]
        flat[f"{module}/key"] = jax.random.split(own, shape) if shape else own
        flat[f"{module}/keep"] = jnp.full(shape, 1 - rate, jnp.float32)
    return unflatten_dict(flat, sep="/")
