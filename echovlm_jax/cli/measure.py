"""Commands that say what something costs: plan and bench."""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echovlm_jax.cli.frame import (
    ABOVE_ZERO,
    LOCAL,
    NAMED,
    PLACE,
    Result,
    add_command,
    no_native_stderr,
)
from echovlm_jax.cli.printing import lines, show, table
from echovlm_jax.errors import InputError
from echovlm_jax.memory import keep_freed_memory

# libtpu reads these when it is loaded: it is here to compile, and no TPU is to be looked for.
COMPILER_ONLY = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


# Sizes of generation, as `plan.programs.Serving` has them.
SERVING = {
    "rows": "answers at one time; default: 1",
    "context": "slots of a row's cache, 512 of them for the answer; default: 2048",
    "patches": "of a prompt's images, four to a token; default: 5120",
}
# How often a host fails and what was measured, as `plan.goodput.Failures` has them.
FAILURES = {
    "host_mtbf_hours": "mean hours between failures of one host; default: 6335, which is Llama 3's "
    "on H100 (419 in 54 days, 2048 hosts): an assumption for other hosts, too long for spot ones",
    "step_seconds": "seconds of a step; default: the bound without overlap",
    "save_seconds": "seconds that a save blocks the loop; default: the state at 8 GB/s a chip",
    "write_seconds": "seconds until a checkpoint is whole after that; default: 1 GB/s a host",
    "restart_seconds": "seconds from a failure to the next step; default: 300, reading the state "
    "at 1 GB/s a host, and compiling as long as here",
}


def _plan(args: argparse.Namespace) -> Result:
    for name, value in COMPILER_ONLY.items():
        os.environ.setdefault(name, value)
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:  # choosing kernels by trying them needs a card
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
    from echovlm_jax.plan import Failures, Serving, plan
    from echovlm_jax.train.config_file import load_config

    names = (*SERVING, "quantize", "cache")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if given and args.step == "train":
        raise InputError(f"--{next(iter(given))} is for --step prefill and decode; leave it out")
    known = {name: value for name in FAILURES if (value := getattr(args, name)) is not None}
    if known and args.step != "train":
        option = next(iter(known)).replace("_", "-")
        raise InputError(f"--{option} is for --step train; leave it out")
    config = load_config(args.config, args.overrides)
    if sys.stderr.isatty():
        print(f"compiling for {args.topology}: about a minute at full size", file=sys.stderr)
    with no_native_stderr(args.debug):
        result = plan(
            config,
            args.topology,
            step=args.step,
            rows_per_chip=args.rows_per_chip,
            slices=args.slices,
            serving=Serving(**given),
            failures=Failures(**known),
        )
    return {k: v for k, v in result.items() if not (args.json and k == "report")}


def add_plan(commands: Any) -> None:
    command = add_command(
        commands,
        "plan",
        _plan,
        "compile a configuration's step for a TPU slice, or NVIDIA cards, that aren't here and say "
        "what it needs; exit code 1 if it does not fit. --config.KEY=VALUE changes a key of the "
        "configuration",
        "echovlm plan --config configs/full_finetune.py --topology v5e:4x4\n"
        "  echovlm plan --config configs/full_finetune.py --topology v5p:4x4x8 --rows-per-chip 2 "
        "--config.remat=full\n"
        "  echovlm plan --config configs/full_finetune.py --topology v5e:1x1 --step decode "
        "--quantize int4",
        show=lambda result, args: print(result["report"]),
    )
    command.add_argument(
        "--config", type=LOCAL, required=True, metavar="F.py", help="a file as in configs/"
    )
    command.add_argument(
        "--topology",
        required=True,
        metavar="T",
        help="generation:shape, e.g. v5e:4x4; or cards, h100:8, or hosts × cards, h100:4x8",
    )
    command.add_argument(
        "--slices",
        type=_positive,
        default=1,
        metavar="N",
        help="so many of this topology, such as with --config.mesh.dcn.data=N",
    )
    command.add_argument(
        "--step",
        default="train",
        choices=["train", "prefill", "decode"],
        help="default: %(default)s",
    )
    command.add_argument(
        "--rows-per-chip",
        type=_positive,
        metavar="N",
        help="in place of the configuration's global_batch_size",
    )
    _add_serving(command)
    saving = command.add_argument_group("of --step train: how often to save, and what it gives")
    for name, text in FAILURES.items():
        option = f"--{name.replace('_', '-')}"
        saving.add_argument(option, type=ABOVE_ZERO, metavar="X", help=text)
    command.set_defaults(overrides=[])


def _add_serving(command: argparse.ArgumentParser) -> None:
    sizes = command.add_argument_group("of --step prefill and decode")
    for name, text in SERVING.items():
        sizes.add_argument(f"--{name}", type=_positive, metavar="N", help=text)
    sizes.add_argument(
        "--quantize", metavar="K", help="weights in int8 or int4; default: the compute dtype"
    )
    sizes.add_argument(
        "--cache", choices=["int8"], help="keys and values in int8; default: the compute dtype"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, found {text!r}")
    return int(text)


# What `bench` can do with --what, and where it keeps the runs of phantom.
_WORKS = {"cpu": ("train", "generate"), "phantom": ("mixture", "imbalance")}
_PHANTOM = Path("bench_out/phantom")
_WHAT = ("burned-in", "convert", "cpu", "data", "decode", "moe", "phantom", "quantize")


def _bench(args: argparse.Namespace) -> Result:
    _check_options(args)
    if args.what == "burned-in":
        from echovlm_jax.bench.burned_in import bench_burned_in

        return bench_burned_in()
    if args.what == "data":
        from echovlm_jax.bench.data import bench_data

        return bench_data(args.dir)
    if args.what == "cpu" and args.work == "generate":
        from echovlm_jax.bench.cpu.generation import bench_generate

        return bench_generate(size=args.size)
    if args.what == "cpu":
        from echovlm_jax.bench.cpu.train import bench_train

        return bench_train(size=args.size)
    if args.what == "phantom":
        keep_freed_memory()
        from echovlm_jax.bench.phantom import bench_phantom

        return bench_phantom(args.work or "mixture", args.dir or _PHANTOM)
    if args.what == "quantize":
        from echovlm_jax.bench.quantize import bench_quantize

        if args.model is None:
            raise InputError(
                "`bench quantize` compares a model with itself: give --model, a folder"
            )
        return bench_quantize(args.model, data=args.data or "phantom")
    size = args.size or "echovlm_11b"
    if args.what == "decode":
        return _bench_decode(args, size)
    if args.what == "moe":
        from echovlm_jax.bench.moe import bench_moe

        with no_native_stderr(args.debug):
            return bench_moe(size=size)
    from echovlm_jax.bench.convert import bench_convert

    return bench_convert(args.dir, size=size, quantize=args.quantize)


def _bench_decode(args: argparse.Namespace, size: str) -> Result:
    if args.topology is None:
        raise InputError("`bench decode` compiles for a TPU: give --topology, such as v5e:1x1")
    for name, value in COMPILER_ONLY.items():
        os.environ.setdefault(name, value)
    from echovlm_jax.bench.decode import bench_decode

    with no_native_stderr(args.debug):
        return bench_decode(args.topology, quantize=args.quantize, size=size)


def add_bench(commands: Any) -> None:
    command = add_command(
        commands,
        "bench",
        _bench,
        "the project's own benchmarks, both sides in one run; convert: our conversion of a made-up "
        "checkpoint against `cp` of the same bytes; cpu: a training step of a scaled model in "
        "float32 on 2 threads against PyTorch's, or an answer against Hugging Face's generate; "
        "moe: the default expert dispatch against the others, their extra work counted and their "
        "time taken; data: images a second through make_batches against a PyTorch DataLoader with "
        "Hugging Face's processor; decode: bytes that a decoded token reads on a TPU slice that "
        "isn't here, against those it needs; quantize: a model's next tokens with weights in few "
        "bits, against its own; burned-in: text drawn into synthetic exams, found by OCR; phantom: "
        "what the mixture of experts, or rebalancing organs, is worth on synthetic exams, trained "
        "and evaluated with three seeds, half an hour or more; re-run it to resume",
        "echovlm bench convert --size tiny --dir bench_out\n"
        "  echovlm bench convert --quantize int4\n  echovlm bench cpu --what train\n"
        "  echovlm bench cpu --what generate\n"
        "  echovlm bench decode --topology v5e:1x1 --quantize int8\n"
        "  echovlm bench quantize --model run/ --data exams/\n"
        "  echovlm bench moe --size tiny\n  echovlm bench data\n  echovlm bench burned-in\n"
        "  echovlm bench phantom --what imbalance --dir study/",
        show=_show_bench,
    )
    command.add_argument("what", choices=_WHAT)
    command.add_argument(
        "--what",
        dest="work",
        choices=[what for works in _WORKS.values() for what in works],
        help="of cpu: what is timed, train (the default) or generate; of phantom: mixture (the "
        "default) or imbalance",
    )
    command.add_argument(
        "--size",
        metavar="PRESET",
        help="of convert, decode and moe, default: echovlm_11b; of cpu, default: 147 M parameters "
        "in the released model's proportions",
    )
    command.add_argument(
        "--dir",
        type=LOCAL,
        metavar="DIR",
        help="of convert, where twice the checkpoint has room (47 GB at full size), and of data "
        f"(100 MB); default: a temporary one; of phantom, where it is kept; default: {_PHANTOM}",
    )
    command.add_argument("--model", type=PLACE, metavar="MODEL", help="of quantize: a model folder")
    command.add_argument(
        "--data",
        type=NAMED,
        metavar="DIR",
        help="of quantize: a dataset's folder; default: phantom",
    )
    command.add_argument("--topology", metavar="T", help="of decode: generation:shape, as in plan")
    command.add_argument(
        "--quantize",
        metavar="K",
        help="of convert and decode: weights in int8 or int4; default: bfloat16",
    )


def _check_options(args: argparse.Namespace) -> None:
    """Refuses an option that the benchmark would not read."""
    for option, value, readers in (
        ("--size", args.size, ("convert", "cpu", "decode", "moe")),
        ("--topology", args.topology, ("decode",)),
        ("--quantize", args.quantize, ("convert", "decode")),
        ("--model", args.model, ("quantize",)),
        ("--data", args.data, ("quantize",)),
        ("--dir", args.dir, ("convert", "data", "phantom")),
        ("--what", args.work, tuple(_WORKS)),
    ):
        if value is not None and args.what not in readers:
            names = " and ".join(f"`bench {reader}`" for reader in readers)
            raise InputError(f"{option} is for {names}; leave it out")
    if args.work is not None and args.work not in _WORKS[args.what]:
        raise InputError(
            f"--what {args.work} is not of `bench {args.what}`; choose of"
            f" {', '.join(_WORKS[args.what])}"
        )


def _show_bench(result: Result, args: argparse.Namespace) -> None:
    if args.what == "phantom":
        rows = [_difference(row, result) for row in result["rows"]]
        print("\n".join(table(rows)), end="\n\n")
        print("\n".join(lines({key: value for key, value in result.items() if key != "rows"})))
        return
    if "batches" in result:
        return _show_decode(result)
    if args.what == "quantize":
        rows = [{"kind": kind, **found} for kind, found in result["kinds"].items()]
        print("\n".join(table(rows)), end="\n\n")
        print("\n".join(lines({key: value for key, value in result.items() if key != "kinds"})))
        return
    if "dispatch" not in result:
        return show(result, args)
    shares = ("extra", "extra_with_tiles")
    rows = [{k: f"{v:.2%}" if k in shares else v for k, v in r.items()} for r in result["dispatch"]]
    print("\n".join(table(rows)))
    print("\n".join(lines({key: value for key, value in result.items() if key != "dispatch"})))


def _show_decode(result: Result) -> None:
    print(result["what"])
    for rows, found in result["batches"].items():
        if not found["fits"]:
            print(f"\n{rows} rows: does not fit")
            continue
        read, needed = found["bytes_per_token"], found["needed_bytes_per_token"]
        print(
            f"\n{rows} rows: read {read / 1e9:.3f} GB a token, needed {needed / 1e9:.3f} GB:"
            f" {found['bytes_ratio']:.3f}; most of it by"
        )
        for one in found["largest_reads"][:12]:
            print(f"  {one['bytes'] / 1e9:8.3f} GB a step and chip  {one['of']}  {one['from']}")


def _difference(row: Mapping[str, Any], result: Result) -> dict[str, str]:
    low, high = row["interval"]
    return {
        "": f"{row['metric']}, {row['of']}",
        result["before"]: f"{row['before']:.1f}",
        result["after"]: f"{row['after']:.1f}",
        "difference": f"{row['difference']:+.1f}",
        "95 % interval": f"{low:+.1f} to {high:+.1f}",
        "by seed": ", ".join(f"{value:+.1f}" for value in row["by_seed"]),
    }
