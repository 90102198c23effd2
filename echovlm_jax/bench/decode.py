"""What a decoded token reads of a device's memory, by the compiled program and by a formula."""

from typing import Any

from echovlm_jax.config import preset
from echovlm_jax.plan import Serving, plan
from echovlm_jax.progress import progress
from echovlm_jax.train.config_file import load_config, own_config

# Of a plan, what is told of each number of rows.
_KEYS = (
    "fits", "bytes_per_token", "needed_bytes_per_token", "bytes_ratio", "hbm_per_chip",
    "largest_reads", "compile_seconds",
)  # fmt: skip


def bench_decode(
    topology: str,
    *,
    quantize: str | None = None,
    size: str = "echovlm_11b",
    batches: tuple[int, ...] = (1, 8),
    context: int = 2048,
) -> dict[str, Any]:
    """Compiles a decoding step for a topology and reads what it reads.

    Args:
      topology: such as v5e:1x1. The caller has set libtpu's environment (`mesh.topology_devices`).
      quantize: a kind of `quantize.KINDS`; None leaves weights in bfloat16.
      size: the preset.
      batches: numbers of rows.
      context: slots of a row's cache.

    Returns:
      ratio: read / needed, the largest over the batch sizes, with its ours (bytes read a token, all
      chips) and theirs (`plan.programs.needed_bytes`, a token). what. batches: number of rows →
      fits, bytes_per_token, needed_bytes_per_token, bytes_ratio, hbm_per_chip, largest_reads (bytes
      a chip reads in a step, of what and for what), compile_seconds. `ok` is false where a program
      does not fit.

    Raises:
      InputError: an unknown preset, kind or topology.
    """
    config = load_config(own_config("full_finetune"))
    model = preset(size)
    found: dict[str, dict[str, Any]] = {}
    with progress(len(batches), "program", "bench") as tick:
        for rows in batches:
            serving = Serving(rows=rows, context=context, quantize=quantize)
            result = plan(config, topology, step="decode", model=model, serving=serving)
            found[str(rows)] = {key: result[key] for key in _KEYS if key in result}
            tick(1)
    worst = max(found.values(), key=lambda one: one.get("bytes_ratio", 0.0))
    return {
        "ratio": worst.get("bytes_ratio"),
        "ours": worst.get("bytes_per_token"),
        "theirs": worst.get("needed_bytes_per_token"),
        "what": f"bytes that a decoded token of {size} in {quantize or config.dtype} reads on"
        f" {topology}, by the compiled program, against weights that it needs and the cache of"
        f" {context} tokens",
        "batches": found,
        "ok": all(one["fits"] for one in found.values()),
    }
