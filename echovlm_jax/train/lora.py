"""Low-rank updates beside frozen weights (Hu et al., arXiv 2106.09685): a tree of their own.

Beside a kernel [*out, *in] lie a [rank, *in] and b [*out, rank]; the layer adds
scale · b (a x), with scale = alpha / rank. b starts at zero, and with it the update. Dropout, in
training alone, is of this branch's x, each value of it.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

# How many leading dimensions of a kernel are outputs, the scan's layers not counted; others have 1.
_OUTPUTS = ((r".*/attn/qkv", 3), (r".*/attn/[qkv]", 2))
# How many leading dimensions count copies of a kernel: layers of a scan, and experts in a layer.
_EXPERTS = r"text/layers/moe/experts/.*"
_STACKED = ((_EXPERTS, 2), (r"(text/layers|vision/blocks)/.*", 1))


def takes_update(path: str) -> bool:
    """Whether an update can lie beside a parameter: beside the kernels of products, and not beside
    the output head, which the loss multiplies in pieces."""
    return path.endswith("/kernel") and path != "text/lm_head/kernel"


def of_experts(how: Mapping[str, str]) -> list[str]:
    """The routed experts' weights that have updates."""
    return [path for path, one in how.items() if one == "lora" and re.fullmatch(_EXPERTS, path)]


def lora_shapes(shapes: Any, how: Mapping[str, str], rank: int) -> Any:
    """The tree of updates (jax.ShapeDtypeStruct, float32) for the kernels that `how` says lora."""
    return _beside(
        shapes,
        how,
        lambda kernel, *, is_a, stacked, out: jax.ShapeDtypeStruct(
            _piece(kernel.shape, rank, is_a, stacked, out), jnp.float32
        ),
    )


def lora_axes(axes: Any, how: Mapping[str, str]) -> Any:
    """The same tree with logical axes; the rank's is "rank"."""
    return _beside(
        axes,
        how,
        lambda names, *, is_a, stacked, out: _piece(names, "rank", is_a, stacked, out),
    )


def init_lora(shapes: Any, key: jax.Array) -> Any:
    """Values for a tree of `lora_shapes`: b zero, a uniform within ±1 / sqrt(inputs), as PEFT."""
    flat = flatten_dict(shapes)
    keys = jax.random.split(key, len(flat))
    made = {}
    for (path, leaf), k in zip(sorted(flat.items()), keys, strict=True):
        if path[-1] == "b":
            made[path] = jnp.zeros(leaf.shape, leaf.dtype)
        else:
            bound = math.prod(leaf.shape[_stacked("/".join(path)) + 1 :]) ** -0.5
            made[path] = jax.random.uniform(k, leaf.shape, leaf.dtype, -bound, bound)
    return unflatten_dict(made)


def scaled(lora: Any, scale: float) -> Any:
    """The tree with `scale` in b: what the model's layers read."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x * scale if path[-1].key == "b" else x, lora
    )


def with_dropout(lora: Any, key: jax.Array, rate: float) -> Any:
    """The tree with a key for each matrix and layer, and the share of its inputs that is kept.

    Args:
      lora: of `scaled`.
      key: of this step, and of this part of its batch.
      rate: the share of inputs that count as 0; the others count 1 / (1 - rate).
    """
    flat: dict[str, Any] = flatten_dict(lora, sep="/")
    for path in [path for path in flat if path.endswith("/a")]:
        module = path.removesuffix("/a")
        own = jax.random.fold_in(key, zlib.crc32(module.encode()))
        shape = flat[path].shape[: _stacked(module)]
        flat[f"{module}/key"] = jax.random.split(own, shape) if shape else own
        flat[f"{module}/keep"] = jnp.full(shape, 1 - rate, jnp.float32)
    return unflatten_dict(flat, sep="/")


def _beside(tree: Any, how: Mapping[str, str], make: Any) -> Any:
    made = {}
    for path, leaf in flatten_dict(tree, sep="/").items():
        if how[path] == "lora":
            module = path.removesuffix("/kernel")
            out = next((n for pattern, n in _OUTPUTS if re.fullmatch(pattern, module)), 1)
            for name in ("a", "b"):
                made[f"{module}/{name}"] = make(
                    leaf, is_a=name == "a", stacked=_stacked(path), out=out
                )
    return unflatten_dict(made, sep="/")


def _stacked(path: str) -> int:
    """How many of a parameter's first dimensions count copies of it."""
    return next((n for pattern, n in _STACKED if re.fullmatch(pattern, path)), 0)


def _piece(whole: tuple, rank: Any, is_a: bool, stacked: int, out: int) -> tuple:
    first, rest = whole[:stacked], whole[stacked:]
    return (*first, rank, *rest[out:]) if is_a else (*first, *rest[:out], rank)
