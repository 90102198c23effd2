"""A plan as a text for people."""

from collections.abc import Iterator, Mapping
from typing import Any

GIB = 2**30


def report(result: Mapping[str, Any]) -> str:
    """The whole text of what `plan` found."""
    return "\n".join(_lines(result))


def _lines(r: Mapping[str, Any]) -> Iterator[str]:
    mesh = " × ".join(f"{axis} {size}" for axis, size in r["mesh"].items()) or "1"
    slices = f"{r['slices']} slices of " if r["slices"] > 1 else ""
    place = f"{slices}{r['topology']}: {r['chips']} chips"
    yield f"{r['step']} on {place}, mesh {mesh}, {r['rows']} rows"
    yield f"parameters {r['params'] / 1e9:.3f} B; {r['trainable_params'] / 1e9:.3f} B train"
    yield ""
    yield "memory of a chip (GiB; the compiler's)"
    for kind, groups in r["parameter_bytes_per_chip"].items():
        yield f"  {kind:<14}{sum(groups.values()) / GIB:8.2f}   " + ", ".join(
            f"{name} {size / GIB:.2f}" for name, size in groups.items() if size >= GIB / 200
        )
    for kind, size in r["hbm_per_chip"].items():
        if size is not None:
            yield f"  {kind:<14}{size / GIB:8.2f}"
    verdict = "fits" if r["fits"] else "DOES NOT FIT"
    yield f"  {'capacity':<14}{r['hbm_capacity'] / GIB:8.2f}   {verdict}"
    if not r["fits"]:
        yield from _mends(r)
        return
    yield ""
    yield "model FLOPs of a step, by formula"
    total = r["model_flops_per_step"]
    for name, flops in sorted(r["model_flops"].items(), key=lambda item: -item[1]):
        yield f"  {name:<24}{flops:10.3g}  {flops / total:6.1%}"
    executed = r["hlo_flops_per_step"]
    yield f"  {'all':<24}{total:10.3g}"
    kernels = f"{r['kernel_flops_per_step']:.3g} of it in kernels, by their shapes"
    yield f"  {'executed, in the HLO':<24}{executed:10.3g}  ({kernels})"
    yield ""
    yield "received by a chip in a step (GB)"
    for kind, size in r["collective_bytes_per_chip"].items():
        parts = r["collective_dtypes_per_chip"][kind].items()
        each = ", ".join(f"{dtype} {part / 1e9:.2f}" for dtype, part in parts)
        yield f"  {kind:<24}{size / 1e9:8.2f}  ({each})"
    if r["network_bytes_per_chip"]:
        yield f"  {'of it from other hosts':<24}{r['network_bytes_per_chip'] / 1e9:8.2f}"
    if "bytes_per_token" in r:
        yield from _reads(r)
    yield from _speed(r)
    yield from _padding(r)
    yield (
        f"program {r['program']}, compiled in {r['compile_seconds']:.0f} s to"
        f" {r['code_bytes'] / 2**20:.0f} MiB of code"
    )
    if r["unknown_loops"]:
        yield f"loops whose turns are unknown, counted once: {', '.join(r['unknown_loops'])}"
    yield from _saving(r)


def _speed(r: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield "roofline (seconds at peak rates)"
    for kind, seconds in r["roofline_seconds"].items():
        yield f"  {kind:<24}{'unknown' if seconds is None else format(seconds, '8.3f')}"
    scheduled = [
        "unknown" if share is None else f"{share:.1%}" for share in r["mfu_scheduled"].values()
    ]
    yield (
        f"  MFU at most {r['mfu_upper_bound']:.1%} (limit: {r['limit']}; all overlap),"
        f" {r['mfu_without_overlap']:.1%} where the network waits for products"
    )
    yield (
        f"  in the order that the compiler chose: {scheduled[0]} by products and links,"
        f" {scheduled[1]} where each operation also waits for its own bytes"
    )


def _reads(r: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    read, needed = r["bytes_per_token"], r["needed_bytes_per_token"]
    yield (
        f"read for a token of a row, all chips: {read / 1e9:.3f} GB by the HLO; weights that it"
        f" needs and the cache: {needed / 1e9:.3f} GB; {r['bytes_ratio']:.2f} ×"
    )
    yield "largest reads of a step, by a chip (GB)"
    for one in r["largest_reads"][:8]:
        yield f"  {one['bytes'] / 1e9:8.3f}  {one['of']}  {one['from']}"


def _padding(r: Mapping[str, Any]) -> Iterator[str]:
    if r["step"] != "train":
        return
    if r["useful_mfu_upper_bound"] is None:
        yield f"  how much of it is padding is unknown: {r['unread']}"
        return
    full = r["packing_efficiency"]
    yield (
        f"  useful MFU at most {r['useful_mfu_upper_bound']:.1%}: the data fill rows to"
        f" {full['tokens']:.1%} of tokens and {full['patches']:.1%} of patches"
    )


def _saving(r: Mapping[str, Any]) -> Iterator[str]:
    if "goodput" not in r:
        return
    g = r["goodput"]
    now, best = g["configured"], g["checkpoint_every"]
    yield ""
    yield (
        f"saving, where one of {g['hosts']} host{'s' * (g['hosts'] > 1)} fails every"
        f" {g['mtbf_hours']:,.1f} h, each every {g['host_mtbf_hours']:,.0f} h"
    )
    yield (
        f"  checkpoint_every={best}, every {best * g['step_seconds'] / 60:.3g} min: goodput"
        f" {g['expected']:.2%}; {now['checkpoint_every']}, as configured: {now['expected']:.2%}"
    )
    yield (
        f"  a save blocks {g['save_seconds']:.2g} s, is whole {g['write_seconds']:.2g} s later, a"
        f" restart takes {g['restart_seconds']:.0f} s, a step {g['step_seconds']:.3g} s"
    )
    if g["estimated"]:
        yield f"  estimated: {', '.join(g['estimated'])}; an option for each takes a measured one"


def _mends(r: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield "largest buffers (GiB)"
    for buffer in r["largest_buffers"][:10]:
        yield f"  {buffer['bytes'] / GIB:6.2f}  {buffer['shape']}  {buffer['from']}"
    yield ""
    yield "what to change, the cheapest first:"
    if r["step"] == "train":
        yield "  remat=full, where it is not;"
        if r["rows_per_device"] >= 2:
            yield "  grad_accum=2, which computes half of the rows at a time;"
        yield "  a smaller max_patches or seq_len; a larger mesh.fsdp (more chips);"
        yield "  stage=instruction trains the new path and low-rank updates alone"
    else:
        yield "  --quantize int8 or int4; fewer --rows, a smaller --context; more chips"
