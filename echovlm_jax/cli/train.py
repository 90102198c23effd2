"""The command that trains."""

import argparse
import os
from typing import Any

from echovlm_jax.cli.frame import LOCAL, PLACE, SECONDS, Result, add_command, explain
from echovlm_jax.cli.printing import show
from echovlm_jax.errors import InputError
from echovlm_jax.memory import keep_freed_memory

_SHOWN = (
    *("drawn", "dropped", "tasks", "by_organ", "images_shrunk"),
    *("useful_patches", "packing_efficiency"),
)


def add_train(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        keep_freed_memory()
        from echovlm_jax.train.config_file import load_config
        from echovlm_jax.train.loop import train
        from echovlm_jax.train.watch import Watch

        config = load_config(args.config, args.overrides)
        with Watch(_heartbeat(), args.step_timeout, lambda error: explain(error)[1]) as watch:
            return train(
                config,
                args.workdir,
                change_config=args.change_config,
                profile=args.profile,
                watch=watch,
            )

    command = add_command(
        commands,
        "train",
        run,
        "train a configuration; re-run the command to resume. --config.KEY=VALUE changes a key of "
        "the configuration",
        "echovlm train --config configs/alignment.py --workdir run/\n"
        "  echovlm train --config configs/full_finetune.py --workdir run/ --config.model=tiny "
        "--config.steps=20 --config.global_batch_size=1",
        show=_show_train,
        keeps_programs=True,
    )
    command.add_argument(
        "--config", type=LOCAL, required=True, metavar="F.py", help="a file as in configs/"
    )
    command.add_argument(
        "--workdir", type=PLACE, required=True, metavar="DIR", help="the run's folder"
    )
    command.add_argument(
        "--change-config",
        action="store_true",
        help="resume although the folder was begun with another configuration",
    )
    command.add_argument(
        "--profile",
        type=_steps,
        metavar="A:B",
        help="profile steps A to B - 1, for TensorBoard",
    )
    command.add_argument(
        "--step-timeout",
        type=SECONDS,
        default=600.0,
        metavar="SECONDS",
        help="where a step, or the wait for its data, takes so long, and ten times as long as any "
        "step before, name the process that hangs and end all (600; 0: never); the first two "
        "steps, evaluating and saving may take as long as they like",
    )
    command.set_defaults(overrides=[])


def _show_train(result: Result, args: argparse.Namespace) -> None:
    """What the data's table has not shown before the first step."""
    show({key: value for key, value in result.items() if key not in _SHOWN}, args)


def _steps(text: str) -> tuple[int, int]:
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(
            f"must be A:B, two steps, the first before; found {text!r}"
        )
    return int(first), int(end)


def _heartbeat() -> float:
    """What whoever joined the job told JAX; JAX's own default where nobody told."""
    text = os.environ.get("ECHOVLM_HEARTBEAT", "100")
    if not text.isdecimal() or not int(text):
        raise InputError(f"ECHOVLM_HEARTBEAT is {text!r}: must be whole seconds, above 0")
    return float(text)
