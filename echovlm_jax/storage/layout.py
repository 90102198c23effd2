"""The names inside a run's folder and a model's folder, each stated here and nowhere else.

A model that `convert` or `upcycle` made:

  config.json, tokenizer.json, …   the files beside the weights in Hugging Face's form
  params/                          the weights, as Orbax restores them
  conversion.json                  the report, and digests of the weights made from the source
  XXH128SUMS                       the digest of every file

A training run:

  config.json                      the training configuration
  model/                           the files beside the weights: frozen when the run begins
  XXH128SUMS                       the digests of these two
  checkpoints/STEP/state/          parameters and the optimizer's state
  checkpoints/STEP/extra/          the training configuration that the step was made with
  checkpoints/STEP/extra/model/    a copy of the run's model/ at that step
  checkpoints/STEP/chunks.json     the digests of the arrays' chunks
  checkpoints/STEP/XXH128SUMS      the digest of every file of the checkpoint

So a checkpoint needs nothing outside itself, and a run nothing outside its folder.
"""

import json
from pathlib import Path
from typing import Any

from echovlm_jax.errors import InputError
from echovlm_jax.storage.files import below, in_bucket

CONFIG = "config.json"  # a model's, in Hugging Face's form; a run's training configuration
SUMS = "XXH128SUMS"
PARAMS, REPORT = "params", "conversion.json"
CHUNKS = "chunks.json"
TREE = "_METADATA"  # Orbax's list of the arrays in `params` or `state`
CHECKPOINTS, MODEL, STATE, EXTRA = "checkpoints", "model", "state", "extra"
OWN_MODEL = "extra/model"  # in a checkpoint; beside `state`, Orbax would warn of it
EXTRA_FILE = "metadata"  # Orbax's name for what `extra` holds
TRAINABLE, METRICS_LOG, ROUTING = "trainable.txt", "metrics.jsonl", "routing.jsonl"


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in order; none where there is no folder."""
    if in_bucket(folder):  # see `storage.steps`
        names = [name.removesuffix(f"/{SUMS}") for name in below(folder) if name.endswith(SUMS)]
        return _numbers(names)
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    return _numbers(names)


def _numbers(names: list[str]) -> list[int]:
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def run_step(path: Path) -> tuple[Path, int] | None:
    """(a run's folder, a step) that a path names: RUN, its newest, or RUN/checkpoints/STEP; None
    where it is no run's.

    Raises:
      InputError: the run has no checkpoint yet.
    """
    # Models in Hugging Face's form have such names too, and their config.json right there.
    numbered = path.parent.name == CHECKPOINTS and path.name.isdecimal()
    if numbered and not (path / CONFIG).is_file():
        return path.parent.parent, int(path.name)
    if not (path / MODEL / CONFIG).is_file():
        return None
    if there := steps(path / CHECKPOINTS):
        return path, there[-1]
    if (path / CHECKPOINTS).is_dir():
        raise InputError(f"{path}: this run has no checkpoint yet; let it train on")
    return None


def model_files(path: Path) -> Path:
    """Where a MODEL folder has config.json and its tokenizer: a checkpoint of a run in its own
    copy (RUN/model before there were these, or before the first step); any other folder itself.
    """
    if path.parent.name == CHECKPOINTS and path.name.isdecimal():
        run, found = path.parent.parent, [path]
    else:
        run, found = path, [path / CHECKPOINTS / str(n) for n in steps(path / CHECKPOINTS)[-1:]]
    places = (*(checkpoint / OWN_MODEL for checkpoint in found), run / MODEL)
    return next((place for place in places if (place / CONFIG).is_file()), path)


def run_files(run: Path) -> list[str]:
    """The files that a run's XXH128SUMS covers: its configuration and its model/."""
    inside = [f"{MODEL}/{name}" for name in below(run / MODEL)]
    return sorted([*inside, *([CONFIG] if (run / CONFIG).exists() else [])])


def training_settings(run: Path, step: int) -> dict[str, Any]:
    """The training configuration that a checkpoint was made with: its own copy; the run's, where a
    checkpoint holds none.

    Raises:
      InputError: it is missing or damaged.
    """
    own, path = run / CHECKPOINTS / str(step) / EXTRA / EXTRA_FILE, run / CONFIG
    try:
        if own.is_file() and "config" in (found := json.loads(own.read_text("utf-8"))):
            path, settings = own, found["config"]
        else:
            settings = json.loads(path.read_text("utf-8"))
        if isinstance(settings, dict):
            return settings
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    raise InputError(f"{path}: is missing or damaged; it says how step {step} was trained")
