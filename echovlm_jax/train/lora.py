"""Low-rank updates beside frozen weights (Hu et al., arXiv 2106.09685): a tree of their own.

Beside a kernel [*out, *in] lie a [rank, *in] and b [*out, rank]; the layer adds
scale · b (a x), with scale = alpha / rank. b starts at zero, and with it the update.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

# How many leading dimensions of a kernel are outputs, the scan's layers not counted; others have 1.
_OUTPUTS = ((r".*/attn/qkv", 3), (r".*/attn/[qkv]", 2))


def lora_shapes(shapes: Any, how: Mapping[str, str], rank: int) -> Any:
    """The tree of updates (jax.ShapeDtypeStruct, float32) for the kernels that `how` says lora."""
    return _beside(
        shapes,
        how,
        lambda kernel, *, is_a, layers, out: jax.ShapeDtypeStruct(
            _piece(kernel.shape, rank, is_a, layers, out), jnp.float32
        ),
    )


def lora_axes(axes: Any, how: Mapping[str, str]) -> Any:
    """The same tree with logical axes; the rank's is "rank"."""
    return _beside(
        axes,
        how,
        lambda names, *, is_a, layers, out: _piece(names, "rank", is_a, layers, out),
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
            start = 2 if _layers("/".join(path)) else 1
            inputs = 1
            for size in leaf.shape[start:]:
                inputs *= size
            bound = inputs**-0.5
            made[path] = jax.random.uniform(k, leaf.shape, leaf.dtype, -bound, bound)
    return unflatten_dict(made)


def scaled(lora: Any, scale: float) -> Any:
    """The tree with `scale` in b: what the model's layers read."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x * scale if path[-1].key == "b" else x, lora
    )


def _beside(tree: Any, how: Mapping[str, str], make: Any) -> Any:
    made = {}
    for path, leaf in flatten_dict(tree, sep="/").items():
        if how[path] == "lora":
            module = path.removesuffix("/kernel")
            out = next((n for pattern, n in _OUTPUTS if re.fullmatch(pattern, module)), 1)
            for name in ("a", "b"):
                made[f"{module}/{name}"] = make(
                    leaf, is_a=name == "a", layers=_layers(path), out=out
                )
    return unflatten_dict(made, sep="/")


def _layers(path: str) -> bool:
    """Whether a parameter has a first dimension for the layers of a scan."""
    return bool(re.match(r"text/layers/|vision/blocks/", path))


def _piece(whole: tuple, rank: Any, is_a: bool, layers: bool, out: int) -> tuple:
    first, rest = whole[: int(layers)], whole[int(layers) :]
    return (*first, rank, *rest[out:]) if is_a else (*first, *rest[:out], rank)
