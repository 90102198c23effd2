"""The command that says where launch/ is."""

import argparse
from pathlib import Path
from typing import Any

import echovlm_jax
from echovlm_jax.cli.frame import Result, add_command
from echovlm_jax.errors import InputError


def add_launch(commands: Any) -> None:
    add_command(
        commands,
        "launch",
        lambda args: {"folder": str(launch_folder())},
        "print the folder of the programs that start training on TPU VMs, GKE, SLURM and others; "
        "its README.md says which",
        "echovlm launch",
        show=_show_launch,
    )


def launch_folder() -> Path:
    """launch/, as installed or in a checkout. Raises InputError where it is missing."""
    package = Path(echovlm_jax.__file__).parent
    for folder in (package / "launch", package.parent / "launch"):
        if (folder / "train.py").is_file():
            return folder
    raise InputError(f"{package}: has no launch/ beside it; install the package again")


def _show_launch(result: Result, args: argparse.Namespace) -> None:
    print(result["folder"])
