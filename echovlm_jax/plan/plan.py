"""`echovlm plan`: compiles a step for a named topology with the real compiler, and reads it."""

import dataclasses
import functools
import math
import re
import time
from typing import Any

import jax

from echovlm_jax.cards import CARDS, card_devices
from echovlm_jax.chips import Chip, Topology, mfu_upper_bound, roofline, topology
from echovlm_jax.config import ModelConfig
from echovlm_jax.data.review import expected_filling
from echovlm_jax.data.settings import Settings
from echovlm_jax.errors import InputError
from echovlm_jax.flops import STEPS, Flops, model_flops
from echovlm_jax.mesh import topology_devices
from echovlm_jax.model.vision import WINDOWS_OR_FRAMES
from echovlm_jax.plan import hlo
from echovlm_jax.plan.goodput import Failures, recommend
from echovlm_jax.plan.hlo_schedule import Rates, scheduled_seconds
from echovlm_jax.plan.hlo_text import parse
from echovlm_jax.plan.kernels import kernel_flops
from echovlm_jax.plan.programs import Planned, Serving, generation, nbytes, training
from echovlm_jax.plan.report import report
from echovlm_jax.train.config_file import check_config
from echovlm_jax.train.program import Config, fingerprint

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
    serving: Serving = Serving(),
    failures: Failures = Failures(),
) -> dict[str, Any]:
    """Compiles one step of a configuration for a topology and says what it needs.

    Memory, collectives and matmul FLOPs are those of the compiled program, its loops counted by
    their turns. Seconds are bounds: each resource at its peak rate, all overlapping; those that
    are scheduled follow the compiler's order (`hlo_schedule`).

    Args:
      config: as the files in configs/ return it.
      topology_name: such as v5e:4x4, h100:8 or h100:4x8 (hosts × cards). The caller has set the
        compiler's environment (`mesh.topology_devices`, `cards.card_devices`).
      step: train; or what generation runs: prefill (one prompt, and into the state of all rows) or
        decode (one token of each row).
      slices: how many of that topology, joined by a slower network; config.mesh.dcn says over
        which axis. What travels between slices, or hosts' cards, counts at that network's rate.
      rows_per_chip: replaces global_batch_size, or serving.rows, by this many rows for each chip.
      model: sizes, where they are not config.model's.
      serving: the sizes of generation.
      failures: how often a host fails, and what was measured of saves and restarts.

    Returns:
      The contract's keys, `ok` (whether it fits) and `report`, a text for people. Of train, where
      it fits, `goodput` (`goodput.recommend`): how often to save. Of decode also
      bytes_per_token, what all chips read by the HLO for one token of one row;
      needed_bytes_per_token (`programs.needed_bytes`); bytes_ratio, of the two; largest_reads.

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
        serving = dataclasses.replace(serving, rows=rows_per_chip * place.chips)
    kind, _, size = topology_name.partition(":")
    if kind in CARDS:
        chip = place.chip
        devices = card_devices(kind, chip.hbm, chip.hbm_rate or 0.0, size, slices)
    else:
        devices = topology_devices(topology_name, slices)
    if step == "train":
        planned = training(config, devices, model)
    else:
        planned = generation(config, devices, model, step, serving)
    useful = model_flops(planned.model, planned.work)
    rows = config.global_batch_size if step == "train" else serving.rows
    result: dict[str, Any] = {
        "topology": topology_name,
        "step": step,
        "slices": slices,
        "chips": place.chips,
        "mesh": {axis: size for axis, size in planned.mesh.shape.items() if size > 1},
        "rows": rows,
        "rows_per_device": rows / place.devices,
        "params": planned.params,
        "trainable_params": planned.trainable,
        "model_flops_per_step": useful.total,
        "model_flops": {term.name: term.forward + term.backward for term in useful.terms},
        "parameter_bytes_per_chip": {
            kind: _by_group(tree, place.chip.devices) for kind, tree in planned.arrays.items()
        },
        "hbm_capacity": place.chip.device_hbm * place.chip.devices,
    }
    if step != "train":
        result |= {"quantize": serving.quantize, "context": serving.context}
    started = time.perf_counter()
    try:
        lowered = planned.lower()
        result["program"] = fingerprint(lowered)
        compiled = planned.compile(lowered)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - started
        result |= _too_large(str(error), seconds, planned.arrays, place.chip.devices)
    else:
        result |= _read(compiled, place, useful, time.perf_counter() - started, planned)
        result |= _without_padding(result["mfu_upper_bound"], useful, config, step)
        if step == "train":
            result["goodput"] = _goodput(result, planned.mesh, config.checkpoint_every, failures)
    return {**result, "ok": result["fits"], "report": report(result)}


def _read(
    compiled: jax.stages.Compiled,
    place: Topology,
    useful: Flops,
    seconds: float,
    planned: Planned,
) -> dict[str, Any]:
    chip, per_chip = place.chip, place.chip.devices
    memory: Any = compiled.memory_analysis()
    text = parse(compiled.as_text() or "")
    where: Any = {"granules": _granules(planned.mesh), "branches": branches(planned.model)}
    module = hlo.read(text, **where)
    frame = planned.work.frame_patches or planned.work.max_patches
    in_kernel = functools.partial(kernel_flops, frame_patches=frame)
    kernels = sum(map(in_kernel, module.custom_calls))
    flops = module.matmul_flops + kernels
    scheduled = {
        name: rates and scheduled_seconds(text, rates, kernel_flops=in_kernel, **where)
        for name, rates in _rates(chip, across=module.network_bytes > 0).items()
    }
    peak = useful.total / place.devices / (chip.flops / per_chip)
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
        "network_bytes_per_chip": module.network_bytes * per_chip,
        "collective_dtypes_per_chip": {
            kind: {dtype: size * per_chip for dtype, size in dtypes.items()}
            for kind, dtypes in module.collective_dtypes.items()
        },
        **_bounds(module, flops, useful.total / place.devices, chip),
        "scheduled_seconds": scheduled,
        "mfu_scheduled": {name: taken and peak / taken for name, taken in scheduled.items()},
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
        **_bytes_per_token(module, place, planned),
    }


def _bounds(module: hlo.Module, flops: float, useful: float, chip: Chip) -> dict[str, Any]:
    """What a device's step takes at least: each resource alone, all that overlap, or none."""
    bound = roofline(
        flops=flops,
        hbm_bytes=module.hbm_bytes,
        collective_bytes=sum(module.collective_bytes.values()),
        chip=chip,
        network_bytes=module.network_bytes,
    )
    serial = bound.compute + (bound.ici or 0.0) + (bound.network or 0.0)
    return {
        "roofline_seconds": {
            "compute": bound.compute,
            "hbm": bound.hbm,
            "ici": bound.ici,
            "network": bound.network if module.network_bytes else 0.0,
        },
        "limit": bound.limit,
        "mfu_upper_bound": mfu_upper_bound(useful, bound, chip),
        "mfu_without_overlap": useful / (chip.flops / chip.devices) / max(serial, bound.hbm or 0.0),
    }


def _rates(chip: Chip, across: bool) -> dict[str, Rates | None]:
    """What a device waits for in its program's order; None where a rate of it is unknown.

    Args:
      across: whether something comes from other slices or hosts.
    """
    peaks = [chip.flops, chip.hbm_rate, chip.ici_rate and chip.ici_rate / 2, chip.network_rate]
    rates = Rates(*(peak / chip.devices if peak else math.inf for peak in peaks))
    linked = None not in (chip.ici_rate, chip.network_rate if across else 0)
    return {
        "products_and_links": rates._replace(memory=math.inf) if linked else None,
        "products_links_and_memory": rates if linked and chip.hbm_rate else None,
    }


def _goodput(
    result: dict[str, Any], mesh: jax.sharding.Mesh, every: int, failures: Failures
) -> dict[str, Any]:
    """How often to save there. Unless it was measured, a step takes the bound without overlap, and
    compiling what it took here."""
    hosts = len({device.process_index for device in mesh.devices.flat})
    groups = result["parameter_bytes_per_chip"].values()
    held = sum(size for group in groups for size in group.values())
    bound = {kind: seconds or 0.0 for kind, seconds in result["roofline_seconds"].items()}
    return recommend(
        failures,
        hosts=hosts,
        host_bytes=held * result["chips"] / hosts,
        chip_bytes=held,
        step=max(bound["compute"] + bound["ici"] + bound["network"], bound["hbm"]),
        compiling=result["compile_seconds"],
        every=every,
    )


def _granules(mesh: jax.sharding.Mesh) -> list[int]:
    """Of each device, the slice that it is in, or of cards the host: what a network joins."""
    what = "slice_index" if mesh.devices.flat[0].platform == "tpu" else "process_index"
    return [getattr(device, what, None) or 0 for device in mesh.devices.flat]


def branches(model: ModelConfig) -> hlo.Branches:
    """How often a program of this model takes each branch of its conditions."""
    windows = sum(model.vision.windowed) / model.vision.depth
    return {WINDOWS_OR_FRAMES: (1 - windows, windows)}


def _bytes_per_token(module: hlo.Module, place: Topology, planned: Planned) -> dict[str, Any]:
    if planned.needed_bytes is None:
        return {}
    read, rows = module.hbm_read * place.devices, planned.work.rows
    return {
        "bytes_per_token": read / rows,
        "needed_bytes_per_token": planned.needed_bytes / rows,
        "bytes_ratio": read / planned.needed_bytes,
        "largest_reads": [
            {"bytes": t.read * t.count, "of": t.shape, "by": t.opcode, "from": t.op_name}
            for t in module.transfers
        ],
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
                "bytes": int(nbytes(shape, leaf.dtype)),
                "shape": f"{leaf.dtype}[{','.join(map(str, shape))}]",
                "from": "/".join(str(getattr(part, "key", part)) for part in path),
                "count": 1,
            }
        )
    return sorted(found, key=lambda buffer: -buffer["bytes"])


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])


def _by_group(tree: Any, devices: int) -> dict[str, int]:
    """Bytes a chip holds of the arrays of a tree, by GROUPS."""
    found = dict.fromkeys(GROUPS, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(str(getattr(part, "key", getattr(part, "name", ""))) for part in path)
        group = next(group for group, pattern in GROUPS.items() if re.search(pattern, name))
        shard = leaf.sharding.shard_shape(leaf.shape)
        found[group] += int(devices * nbytes(shard, leaf.dtype))
    return {group: size for group, size in found.items() if size}
