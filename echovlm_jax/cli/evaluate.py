"""`echovlm eval`, `score` and `compare`: how well a model answers."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from echovlm_jax.cli.data import DATA
from echovlm_jax.cli.frame import LOCAL, MODEL, NAMED, PLACE, Result, add_command, add_quantize
from echovlm_jax.cli.printing import lines, table

# Of facts, what the tables by organ and task show; the list of intervals has all.
_WIDE = ("facts_f1", "hallucinated_per_report")
_FEW = 10  # ids that `score` names; --json has them all


def add_eval(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.evaluate.harness import EvalOptions, evaluate

        given = {name: value for name, value in vars(args).items() if value is not None}
        options = {name: given[name] for name in given if name in EvalOptions.__annotations__}
        found = evaluate(
            args.model, args.data, args.out, EvalOptions(**options), bertscore=args.bertscore
        )
        if found.get("failed"):
            print(_failures(found), file=sys.stderr)
        return found

    command = add_command(
        commands,
        "eval",
        run,
        "evaluate a model on a split; it answers each exam's report, diagnosis and a choice or "
        "judgement. OUT gets predictions beside references, metrics by organ and task, and an "
        "HTML report. Re-run the command to resume",
        "echovlm eval echovlm-orbax/ --data exams/ --out results/\n"
        "  echovlm eval run/ --data phantom --limit 100 --images blind --out blind/",
        show=_show_eval,
        keeps_programs=True,
    )
    command.add_argument("model", type=PLACE, metavar="MODEL", help=f"{MODEL}; or a training run's")
    command.add_argument("--data", type=NAMED, required=True, metavar="DIR", help=DATA)
    command.add_argument(
        "--out", type=PLACE, required=True, metavar="DIR", help="the folder to make"
    )
    command.add_argument("--split", metavar="S", help="default: test")
    command.add_argument(
        "--tasks",
        type=lambda text: tuple(text.split(",")),
        metavar="T,T",
        help="of report, diagnosis, vqa; default: all",
    )
    command.add_argument("--limit", type=int, metavar="N", help="the first N exams alone")
    command.add_argument(
        "--images",
        metavar="I",
        help="given; blind: none are shown; swapped: those of another organ; shuffled: those of "
        "another exam of the organ; default: given",
    )
    command.add_argument("--language", metavar="L", help="ask in zh or en alone; default: both")
    command.add_argument("--seed", type=int, metavar="S", help="of wordings and draws; default: 0")
    command.add_argument("--batch-size", type=int, metavar="N", help="exams at a time; default: 16")
    command.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="maximum length of a report; default: 512"
    )
    command.add_argument(
        "--max-image-patches",
        type=int,
        metavar="N",
        help="shrink larger images to N patches; default: as the model was trained",
    )
    add_quantize(command)
    command.add_argument(
        "--bertscore", type=LOCAL, metavar="DIR", help="a local BERT-like model, for BERTScore"
    )


def add_score(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.evaluate.score import score_files

        return score_files(
            args.references, args.predictions, args.lang, segment=args.segment, facts=args.facts
        )

    command = add_command(
        commands,
        "score",
        run,
        'score predictions against references; both are files with a line {"id", "text"} a text. '
        "The answers of `generate --batch`, the predictions.jsonl of `eval` and, as references, "
        "the *.records.jsonl of a dataset do as well",
        "echovlm score --references references.jsonl --predictions answers.jsonl --lang zh"
        " --facts zh",
        show=_show_score,
    )
    command.add_argument("--references", type=LOCAL, required=True, metavar="R.jsonl")
    command.add_argument("--predictions", type=LOCAL, required=True, metavar="P.jsonl")
    command.add_argument(
        "--lang", choices=("zh", "en"), default="zh", help="decides the tokens; default: zh"
    )
    command.add_argument(
        "--segment",
        choices=("characters", "jieba"),
        default="characters",
        help="what a Chinese token is: a character, or a word by jieba; default: characters",
    )
    command.add_argument(
        "--facts",
        choices=("zh", "en"),
        help="also compare what the reports state, read in this language: F1 of facts, statements "
        "that are not the reference's, contradictions",
    )


def add_compare(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.evaluate.compare import compare

        return compare(args.a, args.b)

    command = add_command(
        commands,
        "compare",
        run,
        "compare two evaluations of the same samples; the difference of every metric, by paired "
        "bootstrap",
        "echovlm compare results/ blind/",
        show=_show_compare,
    )
    command.add_argument("a", type=PLACE, metavar="A", help="a folder that `eval` left")
    command.add_argument("b", type=PLACE, metavar="B", help="another; differences are B less A")


def _show_eval(result: Result, args: argparse.Namespace) -> None:
    from echovlm_jax.evaluate.fact_metrics import FACT_METRICS

    overall = result["overall"]
    metrics = [name for name, value in overall.items() if isinstance(value, float)]
    metrics = [name for name in metrics if name not in FACT_METRICS or name in _WIDE]
    rows = [{"": "all"} | _row(overall, metrics)]
    rows += [{"": part} | _row(row, metrics) for part, row in result["by_organ"].items()]
    rows += [{"": part} | _row(row, metrics) for part, row in result["by_task"].items()]
    print("\n".join(table(rows)), end="\n\n")
    print("\n".join(table(list(_intervals(overall)))), end="\n\n")
    rest = {key: result[key] for key in ("n", "failed", "undecided", "signature", "reasons", "out")}
    print("\n".join(lines(rest)))


def _failures(result: Result) -> str:
    tasks = ", ".join(f"{task} {n}" for task, n in result["failed_by_task"].items())
    return (
        f"{result['failed']} of {result['n']} samples have no prediction and count as empty"
        f" ({tasks}); the first: {result['first_failure']}"
    )


def _row(row: Mapping[str, Any], metrics: list[str]) -> dict[str, Any]:
    return {"n": row["n"], "undecided": row["undecided"]} | {
        name: _number(row[name]) for name in metrics
    }


def _intervals(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, (low, high) in row["intervals"].items():
        yield {"": name, "all": _number(row[name]), "95 % interval": f"{low:.2f} to {high:.2f}"}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _show_score(result: Result, args: argparse.Namespace) -> None:
    print("\n".join(table(list(_intervals(result)))), end="\n\n")
    rest: dict[str, Any] = {key: result[key] for key in ("n", "matched")}
    for key in ("missing", "failed", "unexpected"):
        names = result[key]
        some = ", ".join(map(str, names[:_FEW])) + (", …" if len(names) > _FEW else "")
        rest[key] = f"{len(names):,} ({some})" if names else 0
    rest |= {key: result[key] for key in ("skipped", "signature")}
    print("\n".join(lines(rest)))


def _show_compare(result: Result, args: argparse.Namespace) -> None:
    rows = [
        {
            "": name,
            "A": _number(found["a"]),
            "B": _number(found["b"]),
            "B - A": f"{found['difference']:+.2f}",
            "95 % interval": "{:+.2f} to {:+.2f}".format(*found["interval"]),
            "p": f"{found['p']:.3f}",
        }
        for name, found in result["overall"].items()
    ]
    print("\n".join(table(rows)), end="\n\n")
    print("\n".join(lines({key: result[key] for key in ("a", "b", "n", "signature")})))
