"""`echovlm demo`."""

import argparse
from pathlib import Path
from typing import Any

from echovlm_jax.cli.frame import LOCAL, Result, add_command
from echovlm_jax.memory import keep_freed_memory


def add_demo(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        keep_freed_memory()
        from echovlm_jax.demo import demo

        return demo(args.out, image=args.image, seed=args.seed)

    command = add_command(
        commands,
        "demo",
        run,
        "run everything on this machine; it makes synthetic exams, trains a small model on them in "
        "two stages and evaluates it on others. It takes about ten minutes on two cores",
        "echovlm demo --out demo_out",
        show=_show,
        keeps_programs=True,
    )
    command.add_argument(
        "--out", type=LOCAL, default=Path("demo_out"), metavar="DIR", help="default: %(default)s"
    )
    command.add_argument(
        "--image",
        type=LOCAL,
        metavar="F",
        help="a picture or DICOM file to answer on at the end; default: a cine loop from pydicom",
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the exams and the training"
    )


def _show(result: Result, args: argparse.Namespace) -> None:
    def value(tables: dict[str, Any], name: str) -> str:
        low, high = tables["intervals"][name]
        return f"{tables[name]:.1f} ({low:.1f} to {high:.1f})"

    columns = {"with images": "eval", "without": "blind", "another exam's": "shuffled"}
    tables = [result[name]["overall"] for name in columns.values()]
    print(f"{'':24}" + "".join(f"{title:24}" for title in columns).rstrip())
    for name, title in (
        ("bleu1", "BLEU-1"),
        ("facts_f1", "facts, F1"),
        ("diagnosis_accuracy", "diagnosis, % right"),
    ):
        values = (value(table, name) for table in tables)
        print(f"{title:24}" + "".join(f"{text:24}" for text in values).rstrip())
    for organ, table in result["eval"]["by_organ"].items():
        print(f"  {organ:22}{value(table, 'diagnosis_accuracy')}")
    print(f"report: {result['report']}")
    print(f"model:  {result['model']}   try: echovlm generate {result['model']} --image …")
    print(f"{result['seconds']:.0f} s")
