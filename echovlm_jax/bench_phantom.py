"""What the mixture of experts, and rebalancing organs, are worth on synthetic exams, over seeds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from echovlm_jax.data.record import ORGANS
from echovlm_jax.data.tasks import TASKS
from echovlm_jax.demo import EXAMS, make_data
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.compare import compare
from echovlm_jax.evaluate.harness import evaluate
from echovlm_jax.train.config_file import load_config, own_config
from echovlm_jax.train.loop import train

METRICS = ("bleu1", "rouge1", "diagnosis_accuracy")
RARE = "vessel"  # a fifteenth of gynaecology in the paper's data, and so in the phantom's
# What both sides change of their files: they learn what they are asked, for a few minutes.
_COMMON = {f"task_weights.{task}": float(task in ("report", "diagnosis")) for task in TASKS} | {
    "steps": 600,
    "eval_every": 300,
    "checkpoint_every": 300,
    "checkpoint_keep": 1,
}


class Arm(NamedTuple):
    """One side of a study."""

    name: str
    config: str  # a file of configs/
    changes: Mapping[str, Any]


class Study(NamedTuple):
    """Two sides that differ in one thing; both are tested on exams with organs equally often."""

    about: str
    balanced: bool  # whether organs are equally often in what both train on
    before: Arm
    after: Arm
    parts: tuple[str, ...]  # of the table: "all", or an organ


_EVEN = {"mix_temperature": None} | {f"organ_weights.{organ}": 1.0 for organ in ORGANS}
STUDIES: Mapping[str, Study] = {
    "mixture": Study(
        "the same model without and with the mixture of experts",
        True,
        Arm("dense", "phantom_dense", {}),
        Arm("mixture", "phantom", {}),
        ("all",),
    ),
    "imbalance": Study(
        f"{RARE} at a fifteenth of gynaecology: organs drawn as often as they are, or evenly",
        False,
        Arm("as they are", "phantom", {}),
        Arm("evenly", "phantom", _EVEN),
        (RARE, "all"),
    ),
}


def bench_phantom(
    what: str,
    folder: str | Path,
    *,
    seeds: int = 3,
    exams: int = EXAMS,
    asked: int | None = None,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains both sides of a study with each seed, evaluates them, and compares all their answers.

    A seed decides the first weights and the order of the data; exams and questions are the same for
    all. What an earlier call finished in `folder` is kept, and a run that was stopped goes on.

    Args:
      what: of STUDIES.
      folder: to work in.
      seeds: how many, from 0.
      exams: how many are made.
      asked: the first so many of the test split; None: all.
      changes: keys of the configurations to change on both sides, such as steps.

    Returns:
      what, about, seeds, steps, exams, asked; rows: for each part and metric its value before and
      after, over all seeds, the difference with its 95 % interval (exams are resampled), and the
      differences of the single seeds; signature.

    Raises:
      InputError: no such study, or a folder that something else is in.
    """
    if what not in STUDIES:
        raise InputError(f"bench phantom: {what!r} is unknown; choose of {', '.join(STUDIES)}")
    study, folder = STUDIES[what], Path(folder)
    tested = _data(folder / "balanced", exams, balanced=True)
    trained = tested if study.balanced else _data(folder / "imbalanced", exams, balanced=False)
    arms = (study.before, study.after)
    found: tuple[list[Path], list[Path]] = ([], [])
    steps = 0
    for seed in range(seeds):
        for arm, results in zip(arms, found, strict=True):
            config = load_config(
                own_config(arm.config),
                {
                    "seed": seed,
                    "data": str(trained / "data"),
                    "tokenizer": str(tested / "tokenizer"),
                    **_COMMON,
                    **arm.changes,
                    **(changes or {}),
                },
            )
            run = folder / f"{what}-{arm.name.replace(' ', '-')}-{seed}"
            steps = config.steps
            train(config, run)
            results.append(run.with_name(f"{run.name}-results"))
            options = {"tasks": ("report", "diagnosis"), "max_new_tokens": 128, "report": False}
            evaluate(run, tested / "data", results[-1], limit=asked, batch_size=35, **options)
    pooled = compare(*found)
    single = [compare(before, after) for before, after in zip(*found, strict=True)]
    rows = []
    for part in study.parts:
        for metric in METRICS:
            if metric not in _part(pooled, part):  # too few exams to have one of the organ
                continue
            row = _part(pooled, part)[metric]
            rows.append({"of": part, "metric": metric, "before": row["a"], "after": row["b"]})
            rows[-1] |= {name: row[name] for name in ("difference", "interval", "p")}
            rows[-1]["by_seed"] = [_part(each, part)[metric]["difference"] for each in single]
    return {
        **{"what": what, "about": study.about, "seeds": seeds, "steps": steps, "exams": exams},
        **{"before": study.before.name, "after": study.after.name},
        **{"answers": pooled["n"], "rows": rows, "signature": pooled["signature"]},
    }


def _part(found: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    return found["overall"] if part == "all" else found["by_organ"].get(part, {})


def _data(folder: Path, exams: int, *, balanced: bool) -> Path:
    """The demo's data, made under another name first, so that what has its name is whole."""
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(part, ignore_errors=True)
        make_data(part, exams, 0, balanced=balanced)
        os.rename(part, folder)
    return folder
