"""The `echovlm` command: parse, call, print. No logic.

What a command does is a function elsewhere; it is imported when the command runs, so that
`echovlm --help` does not wait for JAX. Exit codes: 0 done, 1 the check that the command makes
failed, 2 bad usage or bad input (one line on standard error), 70 a defect of ours, 130 interrupted.
"""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence

from echovlm_jax.cli import checkpoints, data, demo, evaluate, generate, launch, measure, train, web
from echovlm_jax.cli.compiled import keep_programs
from echovlm_jax.cli.frame import (
    Parser,
    explain,
    look_for_no_tpu,
    quiet_libraries,
    reach_buckets,
    stdout_for_json,
    version_text,
)
from echovlm_jax.cli.printing import print_json


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a terminal's narrow encoding must not end a command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version, or an error that `Parser` has printed
        return int(stop.code or 0)
    try:
        look_for_no_tpu()
        if args.keeps_programs:
            keep_programs(args.debug)
        with quiet_libraries(args.debug), stdout_for_json(args.json):
            reach_buckets(args)
            result = args.run(args)
        print_json(result) if args.json else args.show(result, args)
        sys.stdout.flush()
        return 0 if result.get("ok", True) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        line, code = explain(error)
        print(f"echovlm: {line}", file=sys.stderr)
        return code


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, with an example in every command's help."""
    parser = Parser(
        prog="echovlm",
        description="EchoVLM in JAX: from ultrasound images to a report.",
        epilog="`echovlm COMMAND --help` shows an example.",
    )
    parser.add_argument("--version", action="version", version=version_text())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        *(demo.add_demo, checkpoints.add_convert, checkpoints.add_export, checkpoints.add_upcycle),
        *(checkpoints.add_inspect, checkpoints.add_verify, checkpoints.add_parity, data.add_data),
        *(measure.add_plan, train.add_train, generate.add_generate, evaluate.add_eval),
        *(evaluate.add_score, evaluate.add_compare, web.add_web, measure.add_bench),
        launch.add_launch,
    ):
        add(commands)
    return parser
