"""The `echovlm` command: parse, call, print. No logic.

What a command does is a function elsewhere; it is imported when the command runs, so that
`echovlm --help` does not wait for JAX. Exit codes: 0 done, 1 the check that the command makes
failed, 2 bad usage or bad input (one line on standard error), 70 a defect of ours, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from echovlm_jax.errors import InputError

Result = dict[str, Any]
MODEL = "a Hugging Face folder or one made by `convert`; the command finds out which"
LOADING = ("dtype", "num_frames", "crop", "max_pixels")
SAMPLING = {
    "max_new_tokens": (int, "N", "stop after N tokens at the latest"),
    "temperature": (float, "X", "0 takes the likeliest token; higher is more varied"),
    "top_k": (int, "K", "sample among the K likeliest tokens"),
    "top_p": (float, "P", "sample among the likeliest tokens that together reach probability P"),
    "repetition_penalty": (float, "R", "above 1 makes tokens that are already there less likely"),
    "seed": (int, "S", "the same seed gives the same answer"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a terminal's narrow encoding must not end a command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version, or an error that `_Parser` has printed
        return int(stop.code or 0)
    try:
        with _quiet_libraries(args.debug), _stdout_for_json(args.json):
            result = args.run(args)
        _print_json(result) if args.json else args.show(result, args)
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
        line, code = _explain(error)
        print(f"echovlm: {line}", file=sys.stderr)
        return code


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, with an example in every command's help."""
    parser = _Parser(
        prog="echovlm",
        description="EchoVLM in JAX: from ultrasound images to a report.",
        epilog="`echovlm COMMAND --help` shows an example.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_demo, _convert, _export, _inspect, _parity, _generate, _bench):
        add(commands)
    return parser


# Each of these declares one command: its arguments, and the call that it stands for.


def _demo(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.demo import demo

        return demo(args.out)

    command = _command(
        commands, "demo", run, "show the whole way on this machine", "echovlm demo --out demo_out"
    )
    command.add_argument(
        "--out", type=Path, default=Path("demo_out"), metavar="DIR", help="default: %(default)s"
    )


def _convert(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.convert.from_torch import convert

        return convert(args.src, args.dst, dtype=args.dtype)

    command = _command(
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


def _export(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.convert.to_torch import export

        return export(args.model, args.dst, max_shard_size=args.max_shard_size)

    command = _command(
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


def _inspect(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.convert.inspect import inspect

        return inspect(args.model)

    command = _command(
        commands,
        "inspect",
        run,
        "say what a checkpoint holds, without loading its weights",
        "echovlm inspect EchoVLM-hf/",
    )
    command.add_argument("model", type=Path, metavar="MODEL", help=MODEL)


def _parity(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.convert.parity import parity

        return parity(args.model, args.golden, atol=args.atol)

    command = _command(
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


def _generate(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        given = {name: value for name, value in vars(args).items() if value is not None}
        sampling = {name: given[name] for name in SAMPLING if name in given}
        loading = {
            name: given[name]
            for name in ("dtype", "num_frames", "crop", "max_pixels")
            if name in given
        }
        if args.batch:
            if not args.out or args.prompt or args.image or args.system or args.stream:
                raise InputError(
                    "--batch goes with --out and the sampling options; images and prompts are in F"
                )
            from echovlm_jax.generate import generate_file
            from echovlm_jax.load import load_model

            return generate_file(
                load_model(args.model, **loading), args.batch, args.out, **sampling
            )
        if args.prompt is None or args.out:
            raise InputError("give --prompt (and --image), or --batch with --out")
        from echovlm_jax.load import load_model

        if args.stream:
            sampling["stream"] = lambda piece: print(piece, end="", flush=True)
        model = load_model(args.model, **loading)
        return model.generate(args.image, args.prompt, system=args.system, **sampling)

    command = _command(
        commands,
        "generate",
        run,
        "answer a prompt about images; several images make one exam, a multi-frame DICOM is a "
        "video",
        "echovlm generate echovlm-orbax/ --image liver1.png liver2.dcm --prompt 'Write the report.'"
        "\n  echovlm generate echovlm-orbax/ --batch exams.jsonl --out answers.jsonl",
        show=_show_answer,
    )
    command.add_argument("model", type=Path, metavar="MODEL", help=MODEL)
    command.add_argument(
        "--image",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="F",
        help="PNG, JPEG or DICOM files",
    )
    command.add_argument("--prompt", metavar="T", help="what to ask")
    command.add_argument("--system", metavar="T", help="the system prompt")
    command.add_argument("--stream", action="store_true", help="print the answer as it comes")
    command.add_argument(
        "--num-frames", type=int, metavar="N", help="frames to take of a cine loop (default: 16)"
    )
    command.add_argument(
        "--max-pixels", type=int, metavar="N", help="larger images are made this small"
    )
    command.add_argument(
        "--crop",
        action="store_const",
        const=True,
        help="cut DICOM frames to their ultrasound regions",
    )
    command.add_argument(
        "--dtype",
        metavar="D",
        help="compute in float32, bfloat16 or float16; default: as stored, on a CPU float32",
    )
    command.add_argument(
        "--batch", type=Path, metavar="F.jsonl", help='many: a line {"id", "images", "prompt"} each'
    )
    command.add_argument(
        "--out", type=Path, metavar="G.jsonl", help="the batch's answers; goes on where it stopped"
    )
    for name, (kind, metavar, text) in SAMPLING.items():
        command.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text, dest=name
        )


def _bench(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.bench_convert import bench_convert

        return bench_convert(args.dir, size=args.size)

    command = _command(
        commands,
        "bench",
        run,
        "the project's own benchmarks, both sides in one run; convert: our conversion of a made-up "
        "checkpoint against `cp` of the same bytes",
        "echovlm bench convert --size tiny --dir bench_out",
    )
    command.add_argument("what", choices=["convert"])
    command.add_argument(
        "--size", default="echovlm_11b", metavar="PRESET", help="default: %(default)s"
    )
    command.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help="where twice the checkpoint has room (47 GB at full size); default: a temporary one",
    )


# What all commands share.


def _command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], Result],
    what: str,
    example: str,
    show: Callable[[Result, argparse.Namespace], None] | None = None,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=what.split(";")[0],
        description=what[0].upper() + what[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a promise is a whole name; abbreviations break when options are added
    )
    command.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    command.add_argument("--debug", action="store_true", help="show tracebacks and libraries' logs")
    command.set_defaults(run=run, show=show or _show)
    return command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the usage above it."""
        line = " ".join(message.split())
        self.exit(2, f"echovlm: error: {line} (see {self.prog} --help)\n")


def _explain(error: Exception) -> tuple[str, int]:
    """The one line and the exit code for an exception."""
    if isinstance(error, InputError):
        return "error: " + " ".join(str(error).split()), 2
    if isinstance(error, OSError) and error.strerror:
        where = " ".join(f"{error.filename}: ".split()) + " " if error.filename else ""
        return f"error: {where}{error.strerror}", 2
    # A defect of ours. A library's message may quote the file that it read, and that may be a
    # patient's: only the kind of error and the place in our code are shown.
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "echovlm_jax" in f.filename]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    kind = type(error).__name__
    return f"internal error: {kind}{place}; --debug shows the traceback, please report it", 70


def _version() -> str:
    try:
        return version("echovlm-jax")
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "unknown"


@contextlib.contextmanager
def _quiet_libraries(debug: bool) -> Iterator[None]:
    """Keeps warnings and logs of libraries off standard error; they may quote a file's contents."""
    if debug:
        yield
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own log, in C++
    loggers = [logging.getLogger(name) for name in ("jax", "absl", "pydicom", "pylibjpeg")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _stdout_for_json(active: bool) -> Iterator[None]:
    """Sends to standard error whatever a command prints, C++ libraries included."""
    if not active:
        yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _print_json(result: Result) -> None:
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(_plain(result), ensure_ascii=not utf8, allow_nan=False))


def _plain(value: Any) -> Any:
    """`value` in JSON's own types: numpy's scalars and arrays unpacked, paths as text, and null
    for the NaN and infinity that JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _show(result: Result, args: argparse.Namespace) -> None:
    print("\n".join(_lines(result)))


def _show_answer(result: Result, args: argparse.Namespace) -> None:
    """The answer alone on standard output, so that it can be sent to a file."""
    if "text" not in result:
        return _show(result, args)
    print("" if args.stream else result["text"])
    rest = {key: value for key, value in result.items() if key != "text"}
    print("\n".join(_lines(rest)), file=sys.stderr)


def _lines(result: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A result for people: a line a key, deeper ones indented, a list of records a line each."""
    for key, value in result.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{indent}{key}:"
            for record in value:
                cells = (f"{name} {_cell(name, item)}" for name, item in record.items())
                yield f"{indent}  " + "  ".join(cells)
        else:
            yield f"{indent}{key}: {_cell(key, value)}"


def _cell(key: str, value: Any) -> str:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) or "none"
    if isinstance(value, int) and key.endswith("bytes") and value >= 2**20:
        return f"{value:,} ({value / 2**30:.2f} GiB)"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
