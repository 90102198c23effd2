"""What the mixture of experts, and rebalancing organs, are worth on synthetic exams, over seeds."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from echovlm_jax.data.record import ORGANS
from echovlm_jax.data.tasks import TASKS
from echovlm_jax.demo import EVALUATION, EXAMS, ROWS, demo_config, make_data, train_whole
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.compare import compare
from echovlm_jax.evaluate.harness import evaluate
from echovlm_jax.processing.files import read_json, shown

COMPARED = ("bleu1", "rouge1", "diagnosis_accuracy")
RARE = "vessel"  # a fifteenth of gynaecology in the paper's data, and so in the phantom's
_STEPS = 600
# Both sides learn what they are asked.
_TASKS = {f"task_weights.{task}": float(task in EVALUATION.tasks) for task in TASKS}
_MARK = "study.json"  # what a folder's runs have in common


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
    steps: int = _STEPS,
    asked: int | None = None,
) -> dict[str, Any]:
    """Trains both sides of a study with each seed, evaluates them, and compares all their answers.

    A seed decides the first weights and the order of the data; exams and questions are the same for
    all. Finished runs in `folder` are kept, and a stopped one is resumed.

    Args:
      what: one of STUDIES.
      folder: the work folder: a new one, or that of a study with the same exams, steps and asked.
      seeds: number of seeds, from 0.
      exams: number of exams made, a sixteenth of them for the test.
      steps: length of each run.
      asked: number of the test's exams, from the first; None: all.

    Returns:
      what, about, seeds, exams, steps, before, after (the sides' names), samples (of each run);
      rows: of (an organ, or "all"), metric, before and after (over all seeds), difference with its
      95 % interval and p (exams are resampled, runs are not: how far seeds differ, by_seed shows),
      by_seed (the differences of the single seeds); signature.

    Raises:
      InputError: no such study, a number below 1, or a folder of other settings.
    """
    if what not in STUDIES:
        raise InputError(f"bench phantom: {what!r} is unknown; choose of {', '.join(STUDIES)}")
    for name, value in {"seeds": seeds, "exams": exams, "steps": steps}.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, found {value}")
    study, folder = STUDIES[what], Path(folder).resolve()
    _begin(folder, {"exams": exams, "steps": steps, "asked": asked})
    tested = _data(folder / "balanced", exams, balanced=True)
    trained = tested if study.balanced else _data(folder / "imbalanced", exams, balanced=False)
    found: tuple[list[Path], list[Path]] = ([], [])
    for seed in range(seeds):
        for arm, results in zip((study.before, study.after), found, strict=True):
            run = folder / f"{what}-{arm.name.replace(' ', '-')}-{seed}"
            own = {**ROWS, "seed": seed, "steps": steps, "data": str(trained / "data")}
            own |= {"tokenizer": str(tested / "tokenizer"), **_TASKS, **arm.changes}
            train_whole(demo_config(arm.config, own), run)
            results.append(run.with_name(f"{run.name}-results"))
            options = replace(EVALUATION, limit=asked)
            evaluate(run, tested / "data", results[-1], options, report=False)
    pooled = compare(*found)
    single = [compare(before, after) for before, after in zip(*found, strict=True)]
    rows = []
    for part in study.parts:
        for metric in COMPARED:
            if metric not in _part(pooled, part):  # too few exams to have one of the organ
                continue
            row = _part(pooled, part)[metric]
            rows.append({"of": part, "metric": metric, "before": row["a"], "after": row["b"]})
            rows[-1] |= {name: row[name] for name in ("difference", "interval", "p")}
            rows[-1]["by_seed"] = [_part(each, part)[metric]["difference"] for each in single]
    return {
        **{"what": what, "about": study.about, "seeds": seeds, "exams": exams, "steps": steps},
        **{"before": study.before.name, "after": study.after.name, "samples": pooled["n"]},
        **{"rows": rows, "signature": pooled["signature"]},
    }


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    """Marks a new folder with what all of its runs share, or checks it against an older one's."""
    path = folder / _MARK
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{shown(folder)}: holds something else; name a new folder with --dir")
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    there = read_json(path)
    for name, value in settings.items():
        if there.get(name) != value:
            raise InputError(
                f"{shown(folder)}: was begun with {name} {there.get(name)}, not {value}; name"
                " another folder with --dir"
            )


def _part(found: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    return found["overall"] if part == "all" else found["by_organ"].get(part, {})


def _data(folder: Path, exams: int, *, balanced: bool) -> Path:
    """The demo's data, made under another name first, so that what has its name is whole."""
    if not folder.is_dir():
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}."))
        try:
            make_data(part, exams, 0, balanced=balanced)
            os.rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder
