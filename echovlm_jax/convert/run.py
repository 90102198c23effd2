"""A training run's folder as a model: the parameters of a checkpoint, its low-rank updates added.

RUN/config.json              the training configuration
RUN/model/                   config.json, tokenizer and whatever else was beside the model
RUN/checkpoints/STEP/state/  trainable/{params,lora}/…, frozen/…, and the optimizer's state
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from echovlm_jax import digests
from echovlm_jax.config import ModelConfig, from_hf
from echovlm_jax.convert import source as sources
from echovlm_jax.convert import store, table
from echovlm_jax.errors import InputError
from echovlm_jax.verify import CHECKPOINTS, steps

CONFIG, MODEL, STATE = "config.json", "model", "state"
_PARAMS, _LORA, _FROZEN = "trainable/params/", "trainable/lora/", "frozen/"


def run_step(path: Path) -> tuple[Path, int] | None:
    """(a run's folder, a step) that a path names: RUN, its newest, or RUN/checkpoints/STEP; None
    where it is no run's.

    Raises:
      InputError: the run has no checkpoint yet.
    """
    if path.parent.name == CHECKPOINTS and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    if not (path / CHECKPOINTS).is_dir() or not (path / MODEL / CONFIG).is_file():
        return None
    if not (there := steps(path / CHECKPOINTS)):
        raise InputError(f"{path}: this run has no checkpoint yet; let it train on")
    return path, there[-1]


class Run:
    """`folder.Model` of a run's checkpoint, whose every byte is checked first.

    Attributes:
      trained: the parameters that train in full, by path.
      updated: those that have low-rank updates.
      lora: the updates' rank, alpha and dropout.
      base: the model that the run began with: a folder or a preset.

    Raises:
      InputError: the checkpoint is broken, or not of the run's model.
    """

    def __init__(self, run: Path, step: int) -> None:
        self.folder = run / MODEL
        path = self.folder / CONFIG
        self.config: ModelConfig = from_hf(sources.read_json(path), str(path))
        checkpoint = run / CHECKPOINTS / str(step)
        if problems := digests.check(checkpoint):
            name, what = next(iter(problems.items()))
            raise InputError(
                f"{checkpoint}: is broken: {name} {what}; name another, as in"
                f" {run / CHECKPOINTS}/STEP"
            )
        self._reader = store.Reader(checkpoint / STATE, (_PARAMS, _LORA, _FROZEN))
        self._stored = {
            name.removeprefix(part): name
            for name in self._reader.shapes
            for part in (_PARAMS, _FROZEN)
            if name.startswith(part)
        }
        for name, shape in table.leaf_shapes(self.config).items():
            found = self._reader.shapes.get(self._stored.get(name, ""))
            if found != shape:
                raise InputError(
                    f"{checkpoint}: parameter {name} has shape {found and list(found)}, expected"
                    f" {list(shape)} by {path}"
                )
        self.trained = {name for name, stored in self._stored.items() if stored.startswith(_PARAMS)}
        self.updated = {name for name in self._stored if _update(name, "a") in self._reader.shapes}
        self.base, self.lora = _settings(run)
        self._scale = self.lora["alpha"] / self.lora["rank"]
        self.dtypes = {name: self._reader.dtypes[at] for name, at in self._stored.items()}
        self.duplicates: dict[str, str] = {}
        self.digests: dict[str, str] = {}

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """One block of one parameter, with its update where it has one: W + scale · b a."""
        block = self._reader.read(self._stored[path], index)
        if path not in self.updated:
            return block
        # Beside [stacked?, *out, *in]: a [stacked?, rank, *in], b [stacked?, *out, rank].
        a, b = self.update_shape(path, "a"), self.update_shape(path, "b")
        stacked = len(a) + len(b) - len(index) - 2
        out, rank = len(b) - 1, b[-1]
        whole = slice(0, rank)
        low = self.read_update(path, "a", (*index[:stacked], whole, *index[out:]))
        high = self.read_update(path, "b", (*index[:out], whole))
        count = math.prod(low.shape[:stacked])
        product = np.matmul(high.reshape(count, -1, rank), low.reshape(count, rank, -1))
        update = self._scale * product.reshape(block.shape)
        return (block.astype(np.float32) + update).astype(block.dtype)

    def update_shape(self, path: str, name: str) -> tuple[int, ...]:
        """The shape of a parameter's "a" or "b"."""
        return self._reader.shapes[_update(path, name)]

    def read_update(self, path: str, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """One block of a parameter's "a" or "b", in float32."""
        return self._reader.read(_update(path, name), index).astype(np.float32)


def _update(path: str, name: str) -> str:
    return f"{_LORA}{path.removesuffix('/kernel')}/{name}"


def _settings(run: Path) -> tuple[str, dict[str, Any]]:
    """The model that a run began with, and how its updates are scaled."""
    try:
        config = json.loads((run / CONFIG).read_text("utf-8"))
        lora = {name: config["lora"][name] for name in ("rank", "alpha", "dropout")}
        if not all(math.isfinite(value) for value in lora.values()) or lora["rank"] < 1:
            raise ValueError
        return str(config["model"]), lora
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{run / CONFIG}: is missing or damaged; it says how updates are scaled (lora.alpha,"
            " lora.rank)"
        ) from None
