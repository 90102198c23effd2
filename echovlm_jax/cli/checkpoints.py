"""Commands about checkpoints: convert, export, inspect, parity."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from echovlm_jax.cli.frame import MODEL, Result, add_command


def add_convert(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.convert.from_torch import convert

        return convert(args.src, args.dst, dtype=args.dtype)

    command = add_command(
        commands,
        "convert",
        run,
        "turn a Hugging Face folder into an Orbax checkpoint, streaming; an interrupted conversion "
        "goes on where it stopped",
        "echovlm convert EchoVLM-hf/ echovlm-orbax/ --dtype bfloat16",
    )
    command.add_argument("src", type=Path, metavar="SRC", help="a Hugging Face folder")
    command.add_argument("dst", type=Path, metavar="DST", help="the folder to make")
    command.add_argument("--dtype", metavar="D", help="store as D, e.g. bfloat16; default: as is")


def add_export(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.convert.to_torch import export

        return export(args.model, args.dst, max_shard_size=args.max_shard_size)

    command = add_command(
        commands,
        "export",
        run,
        "turn a checkpoint back into a Hugging Face folder",
        "echovlm export echovlm-orbax/ EchoVLM-hf/ --max-shard-size 5GB",
    )
    command.add_argument("model", type=Path, metavar="MODEL", help=MODEL)
    command.add_argument("dst", type=Path, metavar="DST", help="the folder to make")
    command.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="default: %(default)s"
    )


def add_inspect(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.convert.inspect import inspect

        return inspect(args.model)

    command = add_command(
        commands,
        "inspect",
        run,
        "say what a checkpoint holds, without loading its weights",
        "echovlm inspect EchoVLM-hf/",
    )
    command.add_argument("model", type=Path, metavar="MODEL", help=MODEL)


def add_parity(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.convert.parity import parity

        return parity(args.model, args.golden, atol=args.atol)

    command = add_command(
        commands,
        "parity",
        run,
        "compare a checkpoint, stage by stage, with outputs recorded from PyTorch; "
        "exit code 1 if they differ",
        "echovlm parity echovlm-orbax/ --golden golden.npz --atol 1e-4",
    )
    command.add_argument("model", type=Path, metavar="MODEL", help=MODEL)
    command.add_argument("--golden", type=Path, required=True, metavar="F.npz")
    command.add_argument(
        "--atol", type=float, default=1e-4, metavar="X", help="default: %(default)s"
    )
