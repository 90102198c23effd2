"""What all commands share: how one is declared, how it fails, and what is kept off the terminal."""

import argparse
import contextlib
import importlib.util
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any, NoReturn

from echovlm_jax.cli.compiled import KEPT
from echovlm_jax.cli.printing import show as show_lines
from echovlm_jax.errors import InputError
from echovlm_jax.storage.bucket import SCHEMES
from echovlm_jax.storage.files import as_path, in_bucket, local_path

Result = dict[str, Any]
OVERRIDE = "--config."  # begins a word that changes one key of a configuration
MODEL = "a Hugging Face folder or one made by `convert`; the command finds out which"


def _door(check: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argument's type: what it can't be is said before anything is read or written."""

    def convert(text: str) -> Any:
        try:
            return check(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


# Every argument that is a path has one of these types.
PLACE = _door(as_path)  # here or in a bucket
LOCAL = _door(local_path)
NAMED = _door(lambda text: str(local_path(text)))  # a path, or a word that stands for something


def _number(holds: Callable[[float], bool], must: str) -> Callable[[str], float]:
    """The type of an argument that is a finite number."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and holds(value)):
            raise argparse.ArgumentTypeError(f"must be {must}, found {text!r}")
        return value

    return convert


ABOVE_ZERO = _number(lambda value: value > 0, "a number above 0")
SECONDS = _number(lambda value: value >= 0, "a number of seconds, or 0")


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], Result],
    what: str,
    example: str,
    show: Callable[[Result, argparse.Namespace], None] | None = None,
    keeps_programs: bool = False,
) -> argparse.ArgumentParser:
    """Declares a command.

    Args:
      commands: argparse's subparsers.
      name: the command's name.
      run: does the work and returns what to print; `ok` false in it makes the exit code 1.
      what: its help; what is before the first semicolon stands in the list of commands.
      example: a line that works, or several.
      show: prints a result for people; all its keys by default.
      keeps_programs: whether what it compiles is kept for the next run (`compiled.keep_programs`).

    Returns:
      Its parser, to add arguments to.
    """
    command = commands.add_parser(
        name,
        help=what.split(";")[0],
        description=what[0].upper() + what[1:] + ".",
        epilog=f"example:\n  {example}" + (f"\n\n{KEPT}" if keeps_programs else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a promise is a whole name; abbreviations break when options are added
    )
    command.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    command.add_argument("--debug", action="store_true", help="show tracebacks and libraries' logs")
    command.set_defaults(run=run, show=show or show_lines, keeps_programs=keeps_programs)
    return command


def add_allow_links(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--allow-links",
        type=LOCAL,
        metavar="ROOT",
        help="take images that are links to files inside ROOT, as in a cache of downloads: the "
        "folder above its snapshots/ and blobs/; default: links stay inside the images' folder",
    )


def add_crop(command: argparse.ArgumentParser, require: str) -> None:
    """--crop, and --crop=require: two options, for a value that may be left out would take the
    word after it."""
    command.add_argument(
        "--crop",
        action="store_const",
        const=True,
        help="cut DICOM frames to their ultrasound regions; what can't be cut is counted",
    )
    command.add_argument(
        "--crop=require",
        dest="crop",
        action="store_const",
        const="require",
        help=f"the same, and {require}",
    )


def add_quantize(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--quantize",
        metavar="KIND",
        help="hold the decoder's products, embedding and head in int8 or int4, rounded while they "
        "are read; w8a8: int8, and activations too; default: as stored",
    )


class Parser(argparse.ArgumentParser):
    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's, and `--config.KEY=VALUE` where a command takes overrides."""
        parsed, rest = self.parse_known_args(args, namespace)
        if hasattr(parsed, "overrides"):
            parsed.overrides, rest = _overrides(rest)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the usage above it."""
        line = " ".join(message.split())
        self.exit(2, f"echovlm: error: {line} (see {self.prog} --help)\n")


def _overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(`KEY=VALUE` of every override, the other words), from what argparse did not know."""
    found, others, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith(OVERRIDE):
            others.append(word)
        elif "=" in word or not rest or rest[0].startswith("--"):
            found.append(word.removeprefix(OVERRIDE))
        else:
            found.append(f"{word.removeprefix(OVERRIDE)}={rest.pop(0)}")
    return found, others


def explain(error: Exception) -> tuple[str, int]:
    """The one line and the exit code for an exception."""
    if isinstance(error, InputError):
        return "error: " + " ".join(str(error).split()), 2
    if isinstance(error, OSError) and error.strerror:
        from echovlm_jax.data.disk import full_disk  # here: it takes a second to import

        where = " ".join(f"{error.filename}: ".split()) + " " if error.filename else ""
        return f"error: {where}{full_disk(error) or error.strerror}", 2
    # A defect of ours. A library's message may quote the file that it read, and that may be a
    # patient's: only the kind of error and the place in our code are shown.
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "echovlm_jax" in f.filename]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    kind = type(error).__name__
    return f"internal error: {kind}{place}; --debug shows the traceback, please report it", 70


def version_text() -> str:
    try:
        return version("echovlm-jax")
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "unknown"


def look_for_no_tpu() -> None:
    """Tells JAX to compute on the CPU where libtpu is installed and there is nothing else.

    JAX would load libtpu, which writes lines of errors where it finds no TPU. Where a device or the
    environment speaks of one, or another accelerator may be there, nothing is changed, and what
    libtpu says is seen.
    """
    if (
        not any(os.environ.get(name) for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"))
        and not any(
            name.startswith(("TPU_", "JAX_FORCE_TPU", "CLOUD_TPU"))
            # These are set to have less of libtpu's noise, and speak of no TPU.
            and not name.endswith(("_SKIP_MDS_QUERY", "_LOG_LEVEL"))
            for name in os.environ
        )
        and importlib.util.find_spec("libtpu") is not None
        and importlib.util.find_spec("jax_plugins") is None
        and not entry_points(group="jax_plugins")
        and not has_tpu()
    ):
        # until: jax 0.13
        os.environ["JAX_PLATFORMS"] = "cpu"


def has_tpu(root: Path = Path("/")) -> bool:
    """Whether this machine has what may be a TPU: a device file of one, or a PCI device of Google's
    that is neither a network card nor a disk, which its other machines have as well."""
    if any(root.glob("dev/accel*")) or any(root.glob("dev/vfio/[0-9]*")):
        return True
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        try:
            kind = vendor.with_name("class").read_text()
            if vendor.read_text().strip() == "0x1ae0" and not kind.startswith(("0x01", "0x02")):
                return True
        except OSError:  # a device that can't be read may be one
            return True
    return False


@contextlib.contextmanager
def quiet_libraries(debug: bool) -> Iterator[None]:
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
def no_native_stderr(debug: bool) -> Iterator[None]:
    """Drops what C++ libraries write to standard error; what Python writes still comes."""
    if debug:
        yield
        return
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    own = os.fdopen(saved, "w", buffering=1, errors="backslashreplace", closefd=False)
    try:
        # A test may have put something else in stderr's place.
        with contextlib.redirect_stderr(own if sys.stderr is sys.__stderr__ else sys.stderr):
            yield
    finally:
        own.flush()
        os.dup2(saved, 2)
        os.close(saved)


def reach_buckets(args: argparse.Namespace) -> None:
    """Asks each bucket that a command names once, so that one which does not answer, or refuses,
    is told before any work. TensorStore's own log would tell of every place without credentials.

    Raises:
      OSError: a bucket does not answer or refuses.
    """
    words = [word.partition("=")[2] for word in getattr(args, "overrides", ())]
    places = [as_path(word) for word in words if word.startswith(SCHEMES)]
    places += filter(in_bucket, vars(args).values())
    with no_native_stderr(args.debug or not places):
        for place in places:
            place.is_file()


@contextlib.contextmanager
def stdout_for_json(active: bool) -> Iterator[None]:
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
