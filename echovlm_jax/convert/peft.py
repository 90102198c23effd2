"""Low-rank updates as PEFT's files have them: adapter_config.json and adapter_model.safetensors.

Beside a tensor X.weight [out, in] lie base_model.model.X.lora_A.weight [r, in] and ….lora_B.weight
[out, r], each layer's and each expert's for itself. What trained in full lies there whole, under
base_model.model. and its own name, and adapter_config.json lists the modules that it belongs to as
modules_to_save: the adapter on top of the base is the whole model.
https://huggingface.co/docs/peft
"""

import functools
import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.convert import folder, safetensors, table, to_torch
from echovlm_jax.convert import source as sources
from echovlm_jax.convert.peft_config import read_settings
from echovlm_jax.convert.peft_tensors import (
    BASE,
    CONFIG,
    EMBEDDING_A,
    EMBEDDING_B,
    PREFIX,
    WEIGHTS,
    WHOLE,
    A,
    B,
    place_tensors,
)
from echovlm_jax.convert.run import Run, open_run
from echovlm_jax.errors import InputError
from echovlm_jax.model import param_specs
from echovlm_jax.storage import writer as store
from echovlm_jax.storage.files import as_path, write_json


class Update(NamedTuple):
    """scale · B A, beside one tensor [out, in]."""

    a: sources.Tensor  # [r, in]
    b: sources.Tensor  # [out, r]
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class Adapter(NamedTuple):
    """An open adapter, by released tensor names.

    Attributes:
      updates: of tensors that have one.
      full: tensors that take the place of the base's.
      fingerprint: differs where the adapter may differ.
    """

    updates: dict[str, Update]
    full: dict[str, sources.Tensor]
    fingerprint: str

    def merged(self, name: str, values: np.ndarray, start: int, row: int) -> np.ndarray:
        """The base's values of a tensor from `start` on, counted flat, with the adapter's: in
        float32 where there is an update. `row` is how many values an output has."""
        if tensor := self.full.get(name):
            values = tensor.read(start, start + values.size)
        if not (update := self.updates.get(name)):
            return values
        first, last = start // row, -(-(start + values.size) // row)
        rank = update.rank
        low = _float32(update.a, 0, rank * row).reshape(rank, row)
        high = _float32(update.b, first * rank, last * rank).reshape(-1, rank)
        added = (high @ low).reshape(-1)[start - first * row :][: values.size]
        return values.astype(np.float32) + update.scale * added


def open_adapter(path: str | os.PathLike[str], config: ModelConfig) -> Adapter:
    """Opens an adapter for a model of this configuration; its tensors are read when needed.

    Raises:
      InputError: no adapter there, one of another kind or model, one whose settings and tensors
        don't say the same, or damaged data.
    """
    where = as_path(path)
    if not (where / CONFIG).is_file():
        raise InputError(f"{where}: has no {CONFIG}; give the folder of a PEFT adapter")
    if not (where / WEIGHTS).is_file():
        raise InputError(f"{where}: has no {WEIGHTS}; save the adapter as safetensors")
    settings = read_settings(where / CONFIG)
    source = sources.open_source(where / WEIGHTS, once=False)
    updates: dict[str, Update] = {}
    full: dict[str, sources.Tensor] = {}
    for name, (module, parts) in place_tensors(source, settings, config).items():
        low, high = parts.get(A), parts.get(B)
        if tall := parts.get(EMBEDDING_B):
            low, high = _transposed(tall), _transposed(parts[EMBEDDING_A])
        if low and high:
            updates[name] = Update(low, high, settings.scale(module))
        if whole := parts.get(WHOLE) or parts.get(BASE):
            full[name] = whole
    content = hashlib.sha256((where / CONFIG).read_bytes()).hexdigest()
    return Adapter(updates, full, f"{content} {source.fingerprint()}")


def adapter_updates(adapter: Adapter, config: ModelConfig) -> tuple[Any, float]:
    """An adapter's updates as training has them: a tree beside the kernels, and its scale.

    Returns:
      {… {"a": [layers?, experts?, rank, *in], "b": [layers?, experts?, *out, rank]}} in float32,
      for each kernel that has an update in some layer, zero in the others; and what b a is
      multiplied with. The rank is the largest there.
    """
    if not adapter.updates:
        return {}, 1.0
    rank = max(update.rank for update in adapter.updates.values())
    if table.EMBEDDING in adapter.updates:
        raise InputError("an update of embed_tokens can only be merged; convert with --adapter")
    # An alpha may be 0, and nothing is divided by that.
    scale = next((one.scale for one in adapter.updates.values() if one.scale), 1.0)
    slots, specs = table.slots(config), param_specs(config)
    made: dict[str, np.ndarray] = {}
    for name, update in adapter.updates.items():
        slot = slots[name]
        lead, outputs, inputs = specs[slot.path].cut(specs[slot.path].shape)
        module = slot.path.removesuffix("/kernel")
        a = made.setdefault(f"{module}/a", np.zeros((*lead, rank, *inputs), np.float32))
        b = made.setdefault(f"{module}/b", np.zeros((*lead, *outputs, rank), np.float32))
        own = update.rank
        a[slot.index][:own] = _whole(update.a).reshape(own, *inputs)
        high = _whole(update.b).reshape(*outputs, own)
        b[slot.index][..., :own] = high * (update.scale / scale)
    return table.unflatten(made), scale


def export_adapter(model: str | os.PathLike[str], dst: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes what a run trained as an adapter for the model that it began with.

    Args:
      model: a training run's folder, or one of its checkpoints.
      dst: the folder to make, with adapter_config.json and adapter_model.safetensors; it is there
        whole or not at all.

    Returns:
      The report, as `to_torch.export`'s.

    Raises:
      InputError: no run there, or one without updates; DST exists; no space.
    """
    started = time.monotonic()
    run = open_run(as_path(model))
    if run is None:
        raise InputError(f"{model}: is no training run's folder, and only a run has an adapter")
    if not run.updated:
        raise InputError(f"{model}: this run has no low-rank updates; export it without --adapter")
    tensors = {**_pairs(run), **_full(run)}
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype, *_ in tensors.values())

    def values(key: str) -> Iterator[np.ndarray]:
        _, dtype, path, lead, name = tensors[key]
        if name:
            part = run.update_shape(path, name)[len(lead) :]
            yield run.read_update(path, name, (*lead, *(slice(0, size) for size in part)))
        else:
            part = table.leaf_shapes(run.config)[path][len(lead) :]
            for cut in store.pieces(part, dtype.itemsize):
                yield run.read(path, (*lead, *cut))

    def write(made: Path) -> None:
        header = {key: (shape, dtype) for key, (shape, dtype, *_) in tensors.items()}
        safetensors.write_file(made / WEIGHTS, header, values)
        write_json(made / CONFIG, _config(run))

    to_torch.make_folder_whole(dst, total, write)
    return {
        "tensors": len(tensors),
        "bytes": total,
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": folder.peak_rss_bytes(),
    }


def _naming(run: Run) -> Callable[[str], str]:
    """A released tensor's name in the PyTorch model that PEFT finds modules in by their names.

    A dense model's class is of transformers, where files keep the released names and modules have
    the newer ones (from 4.52 on). With experts it is the authors' own, as released.
    """
    return table.newer_name if run.config.moe is None else str


# A tensor to write: shape, dtype, our parameter, its place on the stacked axes, "a", "b" or "".
_Entry = tuple[tuple[int, ...], np.dtype, str, tuple[slice, ...], str]


def _pairs(run: Run) -> dict[str, _Entry]:
    out: dict[str, _Entry] = {}
    named = _naming(run)
    for slot in table.slots(run.config).values():
        if slot.path in run.updated:
            lead = tuple(slice(i, i + 1) for i in slot.index)
            rank = run.update_shape(slot.path, "a")[len(lead)]
            key = PREFIX + named(slot.name).removesuffix(".weight")
            # Beside a convolution PEFT has convolutions, the second one of a single point.
            high = (slot.shape[0], rank, *(1 for _ in slot.shape[2:]))
            out[key + A] = ((rank, *slot.shape[1:]), np.dtype(np.float32), slot.path, lead, "a")
            out[key + B] = (high, np.dtype(np.float32), slot.path, lead, "b")
    return out


def _full(run: Run) -> dict[str, _Entry]:
    named = _naming(run)
    return {
        PREFIX + named(slot.name): (
            slot.shape,
            run.dtypes[slot.path],
            slot.path,
            tuple(slice(i, i + 1) for i in slot.index),
            "",
        )
        for slot in table.slots(run.config).values()
        if slot.path in run.trained
    }


def _config(run: Run) -> dict[str, Any]:
    named = _naming(run)
    patterns = [
        re.escape(named(row.name).removesuffix(".weight"))
        .replace(r"\{l\}", r"\d+")
        .replace(r"\{e\}", r"\d+")
        for row in table.TABLE
        if row.path in run.updated
    ]
    tied = run.config.text.tie_word_embeddings
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": run.base,
        "inference_mode": True,
        "r": run.lora["rank"],
        "lora_alpha": run.lora["alpha"],
        "lora_dropout": run.lora["dropout"],
        "target_modules": f"(?:{'|'.join(patterns)})",
        "modules_to_save": _modules(run) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
        # Without it PEFT unties the embedding and leaves lm_head unchanged.
        "ensure_weight_tying": tied and "text/embed/embedding" in run.trained,
    }


def _modules(run: Run) -> list[str]:
    """The largest modules of which all has trained in full, by the shortest names for them."""
    named = _naming(run)
    names = {named(name): slot for name, slot in table.slots(run.config).items()}
    full = {name for name, slot in names.items() if slot.path in run.trained}
    inside: dict[str, set[str]] = {}  # of every module
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            inside.setdefault(".".join(parts[:end]), set()).add(name)
    # PEFT can't save lists of modules, whose parts have numbers for names.
    lists = {module.rpartition(".")[0] for module in inside if module.split(".")[-1].isdecimal()}
    chosen: set[str] = set()
    for name in sorted(full):
        parts = name.split(".")
        above = [".".join(parts[:end]) for end in range(1, len(parts))]
        module = next((one for one in above if inside[one] <= full and one not in lists), None)
        if module is None:
            raise InputError(
                f"{name}: trains in full beside weights that don't, which an adapter can't say;"
                " export with --merge-lora"
            )
        chosen.add(module)
    short = set()
    for module in chosen:
        last = module.rpartition(".")[2]
        same = {one for one in inside if one.endswith(last)}
        short.add(last if same <= chosen and not last.isdecimal() else module)
    return sorted(short)


def _transposed(tensor: sources.Tensor) -> sources.Tensor:
    """The halves beside an embedding lie the other way round."""
    rows, columns = tensor.shape

    @functools.cache
    def values() -> np.ndarray:
        return tensor.read(0, rows * columns).reshape(rows, columns).T.reshape(-1)

    return sources.Tensor(
        (columns, rows), tensor.dtype, tensor.order, lambda start, stop: values()[start:stop]
    )


def _float32(tensor: sources.Tensor, start: int, stop: int) -> np.ndarray:
    return tensor.read(start, stop).astype(np.float32)


def _whole(tensor: sources.Tensor) -> np.ndarray:
    return _float32(tensor, 0, math.prod(tensor.shape))
