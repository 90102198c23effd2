"""The device mesh, and the one table that lays parameters out on it.

The model names the logical axes of its parameters and knows no mesh; this table says which mesh
axis each of them is split over. An axis that no rule names, or that rules map to None, is whole on
every device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echovlm_jax.errors import InputError

AXES = ("data", "fsdp", "expert", "tensor", "sequence")

# Every product splits its wide side over `tensor` (Megatron's column and row form) and its model
# width over `fsdp`. Norm scales, head_dim, and the layers of a scan stay whole.
RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "expert_mlp": "tensor",
    "vision_embed": "fsdp",
    "vision_heads": "tensor",
    "vision_mlp": "tensor",
    "merger_embed": "fsdp",
    "merger_mlp": "tensor",
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with all of AXES; those not in `sizes` have size 1.

    Example: make_mesh({"fsdp": 4, "tensor": 2}) on eight devices.

    Raises:
      InputError: an unknown axis, or sizes whose product isn't the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    for axis, size in sizes.items():
        if axis not in AXES:
            raise InputError(f"mesh axis {axis!r} is unknown; choose among {', '.join(AXES)}")
        if size < 1:
            raise InputError(f"mesh axis {axis} must have a size of at least 1, found {size}")
    shape = [sizes.get(axis, 1) for axis in AXES]
    if math.prod(shape) != len(devices):
        given = " × ".join(f"{axis} {size}" for axis, size in sizes.items()) or "1"
        raise InputError(
            f"mesh {given} makes {math.prod(shape)} devices, but there are {len(devices)}"
        )
    return Mesh(np.array(devices).reshape(shape), AXES)


def param_shardings(
    axes: Any, shapes: Any, mesh: Mesh, rules: Mapping[str, str | None] = RULES
) -> Any:
    """How each parameter is laid out.

    Args:
      axes: nested dict of tuples of logical axis names (`model.logical_axes`).
      shapes: the same tree of anything with a shape (`model.abstract_params`).
      mesh: its axes are AXES, or any that the rules name.
      rules: logical axis → mesh axis.

    Returns:
      The same tree of NamedSharding.

    Raises:
      InputError: a rule names an axis that the mesh lacks, splits a size that it doesn't divide,
        or two rules put one mesh axis on two dimensions of one parameter; it names the parameter.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, names, array: _sharding(_name(path), names, array.shape, mesh, rules),
        axes,
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(part, "key", part)) for part in path)


def _sharding(
    name: str,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh: Mesh,
    rules: Mapping[str, str | None],
) -> NamedSharding:
    spec = [rules.get(axis) if axis else None for axis in axes]
    for i, (axis, target, size) in enumerate(zip(axes, spec, shape, strict=True)):
        if target is None:
            continue
        if target not in mesh.shape:
            raise InputError(
                f"rule {axis} → {target}: the mesh has no axis {target}, only"
                f" {', '.join(map(str, mesh.axis_names))}"
            )
        if target in spec[:i]:
            other = axes[spec.index(target)]
            raise InputError(
                f"parameter {name} {list(shape)}: rules {other} → {target} and {axis} → {target}"
                " collide; split only one of the two"
            )
        if size % mesh.shape[target]:
            raise InputError(
                f"parameter {name} {list(shape)}: {axis} {size} does not divide by mesh axis"
                f" {target} {mesh.shape[target]}; choose a mesh.{target} that divides {size}"
            )
    return NamedSharding(mesh, PartitionSpec(*spec))
