"""`echovlm demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from echovlm_jax.cli.frame import Result, add_command


def add_demo(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.demo import demo

        return demo(args.out)

    command = add_command(
        commands, "demo", run, "show the whole way on this machine", "echovlm demo --out demo_out"
    )
    command.add_argument(
        "--out", type=Path, default=Path("demo_out"), metavar="DIR", help="default: %(default)s"
    )
