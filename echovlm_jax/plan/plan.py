"""`echovlm plan`: compiles a step for a named topology with the real compiler, and reads it."""

import functools
import math
import re
import time
from typing import Any

import jax

from echovlm_jax.chips import mfu_upper_bound, roofline, topology
from echovlm_jax.config import ModelConfig, preset
from echovlm_jax.data.review import expected_filling
from echovlm_jax.data.settings import Settings
from echovlm_jax.errors import InputError
from echovlm_jax.flops import STEPS, Flops, Work, model_flops
from echovlm_jax.generate.decode import lower_decode, lower_prefill
from echovlm_jax.mesh import topology_devices
from echovlm_jax.model import param_specs
from echovlm_jax.plan import hlo
from echovlm_jax.plan.kernels import kernel_flops
from echovlm_jax.plan.report import report
from echovlm_jax.train.config_file import check_config
from echovlm_jax.train.program import (
    Config,
    cast,
    check_patches,
    config_mesh,
    make_program,
    placed,
)
from echovlm_jax.train.stages import count

# A program whose gathers and scatters run on a SparseCore (v5p) is one that libtpu 0.0.52 can't
# print.
# until: libtpu 0.1
PRINTABLE: dict[str, Any] = {
    "xla_tpu_offload_gather_to_sparsecore": "false",
    "xla_tpu_enable_offloading_gather_to_sparsecore": "false",
    "xla_tpu_enable_offloading_scatter_to_sparsecore": "false",
}
GROUPS = {  # of parameters, by the first expression that finds something in a path
    "vision": r"(^|/)vision/",
    "embedding": r"/embed/|/lm_head/",
    "experts": r"/moe/experts/",
    "shared expert": r"/moe/",
    "mlp": r"/mlp/",
    "attention": r"/attn/",
    "norms, coefficients": "",
}


def plan(
    config: Config,
    topology_name: str,
    *,
    step: str = "train",
    rows_per_chip: int | None = None,
    slices: int = 1,
    model: ModelConfig | None = None,
) -> dict[str, Any]:
    """Compiles one step of a configuration for a topology and says what it needs.

    Memory, collectives and matmul FLOPs are those of the compiled program, its loops counted by
    their turns. Seconds are bounds: each resource at its peak rate, all overlapping.

    Args:
      config: as the files in configs/ return it.
      topology_name: such as v5e:4x4. The caller has set libtpu's environment
        (`mesh.topology_devices`).
      step: train, prefill (a prompt of seq_len) or decode (one token after it).
      slices: how many of that topology, joined by a slower network; config.mesh.dcn says over
        which axis. What travels between slices is counted, at the rate of a slice's own network.
      rows_per_chip: replaces global_batch_size by this many rows for each chip.
      model: sizes, where they are not config.model's.

    Returns:
      The contract's keys, `ok` (whether it fits) and `report`, a text for people.

    Raises:
      InputError: a value that the configuration or the topology can't have.
    """
    if step not in STEPS:
        raise InputError(f"step {step!r} is unknown; choose one of {', '.join(STEPS)}")
    place = topology(topology_name, slices)
    config = config.copy_and_resolve_references()
    check_config(config)
    if rows_per_chip is not None:
        config.global_batch_size = rows_per_chip * place.chips
    devices = topology_devices(topology_name, slices)
    if step == "train":
        program = make_program(config, devices, model)
        model, mesh, compiling = (
            program.model,
            program.mesh,
            functools.partial(program.compile, PRINTABLE),
        )
        arrays = {"parameters": (program.state.trainable, program.state.frozen)}
        arrays["optimizer"] = program.state.opt_state
        trainable = count(program.state.trainable)
        params = count(program.state.frozen) + count(program.state.trainable["params"])
        trains, rank = program.how, config.lora.rank
    else:
        program, trains, rank, trainable = None, None, 0, 0
        model = preset(config.model) if model is None else model
        check_patches(model, config.max_patches)
        mesh = config_mesh(config, devices)
        shapes = _served(model, config, mesh)
        arrays, params = {"parameters": shapes}, count(shapes)
        lower = lower_prefill if step == "prefill" else lower_decode

        def compiling() -> jax.stages.Compiled:
            return lower(
                model,
                shapes,
                rows=config.global_batch_size,
                prompt=config.seq_len,
                patches=config.max_patches,
                dtype=config.dtype,
            ).compile(dict(PRINTABLE))

    work = Work(
        rows=config.global_batch_size,
        seq_len=config.seq_len,
        max_patches=config.max_patches,
        frame_patches=min(config.max_image_patches, config.max_patches) or None,
        step=step,
        trains=trains,
        lora_rank=rank,
    )
    useful = model_flops(model, work)
    result: dict[str, Any] = {
        "topology": topology_name,
        "step": step,
        "slices": slices,
        "chips": place.chips,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "rows": config.global_batch_size,
        "rows_per_device": config.global_batch_size / place.devices,
        "params": params,
        "trainable_params": trainable,
        "model_flops_per_step": useful.total,
        "model_flops": {term.name: term.forward + term.backward for term in useful.terms},
        "parameter_bytes_per_chip": {
            kind: _by_group(tree, place.chip.devices) for kind, tree in arrays.items()
        },
        "hbm_capacity": place.chip.device_hbm * place.chip.devices,
    }
    started = time.perf_counter()
    try:
        compiled = compiling()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        result |= _too_large(str(error), time.perf_counter() - started, arrays, place.chip.devices)
    else:
        seconds = time.perf_counter() - started
        result |= _read(compiled, place, useful, seconds, config)
        result |= _without_padding(result["mfu_upper_bound"], useful, config, step)
    return {**result, "ok": result["fits"], "report": report(result)}


def _read(
    compiled: jax.stages.Compiled, place: Any, useful: Flops, seconds: float, config: Config
) -> dict[str, Any]:
    chip, per_chip = place.chip, place.chip.devices
    memory: Any = compiled.memory_analysis()
    module = hlo.read(compiled.as_text() or "")
    kernels = sum(kernel_flops(call, config.max_image_patches) for call in module.custom_calls)
    flops = module.matmul_flops + kernels
    wire = sum(module.collective_bytes.values())
    bound = roofline(flops=flops, hbm_bytes=module.hbm_bytes, collective_bytes=wire, chip=chip)
    share = useful.total / place.devices
    serial = bound.compute + (bound.ici or 0.0)
    return {
        "hbm_per_chip": {
            "arguments": memory.argument_size_in_bytes * per_chip,
            "temporaries": memory.temp_size_in_bytes * per_chip,
            "outputs": memory.output_size_in_bytes * per_chip,
            "aliased": memory.alias_size_in_bytes * per_chip,
            "peak": memory.peak_memory_in_bytes * per_chip,
        },
        "fits": memory.peak_memory_in_bytes <= chip.device_hbm,
        "hlo_flops_per_step": flops * place.devices,
        "kernel_flops_per_step": kernels * place.devices,
        "collective_bytes_per_chip": {
            kind: size * per_chip for kind, size in module.collective_bytes.items()
        },
        "collective_dtypes_per_chip": {
            kind: {dtype: size * per_chip for dtype, size in dtypes.items()}
            for kind, dtypes in module.collective_dtypes.items()
        },
        "roofline_seconds": {
            "compute": bound.compute,
            "hbm": bound.hbm,
            "ici": bound.ici,
        },
        "limit": bound.limit,
        "mfu_upper_bound": mfu_upper_bound(share, bound, chip),
        "mfu_without_overlap": share / (chip.flops / per_chip) / max(serial, bound.hbm or 0.0),
        "compile_seconds": seconds,
        "code_bytes": memory.generated_code_size_in_bytes,
        "largest_buffers": [
            {
                "bytes": b.shape.padded_bytes,
                "shape": f"{b.shape.dtype}[{','.join(map(str, b.shape.dims))}]",
                "from": b.op_name,
                "count": b.count,
            }
            for b in module.buffers
        ],
        "unknown_loops": list(module.unknown_loops),
    }


def _without_padding(bound: float, counted: Flops, config: Config, step: str) -> dict[str, Any]:
    """What of the MFU is useful work, where rows are as full as the configuration's data fills
    them. A prompt has no padding. Unknown, with the reason, where the data can't be read here."""
    if step != "train":
        return {"useful_mfu_upper_bound": bound}
    try:
        share = expected_filling(Settings.from_config({**config.to_dict(), "data_workers": 0}))
    except InputError as error:
        return {"useful_mfu_upper_bound": None, "packing_efficiency": None, "unread": str(error)}
    useful = counted.used(**share) / counted.total
    return {"useful_mfu_upper_bound": bound * useful, "packing_efficiency": share}


# XLA:TPU's refusals: "Used 17.31G of 15.75G hbm" and its largest allocations, one a paragraph; or,
# where far too much is asked for, one sentence.
_USED = re.compile(
    r"Used ([\d.]+)([KMG]?) of [\d.]+[KMG]? hbm|\(([\d.]+)([KMG]?)\) exceeds available HBM"
)
_ALLOCATION = re.compile(
    r"Size: ([\d.]+)([KMG]?)(?:.*\n)*?"
    r"(?:\s*Operator: op_name=\"(.*?)\"(?:.*\n)*?)?\s*Shape: (\S+?)\{"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def _too_large(message: str, seconds: float, arrays: Any, devices: int = 1) -> dict[str, Any]:
    """What the compiler says of a program that doesn't fit, and else what is known without it."""
    used = _USED.search(message)
    buffers = [
        {"bytes": _bytes(size, unit), "shape": shape, "from": source or "", "count": 1}
        for size, unit, source, shape in _ALLOCATION.findall(message)
    ]
    return {
        "hbm_per_chip": {
            "peak": _bytes(used[1] or used[3], used[2] or used[4]) * devices if used else None
        },
        "fits": False,
        "compile_seconds": seconds,
        "largest_buffers": (buffers or _largest_arguments(arrays))[:20],
        "error": message.partition("\n")[0],
    }


def _largest_arguments(arrays: Any) -> list[dict[str, Any]]:
    """The arguments of the program, the largest first: bytes of one device's part."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        shape = leaf.sharding.shard_shape(leaf.shape)
        found.append(
            {
                "bytes": _nbytes(leaf),
                "shape": f"{leaf.dtype}[{','.join(map(str, shape))}]",
                "from": "/".join(str(getattr(part, "key", part)) for part in path),
                "count": 1,
            }
        )
    return sorted(found, key=lambda buffer: -buffer["bytes"])


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])


def _served(model: ModelConfig, config: Config, mesh: Any) -> Any:
    """Parameters as generation holds them: all in the compute dtype."""
    return cast(placed(param_specs(model), mesh), jax.numpy.dtype(config.dtype))


def _by_group(tree: Any, devices: int) -> dict[str, int]:
    """Bytes a chip holds of the arrays of a tree, by GROUPS."""
    found = dict.fromkeys(GROUPS, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(str(getattr(part, "key", getattr(part, "name", ""))) for part in path)
        group = next(group for group, pattern in GROUPS.items() if re.search(pattern, name))
        found[group] += _nbytes(leaf) * devices
    return {group: size for group, size in found.items() if size}


def _nbytes(leaf: Any) -> int:
    """Of one device's part of an array; a chip packs two values of int4 into a byte."""
    bits = 4 if leaf.dtype == jax.numpy.int4 else 8 * leaf.dtype.itemsize
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * bits // 8
