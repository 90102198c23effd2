"""A training run's folder as a model: the parameters of a checkpoint, its low-rank updates added.

A checkpoint's state/ holds trainable/{params,lora}/…, frozen/…, and the optimizer's state.
Quantized weights are read as floats, each value times its scale. Beside the state lie copies of the
training configuration and of the model's: a later change of the run does not change older
checkpoints. `storage.layout` names the files.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echovlm_jax.config import ModelConfig, from_hf
from echovlm_jax.convert import source as sources
from echovlm_jax.convert import table
from echovlm_jax.convert.few_bits import FewBits
from echovlm_jax.errors import InputError
from echovlm_jax.model import param_specs
from echovlm_jax.ops.product.weight import Quantized
from echovlm_jax.quantize import abstract, read_block, recipe
from echovlm_jax.storage import digests
from echovlm_jax.storage.arrays import Index, Take, gather, inside, open_state, piece_shape
from echovlm_jax.storage.layout import (
    CHECKPOINTS,
    CONFIG,
    model_files,
    run_step,
    training_settings,
)
from echovlm_jax.storage.verify import run_problems
from echovlm_jax.storage.writer import pieces

_PARAMS, _LORA, _FROZEN = "trainable/params/", "trainable/lora/", "frozen/"


def open_run(path: Path) -> Run | None:
    """The model of a run's newest checkpoint, or of the one that a path names; None where it is no
    run's.

    Raises:
      InputError: the run has no checkpoint yet, it or its configuration is broken.
    """
    if not (found := run_step(path)):
        return None
    run, step = found
    problems, unchecked = run_problems(run)
    if problems and run == path:  # a checkpoint that is named has its own copies
        raise InputError(
            f"{run}: is broken: {digests.told(problems)}; put back what changed, or name a"
            f" checkpoint, which has its own copy: {run / CHECKPOINTS / str(step)}"
        )
    if unchecked:
        print(
            f"echovlm: {run}: {', '.join(unchecked)}: from before runs had digests of them;"
            " unchecked",
            file=sys.stderr,
        )
    return Run(run, step)


class Run:
    """`folder.StoredModel` of a run's checkpoint; all that is read is checked.

    Attributes:
      trained: the paths of parameters that train in full.
      updated: the paths of parameters with low-rank updates.
      lora: the updates' rank, alpha and dropout.
      base: the run's initial model: a folder or a preset.
      settings: the training configuration of the step.

    Raises:
      InputError: the checkpoint is broken, or not of the run's model.
    """

    def __init__(self, run: Path, step: int) -> None:
        checkpoint = run / CHECKPOINTS / str(step)
        mend = f"name another, as in {run / CHECKPOINTS}/STEP"
        self._reader = open_state(checkpoint, (_PARAMS, _LORA, _FROZEN), mend=mend)
        self.folder = model_files(checkpoint)
        path = self.folder / CONFIG
        self.config: ModelConfig = from_hf(sources.read_json(path), str(path))
        self.settings = training_settings(run, step)
        self._stored: dict[str, str] = {}
        self._forms: dict[str, Quantized] = {}
        specs, there = param_specs(self.config), self._reader.shapes
        for name, shape in table.leaf_shapes(self.config).items():
            at = f"{_PARAMS if _PARAMS + name in there else _FROZEN}{name}"
            expected = {at: shape}
            if f"{at}/values" in there:
                form = abstract(specs[name], recipe(str(self.settings.get("quantize"))))
                expected = {f"{at}/values": form.values.shape, f"{at}/scale": form.scale.shape}
                self._forms[name] = form
            self._stored[name] = at
            for array, wanted in expected.items():
                if (found := there.get(array)) != wanted:
                    raise InputError(
                        f"{checkpoint}: parameter {array.split('/', 1)[1]} has shape"
                        f" {found and list(found)}, expected {list(wanted)} by {path}"
                    )
        self.trained = {name for name, stored in self._stored.items() if stored.startswith(_PARAMS)}
        self.updated = {name for name in self._stored if _update(name, "a") in self._reader.shapes}
        self.base, self.lora = str(self.settings.get("model")), _lora(self.settings, checkpoint)
        self._scale = self.lora["alpha"] / self.lora["rank"]
        self.dtypes = {
            # A quantized one's is what it would have without, as all that is frozen.
            name: np.dtype(str(self.settings.get("dtype")))
            if name in self._forms
            else self._reader.dtypes[at]
            for name, at in self._stored.items()
        }
        self.quantized: FewBits | None = None
        self.duplicates: dict[str, str] = {}
        self.digests: dict[str, str] = {}

    def read(self, path: str, index: Index) -> np.ndarray:
        """One block of one parameter, with its update where it has one."""
        [out] = gather(functools.partial(self.read_blocks, path), [index], self.dtypes[path])
        return out

    def read_blocks(self, path: str, indices: Sequence[Index], take: Take) -> None:
        """As `Reader.read_blocks`, with the update where there is one: W + scale · b a."""
        if path not in self.updated:
            dtype = self.dtypes[path]
            self._read_base(
                path, indices, lambda n, at, values: take(n, at, values.astype(dtype, copy=False))
            )
            return
        # Beside [*stacked, *out, *in]: a [*stacked, rank, *in], b [*stacked, *out, rank].
        spec, rank = param_specs(self.config)[path], self.update_shape(path, "b")[-1]

        def parts(index: Index) -> tuple[Index, Index]:
            stacked, out, inner = spec.cut(index)
            return (*stacked, slice(0, rank), *inner), (*stacked, *out, slice(0, rank))

        low, high = (
            gather(
                functools.partial(self._reader.read_blocks, _update(path, name)),
                [parts(index)[i] for index in indices],
                np.dtype(np.float32),
            )
            for i, name in enumerate("ab")
        )

        def add(number: int, where: Index, values: np.ndarray) -> None:
            own, other = parts(where)
            left, right = high[number][other], low[number][own]
            count = math.prod(right.shape[: spec.stacked])
            product = left.reshape(count, -1, rank) @ right.reshape(count, rank, -1)
            update = self._scale * product.reshape(values.shape)
            take(number, where, (values.astype(np.float32) + update).astype(self.dtypes[path]))

        self._read_base(path, indices, add)

    def _read_base(self, path: str, indices: Sequence[Index], take: Take) -> None:
        """Without the update; what is quantized in float32."""
        if (form := self._forms.get(path)) is None:
            self._reader.read_blocks(self._stored[path], indices, take)
            return

        def read(part: str, index: Index) -> np.ndarray:
            return self._reader.read(f"{self._stored[path]}/{part}", index)

        for number, index in enumerate(indices):
            for cut in pieces(piece_shape(index), 4):
                take(number, cut, read_block(form, inside(cut, index), read))

    def update_shape(self, path: str, name: str) -> tuple[int, ...]:
        """The shape of a parameter's "a" or "b"."""
        return self._reader.shapes[_update(path, name)]

    def read_update(self, path: str, name: str, index: Index) -> np.ndarray:
        """One block of a parameter's "a" or "b", in float32."""
        return self._reader.read(_update(path, name), index).astype(np.float32)


def _update(path: str, name: str) -> str:
    return f"{_LORA}{path.removesuffix('/kernel')}/{name}"


def _lora(settings: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The rank, alpha and dropout of a checkpoint's updates."""
    try:
        lora = {name: settings["lora"][name] for name in ("rank", "alpha", "dropout")}
        if all(math.isfinite(value) for value in lora.values()) and lora["rank"] >= 1:
            return lora
    except (KeyError, TypeError):
        pass
    raise InputError(
        f"{checkpoint}: its configuration doesn't say how updates are scaled (lora.alpha,"
        " lora.rank); name another checkpoint"
    )
