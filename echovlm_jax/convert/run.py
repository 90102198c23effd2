"""A training run's folder as a model: the parameters of a checkpoint, its low-rank updates added.

RUN/config.json              the training configuration
RUN/model/                   config.json, tokenizer and whatever else was beside the model
RUN/checkpoints/STEP/state/  trainable/{params,lora}/…, frozen/…, and the optimizer's state
"""

from __future__ import annotations

import json
import math
from pathlib import Path

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
        self._scale = _lora_scale(run)
        self.dtypes = {name: self._reader.dtypes[at] for name, at in self._stored.items()}
        self.duplicates: dict[str, str] = {}
        self.digests: dict[str, str] = {}

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """One block of one parameter, with its update where it has one: W + scale · b a."""
        block = self._reader.read(self._stored[path], index)
        a, b = (f"{_LORA}{path.removesuffix('/kernel')}/{name}" for name in "ab")
        if a not in self._reader.shapes:
            return block
        # Beside [layers?, *out, *in]: a [layers?, rank, *in], b [layers?, *out, rank].
        axes = self._reader.shapes[self._stored[path]]
        stacked = len(self._reader.shapes[a]) + len(self._reader.shapes[b]) - len(axes) - 2
        out = len(self._reader.shapes[b]) - 1
        whole = slice(0, self._reader.shapes[b][-1])
        layers, rest = index[:stacked], index[out:]
        low = self._reader.read(a, (*layers, whole, *rest)).astype(np.float32)
        high = self._reader.read(b, (*index[:out], whole)).astype(np.float32)
        count = math.prod(low.shape[:stacked])
        rank = whole.stop
        product = np.matmul(high.reshape(count, -1, rank), low.reshape(count, rank, -1))
        update = self._scale * product.reshape(block.shape)
        return (block.astype(np.float32) + update).astype(block.dtype)


def _lora_scale(run: Path) -> float:
    """alpha / rank, as the run trained."""
    try:
        lora = json.loads((run / CONFIG).read_text("utf-8"))["lora"]
        return float(lora["alpha"]) / float(lora["rank"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        raise InputError(
            f"{run / CONFIG}: is missing or damaged; it says how updates are scaled (lora.alpha,"
            " lora.rank)"
        ) from None
