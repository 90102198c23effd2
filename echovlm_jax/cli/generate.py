"""`echovlm generate`: one answer, or a file of them."""

import argparse
import sys
from typing import Any

from echovlm_jax.cli.frame import (
    LOCAL,
    MODEL,
    PLACE,
    Result,
    add_allow_links,
    add_command,
    add_crop,
    add_quantize,
)
from echovlm_jax.cli.printing import lines, show
from echovlm_jax.errors import InputError

LOADING = ("dtype", "quantize", "num_frames", "crop", "max_pixels", "control_tokens")
SAMPLING = {
    "max_new_tokens": (int, "N", "stop after N tokens at the latest"),
    "temperature": (float, "X", "0 takes the likeliest token; higher is more varied"),
    "top_k": (int, "K", "sample among the K likeliest tokens"),
    "top_p": (float, "P", "sample among the likeliest tokens that together reach probability P"),
    "repetition_penalty": (float, "R", "above 1 makes tokens that are already there less likely"),
    "seed": (int, "S", "the same seed gives the same answer"),
}


def _run(args: argparse.Namespace) -> Result:
    if args.batch and (not args.out or args.prompt or args.image or args.system or args.stream):
        raise InputError(
            "--batch goes with --out and the sampling options; images and prompts are in F"
        )
    if args.allow_links and not args.batch:
        raise InputError("--allow-links goes with --batch; links given to --image are followed")
    if not args.batch and (args.prompt is None or args.out):
        raise InputError("give --prompt (and --image), or --batch with --out")
    from echovlm_jax.load import load_model

    given = {name: value for name, value in vars(args).items() if value is not None}
    sampling = {name: given[name] for name in SAMPLING if name in given}
    model = load_model(args.model, **{name: given[name] for name in LOADING if name in given})
    if args.batch:
        links = {"allow_links": args.allow_links} if args.allow_links else {}
        return _batch(model, args, {**links, **sampling})
    if args.stream:
        sampling["stream"] = lambda piece: print(piece, end="", flush=True)
    return model.generate(args.image, args.prompt, system=args.system, **sampling)


def _batch(model: Any, args: argparse.Namespace, options: dict[str, Any]) -> Result:
    from echovlm_jax.generate import generate_file
    from echovlm_jax.processing.files import shown

    counts = generate_file(model, args.batch, args.out, **options)
    if not counts["failed"] or counts["done"]:
        return counts
    line = f"echovlm: no record was answered; {shown(args.out)} says why, a line each"
    print(line, file=sys.stderr)
    return counts | {"ok": False}


def add_generate(commands: Any) -> None:
    command = add_command(
        commands,
        "generate",
        _run,
        "answer a prompt about images; several images are one exam, a file of several "
        "frames is a video",
        "echovlm generate echovlm-orbax/ --image liver1.png liver2.dcm --prompt 'Write the report.'"
        "\n  echovlm generate echovlm-orbax/ --batch exams.jsonl --out answers.jsonl",
        show=_show_answer,
    )
    command.add_argument("model", type=PLACE, metavar="MODEL", help=MODEL)
    command.add_argument(
        "--image",
        type=LOCAL,
        nargs="+",
        action="extend",
        default=[],
        metavar="F",
        help="PNG, JPEG, DICOM, BMP, TIFF, WebP, GIF, JPEG 2000, video, NIfTI or MetaImage files",
    )
    command.add_argument("--prompt", metavar="T", help="what to ask")
    command.add_argument("--system", metavar="T", help="the system prompt")
    command.add_argument("--stream", action="store_true", help="print the answer as it comes")
    _add_options(command)


def _add_options(command: argparse.ArgumentParser) -> None:
    """How to load, the files of a batch, and sampling."""
    command.add_argument(
        "--num-frames",
        type=int,
        metavar="N",
        help="frames to take of a cine loop; default: as in training, or 16",
    )
    command.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="shrink larger images to N pixels; default: as in training",
    )
    add_crop(command, "refuses a picture that can't be")
    command.add_argument(
        "--control-tokens",
        action="store_const",
        const=True,
        help="let tokens of the chat template that a prompt holds, as <|im_end|>, act as such, the "
        "way of Hugging Face; default: they are plain text, as in training",
    )
    command.add_argument(
        "--dtype",
        metavar="D",
        help="compute in float32, bfloat16 or float16; default: as stored, on a CPU float32",
    )
    add_quantize(command)
    command.add_argument(
        "--batch",
        type=LOCAL,
        metavar="F.jsonl",
        help='a file of prompts, one {"id", "images", "prompt"} a line',
    )
    command.add_argument(
        "--out", type=PLACE, metavar="G.jsonl", help="the batch's answers; re-run to resume"
    )
    add_allow_links(command)
    for name, (kind, metavar, text) in SAMPLING.items():
        command.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text, dest=name
        )


def _show_answer(result: Result, args: argparse.Namespace) -> None:
    """The answer alone on standard output, so that it can be sent to a file."""
    if "text" not in result:
        return show(result, args)
    print("" if args.stream else result["text"])
    rest = {key: value for key, value in result.items() if key != "text"}
    print("\n".join(lines(rest)), file=sys.stderr)
