"""`echovlm data …`: datasets made, checked, counted and made up."""

import argparse
import os
import shlex
import sys
from typing import Any

from echovlm_jax.cli.frame import LOCAL, NAMED, Result, add_allow_links, add_command, add_crop
from echovlm_jax.cli.printing import show
from echovlm_jax.errors import InputError

DATA = "a folder made by `data build`, or phantom"


def add_data(commands: Any) -> None:
    group = commands.add_parser(
        "data",
        help="make, check and count datasets",
        description="Make, check and count datasets.",
        epilog="example:\n  echovlm data build --source exams.json --images pictures/ --out exams/"
        "\n  echovlm data stats exams/\n\n`echovlm data COMMAND --help` shows more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    inner = group.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_build, _add_validate, _add_stats, _add_phantom, _add_tokenizer):
        add(inner)


def _add_build(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.data.build import build

        runner = None
        if args.beam is not None:
            from echovlm_jax.data.beam import beam_runner

            runner = beam_runner(args.beam)
        result = build(
            args.source,
            args.images,
            args.out,
            _options(args, validation=args.validation, test=args.test),
            workers=args.workers,
            runner=runner,
        )
        return _warn(result, args)

    command = add_command(
        commands,
        "build",
        run,
        "make a TFDS dataset in ArrayRecord from records in the official form and their images; "
        "re-run the command to resume. Records that can't be used are listed with the reason in "
        "OUT/quarantine.jsonl",
        "echovlm data build --source thyroid.json breast.json --images pictures/ --out exams/\n"
        "  echovlm data build --source exams.json --images pictures/ --out exams/ "
        "--beam=--runner=FlinkRunner --beam=--flink_master=host:8081\n"
        "  echovlm data build --source BUS-BRA.json --images pictures/ --out breast/ "
        "--group-pattern '(bus_\\d+)'",
        show=_show_counts,
    )
    _add_inputs(command)
    command.add_argument(
        "--out", type=LOCAL, required=True, metavar="DIR", help="the folder to make"
    )
    for split in ("validation", "test"):
        command.add_argument(
            f"--{split}",
            type=float,
            default=0.05,
            metavar="X",
            help=f"the share of patients (or exams) in the split {split}; default: %(default)s",
        )
    command.add_argument(
        "--beam",
        action="append",
        metavar="OPTION",
        help="run on Apache Beam with this option of its own, e.g. --beam=--runner=DirectRunner; "
        "may be given several times. Every worker must see the same paths",
    )


def _add_validate(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.data.build import validate

        result = validate(args.source, args.images, _options(args), workers=args.workers)
        return _warn(result, args)

    command = add_command(
        commands,
        "validate",
        run,
        "check records and their images as `data build` does, without writing; exit code 1 if any "
        "would be left out",
        "echovlm data validate --source thyroid.json --images pictures/",
        show=_show_counts,
    )
    _add_inputs(command)


def _add_inputs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--source",
        type=LOCAL,
        nargs="+",
        action="extend",
        required=True,
        metavar="F.json",
        help="records: [{id, image, conversations}, …] or [{images, messages}, …], as a list, "
        'under "data", or one a line (JSONL)',
    )
    command.add_argument(
        "--images",
        type=LOCAL,
        required=True,
        metavar="DIR",
        help="what the image paths are relative to: PNG, JPEG, DICOM, BMP, TIFF, WebP, GIF, "
        "JPEG 2000, video, NIfTI and MetaImage files",
    )
    add_allow_links(command)
    command.add_argument(
        "--organs",
        type=LOCAL,
        metavar="F.json",
        help="{source's name: organ}, for records that don't say theirs; default: the organ that "
        "the source's name tells",
    )
    command.add_argument(
        "--group-pattern",
        metavar="REGEX",
        help="its first group names the patient, in a record's id or else in its images' paths; "
        "one patient is never in two splits",
    )
    command.add_argument(
        "--num-frames",
        type=int,
        default=16,
        metavar="N",
        help="frames to take of a loop; default: %(default)s",
    )
    add_crop(command, "leaves out each record with a picture that can't be")
    command.add_argument(
        "--burned-in",
        choices=["report", "mask", "refuse"],
        help="look for text in the pixels that may name the patient, by OCR (the extra `ocr`): "
        "count the pictures, blacken it, or leave out their records; what could not be looked at "
        "is left out too, but by report. Default: no OCR; DICOM headers that say so are counted, "
        "and what is drawn outside their ultrasound regions",
    )
    command.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes; default: one a CPU core",
    )


def _options(args: argparse.Namespace, **shares: float) -> Any:
    from echovlm_jax.data.build import Options

    return Options(
        num_frames=args.num_frames,
        crop=args.crop or False,
        organs=args.organs,
        group_pattern=args.group_pattern,
        allow_links=args.allow_links,
        burned_in=args.burned_in,
        **shares,
    )


def _warn(result: Result, args: argparse.Namespace) -> Result:
    for line in result["warnings"]:
        print(f"echovlm: warning: {line}", file=sys.stderr)
    _warn_of_pictures(result, args)
    return result


def _show_counts(result: Result, args: argparse.Namespace) -> None:
    show({key: value for key, value in result.items() if key != "warnings"}, args)


def _warn_of_pictures(result: Result, args: argparse.Namespace) -> None:
    """Says what may leave a patient's name in the pixels."""
    if result["not_cropped"] and args.crop != "require":
        print(
            f"echovlm: warning: {result['not_cropped']} pictures could not be cropped to all of"
            " their ultrasound regions and may show what is burnt in around these; --crop=require"
            " leaves them out",
            file=sys.stderr,
        )
    for count, text in (
        (
            "burned_in" if args.burned_in != "mask" else "",
            "have a header that says that names are burnt into the pixels (BurnedInAnnotation);"
            " look at them before you share them, or use --burned-in mask or refuse",
        ),
        (
            "drawn_outside" if args.burned_in == "report" else "",
            "show something outside their ultrasound regions; --crop cuts to the box around all of"
            " these, not what is between them; --burned-in mask blackens all of it",
        ),
        ("text_found" if args.burned_in == "report" else "", "have text that may name a patient"),
        ("text_unchecked", "could not be searched for text"),
        ("masked", "were masked; look at some: OCR does not see all text"),
    ):
        if count and result[count]:
            print(f"echovlm: warning: {result[count]} pictures {text}", file=sys.stderr)


def _add_stats(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.data.stats import stats

        if args.config is None:
            return stats(args.data, args.split)
        from echovlm_jax.data.settings import Settings
        from echovlm_jax.train.config_file import check_config, load_config

        config = load_config(args.config, args.overrides)
        check_config(config)
        return stats(args.data, args.split, Settings.from_config(config.to_dict()))

    command = add_command(
        commands,
        "stats",
        run,
        "count what a dataset holds and what a run draws from it; lengths and packing by organ. "
        "--config.KEY=VALUE changes a key of the configuration",
        "echovlm data stats exams/\n"
        "  echovlm data stats exams/ --config configs/instruction.py --config.seq_len=4096",
        show=lambda result, args: print(_describe(result)),
    )
    command.add_argument("data", type=NAMED, metavar="DIR", help=DATA)
    command.add_argument("--split", default="train", metavar="S", help="default: %(default)s")
    command.add_argument(
        "--config",
        type=LOCAL,
        metavar="F.py",
        help="the run's configuration; default: organs unweighted, a token for each byte",
    )
    command.set_defaults(overrides=[])


def _describe(result: Result) -> str:
    from echovlm_jax.data.stats import describe

    return describe(result)


def _add_phantom(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.phantom import contact_sheet, write_exams

        if (args.out is None) == (args.sheet is None):
            raise InputError("give either --out DIR, for exams, or --sheet F.png, for an overview")
        if args.sheet is not None:
            for option in ("exams", "balanced", "views", "language", "workers"):
                if getattr(args, option) != command.get_default(option):
                    raise InputError(f"--{option} goes with --out; --sheet takes --seed alone")
            return contact_sheet(args.sheet, args.seed)
        return write_exams(
            args.out,
            args.exams,
            args.seed,
            balanced=args.balanced,
            views=args.views,
            language=args.language,
            workers=args.workers,
        )

    command = add_command(
        commands,
        "phantom",
        run,
        "make synthetic exams, images and reports, labelled as such; `data build` reads them",
        "echovlm data phantom --out phantom/ --exams 100\n"
        "  echovlm data phantom --sheet phantoms.png",
        show=_show_phantom,
    )
    command.add_argument("--out", type=LOCAL, metavar="DIR", help="the folder to make")
    command.add_argument(
        "--sheet", type=LOCAL, metavar="F.png", help="draw one exam of each diagnosis instead"
    )
    command.add_argument("--exams", type=int, default=100, metavar="N", help="default: %(default)s")
    command.add_argument(
        "--seed", type=int, default=0, metavar="S", help="another seed makes other exams"
    )
    command.add_argument(
        "--balanced", action="store_true", help="organs equally often; else as in the paper's data"
    )
    command.add_argument(
        "--views", type=int, default=4, metavar="N", help="at most N images an exam (%(default)s)"
    )
    command.add_argument("--language", metavar="L", help="texts in zh or en alone; default: both")
    command.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes; default: one a core",
    )


def _show_phantom(result: Result, args: argparse.Namespace) -> None:
    show(result, args)
    if args.out is not None:
        source, images = f"--source={args.out / 'phantom.json'}", f"--images={args.out}"
        print("next:", shlex.join(["echovlm", "data", "build", source, images, "--out", "exams/"]))


def _add_tokenizer(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.data.examples import texts_of
        from echovlm_jax.data.tokenizer import train_sentencepiece

        return train_sentencepiece(texts_of(args.data), args.out, args.vocab_size)

    command = add_command(
        commands,
        "tokenizer",
        run,
        "train a small SentencePiece tokenizer on a dataset's texts, Qwen2-VL's special tokens "
        "reserved",
        "echovlm data tokenizer phantom --out tokenizer/",
    )
    command.add_argument("data", type=NAMED, metavar="DIR", help=DATA)
    command.add_argument(
        "--out", type=LOCAL, required=True, metavar="DIR", help="the folder to make"
    )
    command.add_argument(
        "--vocab-size", type=int, default=2048, metavar="N", help="default: %(default)s"
    )
