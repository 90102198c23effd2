"""A full-size conversion against `cp` of the same bytes on the same disk."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from echovlm_jax.config import ModelConfig, preset, to_hf
from echovlm_jax.convert import folder, safetensors, table
from echovlm_jax.convert.source import INDEX
from echovlm_jax.progress import progress

_BLOCK = 64 * 2**20
_CONVERT = """
import json, sys
from echovlm_jax.convert.from_torch import convert
json.dump(convert(sys.argv[1], sys.argv[2], quantize=sys.argv[3] or None), sys.stdout)
"""
_LOAD = """
import json, sys, time
import jax
from echovlm_jax.convert import folder, load
started = time.monotonic()
params = jax.block_until_ready(load.load_params(sys.argv[1], quantize=sys.argv[2])[1])
held = sum(  # two of int4 share a byte, which nbytes doesn't know
    array.size // 2 if array.dtype.name == "int4" else array.nbytes
    for array in jax.tree.leaves(params)
)
seconds = time.monotonic() - started
beyond = folder.peak_rss_bytes() - held
json.dump({"seconds": seconds, "held_bytes": held, "peak_rss_beyond_bytes": beyond}, sys.stdout)
"""
# Cleared, a bfloat16's exponent is below that of infinity and NaN: few bits can't hold those.
_FINITE = np.uint64(0xBFFF_BFFF_BFFF_BFFF)


def bench_convert(
    workdir: str | os.PathLike[str] | None = None,
    *,
    size: str = "echovlm_11b",
    shard_bytes: int = 4_500_000_000,
    quantize: str | None = None,
    rounds: int = 3,
) -> dict[str, Any]:
    """Makes a checkpoint of random bfloat16 values; copies it with `cp -r` and converts it in turn.

    Both are timed until a `sync` after them has returned, and before each the source is written
    out and dropped from the page cache. They take turns because one run says little: memory that a
    virtual machine hands out for the first time, and a shared disk, make the same `cp` take half or
    twice as long. The conversion runs in a process of its own, whose start and imports count. Needs
    twice the checkpoint's size on the disk of `workdir` (47 GB at full size); everything it makes
    there is deleted again.

    Args:
      workdir: a folder, made if it is not there; by default a temporary one.
      size: the preset whose names and shapes to use.
      shard_bytes: a shard's limit.
      quantize: "int8" or "int4": converted to that. The checkpoint is then also loaded to the host
        in it, in a process of its own.
      rounds: runs of each side.

    Returns:
      ratio (ours / theirs), ours and theirs (seconds; medians), runs (all seconds of each), what,
      bytes, peak_rss_bytes (the largest of a converting process), ours_gb_per_second,
      theirs_gb_per_second. With quantize also `load`:
      seconds, held_bytes of the parameters, and how far the peak of the process is beyond those.

    Raises:
      InputError: an unknown preset, or not enough space.
    """
    slots = table.slots(preset(size))
    total = sum(2 * slot.size for slot in slots.values())
    if workdir is not None:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench_convert_", dir=workdir) as made:
        root = Path(made)
        folder.check_space(root, int(2.02 * total))
        source, copy, converted = (root / name for name in ("source", "copy", "converted"))
        with progress(total, "B", "make") as tick:
            _make_checkpoint(source, preset(size), slots, shard_bytes, tick)
        convert = [sys.executable, "-c", _CONVERT, str(source), str(converted), quantize or ""]
        runs: dict[str, list[float]] = {"ours": [], "theirs": []}
        peak = 0
        for _ in range(rounds):
            runs["theirs"].append(_timed(source, ["cp", "-r", str(source), str(copy)])[0])
            shutil.rmtree(copy)
            seconds, output = _timed(source, convert)
            runs["ours"].append(seconds)
            peak = max(peak, json.loads(output)["peak_rss_bytes"])
            shutil.rmtree(converted)
        ours, theirs = (statistics.median(runs[side]) for side in ("ours", "theirs"))
        loaded = {}
        if quantize:
            command = [sys.executable, "-c", _LOAD, str(source), quantize]
            loaded = {"load": json.loads(_timed(source, command)[1])}
    return {
        "ratio": ours / theirs,
        "ours": ours,
        "theirs": theirs,
        "runs": runs,
        "what": f"convert {total / 1e9:.1f} GB of safetensors to Orbax"
        f"{f' in {quantize}' if quantize else ''}, against cp -r; sync after each, neither from the"
        " page cache",
        "bytes": total,
        "peak_rss_bytes": peak,
        "ours_gb_per_second": total / ours / 1e9,
        "theirs_gb_per_second": total / theirs / 1e9,
        **loaded,
    }


def _timed(source: Path, command: list[str]) -> tuple[float, str]:
    """Seconds that a command and the `sync` after it take, the source not in the page cache."""
    os.sync()
    for path in source.iterdir():
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    started = time.monotonic()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    os.sync()
    return time.monotonic() - started, output


def _make_checkpoint(
    target: Path,
    config: ModelConfig,
    slots: dict[str, table.Slot],
    shard_bytes: int,
    tick: Callable[[int], object],
) -> None:
    """Random values under the released names, in shards with an index."""
    target.mkdir()
    rng = np.random.Generator(np.random.SFC64(0))
    dtype = np.dtype(ml_dtypes.bfloat16)

    def values(name: str) -> Any:
        left = slots[name].size * 2
        while left:
            size = min(left, _BLOCK)
            words = rng.integers(0, 2**64, -(-size // 8), np.uint64) & _FINITE
            yield words.view(np.uint8)[:size]
            tick(size)
            left -= size

    shards: list[list[str]] = [[]]
    used = 0
    for name, slot in slots.items():
        if shards[-1] and used + 2 * slot.size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += 2 * slot.size
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = {name: (slots[name].shape, dtype) for name in names}
        safetensors.write_file(target / file, header, values)
        weight_map |= dict.fromkeys(names, file)
    total = sum(2 * slot.size for slot in slots.values())
    folder.write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    folder.write_json(target / folder.CONFIG, to_hf(config))
