"""The device mesh, and the one table that lays parameters and activations out on it.

The model names the logical axes of its arrays and knows no mesh; this table says which mesh axes
each of them is split over. An axis that no rule names, or that rules map to None, is whole on
every device.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echovlm_jax.errors import InputError
from echovlm_jax.ops.layout import Layout

# In the order of how often they talk, the most talkative last: it gets the closest neighbours.
AXES = ("data", "fsdp", "expert", "tensor", "sequence")

Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = {
    # Parameters. Every product splits its wide side over `tensor` (Megatron's column and row form)
    # and its model width over all devices that hold different rows of a batch: fsdp and expert.
    # Inside the routed experts the expert dimension takes the expert axis, and fsdp is left for
    # their width. Norm scales, head_dim, and the layers of a scan stay whole.
    "vocab": "tensor",
    "embed": ("fsdp", "expert"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "expert_embed": "fsdp",
    "expert_mlp": "tensor",
    "vision_embed": ("fsdp", "expert"),
    "vision_heads": "tensor",
    "vision_mlp": "tensor",
    "merger_embed": ("fsdp", "expert"),
    "merger_mlp": "tensor",
    # Activations; where they have a name above, the same rule holds. Every device has its own rows
    # except over tensor and sequence.
    "batch": ("data", "fsdp", "expert"),
    "lookup_batch": "data",  # devices that hold parts of the embedding look up one another's rows
    "length": "sequence",
    # Attention needs whole rows: there the heads take over the axis that split the row.
    "attn_heads": ("tensor", "sequence"),
    "attn_kv_heads": ("tensor", "sequence"),
}

# Sizes for common slices: weights split over at most 64 chips, and copies of that over the rest.
# Every width of the model is a multiple of 256, but XLA:TPU gathers over 128 chips of a v5p:4x4x8
# by all-reduce, with twice the traffic.
PRESETS: dict[str, dict[str, int]] = {
    "v5e:1x1": {},
    "v5e:2x4": {"fsdp": 8},
    "v5e:4x4": {"fsdp": 16},
    "v5e:16x16": {"data": 4, "fsdp": 64},
    "v6e:16x16": {"data": 4, "fsdp": 64},
    "v5p:2x2x1": {"fsdp": 4},
    "v5p:4x4x4": {"fsdp": 64},
    "v5p:4x4x8": {"data": 2, "fsdp": 64},
    "v5p:8x16x16": {"data": 32, "fsdp": 64},
}


def make_mesh(
    sizes: Mapping[str, int],
    devices: Sequence[Any] | None = None,
    *,
    dcn: Mapping[str, int] | None = None,
) -> Mesh:
    """A mesh with all of AXES; those not in `sizes` have size 1.

    TPU devices are placed by their coordinates, so that the neighbours of an axis are neighbours
    on the chip's own network; others keep their order.

    Examples:
      make_mesh({"fsdp": 4, "tensor": 2}) on eight devices;
      make_mesh({"fsdp": -1, "tensor": 2}), the same: -1 takes what the other axes leave;
      make_mesh({"fsdp": 16}, dcn={"data": 2}) on two v5e:4x4 slices: data 2, fsdp 16.

    Args:
      sizes: axis → size, in one slice where there are several.
      devices: all of this job's by default; `topology_devices` gives some to compile for.
      dcn: axis → by how many slices it is multiplied. Slices are what a slower network joins: TPU
        slices, or the processes of a job where devices don't tell.

    Raises:
      InputError: an unknown axis, sizes whose product isn't the number of devices, several slices
        without `dcn`, or TPU devices that aren't a whole slice. It names sizes that would work.
    """
    devices = list(jax.devices() if devices is None else devices)
    _check_sizes("mesh", sizes, inferred=True)
    dcn = dcn or {}
    _check_sizes("mesh.dcn", dcn, inferred=False)
    if math.prod(dcn.values()) == 1:
        slices = _slices(devices) if devices[0].platform == "tpu" else 1
        if slices > 1:
            raise InputError(
                f"these devices are {slices} slices; say over which axis, such as mesh.dcn.data"
                f" {slices}"
            )
        return Mesh(_placed(_shape(sizes, len(devices), "there are"), devices), AXES)
    # GPUs and fake devices of one network domain all say slice 0, or nothing.
    by_process = devices[0].platform != "tpu" and _slices(devices) == 1
    slices = len({d.process_index for d in devices}) if by_process else _slices(devices)
    if math.prod(dcn.values()) != slices:
        raise InputError(
            f"mesh.dcn {_product(dcn)} makes {math.prod(dcn.values())} slices, but these devices"
            f" are {slices}"
        )
    shape = _shape(sizes, len(devices) // slices, "a slice has")
    outer = [dcn.get(axis, 1) for axis in AXES]
    return Mesh(_placed(shape, devices, outer, process_is_granule=by_process), AXES)


def _check_sizes(key: str, sizes: Mapping[str, int], *, inferred: bool) -> None:
    for axis, size in sizes.items():
        if axis not in AXES:
            raise InputError(f"{key} axis {axis!r} is unknown; choose among {', '.join(AXES)}")
        if size < 1 and not (inferred and size == -1):
            rest = ", or -1 for what the others leave" if inferred else ""
            raise InputError(f"{key}.{axis} must be at least 1{rest}; found {size}")


def _shape(sizes: Mapping[str, int], count: int, where: str) -> list[int]:
    """The sizes of AXES, -1 replaced, that make `count` devices."""
    unknown = [axis for axis, size in sizes.items() if size == -1]
    if len(unknown) > 1:
        raise InputError(
            f"mesh.{' and mesh.'.join(unknown)} are -1, but only one axis can be inferred"
        )
    known = {axis: size for axis, size in sizes.items() if size != -1}
    made = math.prod(known.values())
    if unknown and count % made == 0:
        return [{**known, unknown[0]: count // made}.get(axis, 1) for axis in AXES]
    if made == count:
        return [known.get(axis, 1) for axis in AXES]
    mends = []  # which sizes would work, if only one axis were changed
    for axis, size in known.items():
        others = made // size
        if count % others == 0:
            fitting = _divisors(count // others) if unknown else [count // others]
            mends.append(f"mesh.{axis} may be {_either(fitting)}")
    if not unknown:
        mends.append("or leave one axis to be inferred: -1")
    raise InputError(
        f"mesh {_product(known)} makes {made} devices, but {where} {count}"
        f"{', no multiple of it' if unknown else ''}; {'; '.join(mends)}"
    )


def _placed(
    shape: Sequence[int], devices: list[Any], outer: Sequence[int] | None = None, **options: bool
) -> np.ndarray:
    try:
        if outer is None:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return mesh_utils.create_hybrid_device_mesh(
            shape, outer, devices, allow_split_physical_axes=True, **options
        )
    except (AssertionError, ValueError) as error:  # counts are checked: it is the coordinates
        if outer is None and any(getattr(d, "core_on_chip", 0) for d in devices):
            # Two devices a chip (v4): JAX places whole chips only. Their own order is by chip.
            return np.array(devices).reshape(shape)
        raise InputError(
            f"these {len(devices)} {devices[0].device_kind} devices do not form whole slices;"
            " take all of them, or a full rectangle"
        ) from error


def _slices(devices: Iterable[Any]) -> int:
    return len({getattr(device, "slice_index", None) or 0 for device in devices})


def topology_devices(name: str, slices: int = 1) -> list[Any]:
    """Devices of a TPU topology that isn't here, to compile for.

    libtpu reads the environment when it is loaded. Before jax is imported, the caller sets
    JAX_PLATFORMS=cpu, TPU_SKIP_MDS_QUERY=1 and ALLOW_MULTIPLE_LIBTPU_LOAD=1.

    Args:
      name: generation:shape, such as v5e:4x4 or v5p:4x4x8, the shape in chips.
      slices: how many of them, joined by a slower network.

    Raises:
      InputError: libtpu isn't installed, or doesn't know the name.
    """
    known = f"there are {', '.join(PRESETS)} and others"
    # libtpu ends the whole process over a dimension of 0.
    # until: libtpu 0.1
    if not re.fullmatch(r"\w+:[1-9]\d*(x[1-9]\d*){1,2}", name):
        raise InputError(f"topology {name!r} is not generation:shape, as in v5e:4x4; {known}")
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=name, num_slices=slices
        )
        return list(described.devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"libtpu refuses topology {name!r} ({reason}); {known}") from error
    except RuntimeError as error:
        raise InputError(
            f"compiling for topology {name} needs the TPU compiler: pip install libtpu"
        ) from error


def preset_sizes(topology: str) -> dict[str, int]:
    """The mesh of a common slice, for `make_mesh`: preset_sizes("v5e:4x4") is {"fsdp": 16}.

    Raises:
      InputError: there is none for this slice.
    """
    if topology not in PRESETS:
        raise InputError(
            f"no mesh preset for {topology!r}, only for {', '.join(PRESETS)}; give the mesh's sizes"
        )
    return dict(PRESETS[topology])


def activation_layout(mesh: Mesh, rules: Rules = RULES, *, sum_dtype: str = "float32") -> Layout:
    """The rules that split something on this mesh, for the model's activations.

    Args:
      mesh, rules: as of `param_shardings`.
      sum_dtype: as of `Layout`.

    Raises:
      InputError: a rule names an axis that the mesh lacks.
    """
    targets = {axis: _live(axis, rules, mesh) for axis in rules}
    live = tuple((axis, target) for axis, target in targets.items() if target)
    return Layout(live, sum_dtype)


def param_shardings(axes: Any, shapes: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """How each parameter is laid out.

    Args:
      axes: nested dict of tuples of logical axis names (`model.logical_axes`).
      shapes: the same tree of anything with a shape (`model.abstract_params`).
      mesh: its axes are AXES, or any that the rules name. Axes of size 1 split nothing: they are
        left out of the shardings, and no rule can fail over them.
      rules: logical axis → mesh axis, or several of them, which split it together.

    Returns:
      The same tree of NamedSharding.

    Raises:
      InputError: a rule names an axis that the mesh lacks, splits a size that it doesn't divide,
        or two rules put one mesh axis on two dimensions of one parameter; it names the parameter,
        and the sizes of the mesh that would work for all parameters.
    """
    cuts: list[Cut] = []
    specs = jax.tree_util.tree_map_with_path(
        lambda path, names, array: _spec(_name(path), names, array.shape, mesh, rules, cuts),
        axes,
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    for parameter, axis, size, targets in cuts:
        pieces = math.prod(mesh.shape[target] for target in targets)
        if size % pieces:
            sizes = {target: mesh.shape[target] for target in targets}
            noun = "axis" if len(targets) == 1 else "axes"
            raise InputError(
                f"parameter {parameter}: {axis} {size} does not divide by mesh {noun}"
                f" {_product(sizes)}; {_mend(targets, mesh, cuts)}"
            )
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


# A dimension that is split: parameter and shape, logical axis, size, mesh axes above size 1.
Cut = tuple[str, str, int, tuple[str, ...]]


def _spec(
    name: str,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh: Mesh,
    rules: Rules,
    cuts: list[Cut],
) -> PartitionSpec:
    """One parameter's spec; adds its split dimensions to `cuts`."""
    taken: dict[str, str] = {}
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        targets = _live(axis, rules, mesh) if axis else ()
        for target in targets:
            if target in taken:
                raise InputError(
                    f"parameter {name} {list(shape)}: rules {taken[target]} → {target} and {axis} →"
                    f" {target} collide; split only one of the two, or make mesh.{target} 1"
                )
            taken[target] = str(axis)
        if targets:
            cuts.append((f"{name} {list(shape)}", str(axis), size, targets))
        spec.append(_entry(targets))
    return PartitionSpec(*spec)


def _mend(targets: tuple[str, ...], mesh: Mesh, cuts: list[Cut]) -> str:
    """Which sizes of the mesh axes divide every parameter, the other axes as they are."""
    mends = []
    for target in targets:
        # What `target` has to divide: the sizes that it splits, less what others split of them.
        rest = [
            (size, math.prod(mesh.shape[other] for other in others if other != target))
            for _, _, size, others in cuts
            if target in others
        ]
        fitting = [
            s for s in _divisors(mesh.size) if not any(size % (other * s) for size, other in rest)
        ]
        if fitting:
            mends.append(f"mesh.{target} may be {_either(fitting)}")
    if mends:
        return ", or ".join(mends)
    common = math.gcd(*(size for _, _, size, others in cuts if others == targets))
    return f"make mesh.{' × mesh.'.join(targets)} a divisor of {common}"


def _live(axis: str, rules: Rules, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes of size above 1 that a logical axis is split over."""
    rule = rules.get(axis) or ()
    targets = (rule,) if isinstance(rule, str) else rule
    for target in targets:
        if target not in mesh.shape:
            raise InputError(
                f"rule {axis} → {target}: the mesh has no axis {target}, only"
                f" {', '.join(map(str, mesh.axis_names))}"
            )
    return tuple(target for target in targets if mesh.shape[target] > 1)


def _entry(targets: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return targets if len(targets) > 1 else targets[0] if targets else None


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(part, "key", part)) for part in path)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _product(sizes: Mapping[str, int]) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in sizes.items()) or "of no axis"


def _either(sizes: list[int]) -> str:
    """[1, 2, 4] → "1, 2 or 4"."""
    return " or ".join(filter(None, [", ".join(map(str, sizes[:-1])), str(sizes[-1])]))
