"""Low-rank updates as PEFT's files have them: adapter_config.json and adapter_model.safetensors.

Beside a released tensor X.weight [out, in] lie base_model.model.X.lora_A.weight [r, in] and
….lora_B.weight [out, r], each layer's and each expert's for itself. What trained in full lies there
whole, under base_model.model. and its own name, and adapter_config.json lists the modules that it
belongs to as modules_to_save: the adapter on top of the base is the whole model.
https://huggingface.co/docs/peft
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.convert import folder, safetensors, store, table, to_torch
from echovlm_jax.convert import source as sources
from echovlm_jax.convert.run import Run, open_run
from echovlm_jax.convert.table import quoted
from echovlm_jax.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# What a LoRA adapter of PEFT's may ask for beyond W + scale · B A, and this doesn't compute.
_OTHER = (
    *("use_dora", "lora_bias", "fan_in_fan_out", "trainable_token_indices", "target_parameters"),
    *("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)


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
            return tensor.read(start, start + values.size)
        if not (update := self.updates.get(name)):
            return values
        first, last = start // row, -(-(start + values.size) // row)
        rank = update.rank
        low = _float32(update.a, 0, rank * row).reshape(rank, row)
        high = _float32(update.b, first * rank, last * rank).reshape(-1, rank)
        added = (high @ low).reshape(-1)[start - first * row :][: values.size]
        return values.astype(np.float32) + update.scale * added


def open_adapter(path: str | os.PathLike[str], config: ModelConfig) -> Adapter:
    """Opens an adapter of a model of this configuration; its tensors are read when asked for.

    Raises:
      InputError: no adapter there, one of another kind or model, or damaged data.
    """
    where = Path(path)
    if not (where / CONFIG).is_file():
        raise InputError(f"{where}: has no {CONFIG}; give the folder of a PEFT adapter")
    if not (where / WEIGHTS).is_file():
        raise InputError(f"{where}: has no {WEIGHTS}; save the adapter as safetensors")
    told = sources.read_json(where / CONFIG)
    _check_kind(told, where / CONFIG)
    source = sources.open_source(where / WEIGHTS, once=False)
    slots = table.slots(config)
    halves: dict[str, dict[str, sources.Tensor]] = {}
    modules: dict[str, str] = {}
    full: dict[str, sources.Tensor] = {}
    for key, tensor in source.tensors.items():
        module, half = next(
            ((key.removesuffix(end), end) for end in (_A, _B) if key.endswith(end)), (key, "")
        )
        own = module.removeprefix(_PREFIX) + (".weight" if half else "")
        name = table.released_name(own)
        if not key.startswith(_PREFIX) or name not in slots:
            raise InputError(
                f"{where / WEIGHTS}: {quoted(key)} has no place in this model; is the adapter of"
                " another one?"
            )
        if half:
            halves.setdefault(name, {})[half] = tensor
            modules[name] = own.removesuffix(".weight")
        else:
            full[name] = tensor
        _check_tensor(where / WEIGHTS, key, tensor, slots[name], half)
    updates = {}
    for name, pair in halves.items():
        if len(pair) < 2 or pair[_A].shape[0] != pair[_B].shape[1]:
            raise InputError(
                f"{where / WEIGHTS}: of {quoted(name)} lora_A and lora_B don't fit each other; save"
                " the adapter again"
            )
        updates[name] = Update(pair[_A], pair[_B], _scale(told, modules[name], pair[_A].shape[0]))
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
    scale = next(iter(adapter.updates.values())).scale
    slots, shapes = table.slots(config), table.leaf_shapes(config)
    made: dict[str, np.ndarray] = {}
    for name, update in adapter.updates.items():
        slot = slots[name]
        out = _outputs(slot)
        lead = shapes[slot.path][: len(slot.index)]
        module = slot.path.removesuffix("/kernel")
        a = made.setdefault(f"{module}/a", np.zeros((*lead, rank, *slot.part[out:]), np.float32))
        b = made.setdefault(f"{module}/b", np.zeros((*lead, *slot.part[:out], rank), np.float32))
        own = update.rank
        a[slot.index][:own] = _whole(update.a).reshape(own, *slot.part[out:])
        b[slot.index][..., :own] = _whole(update.b).reshape(*slot.part[:out], own) * (
            update.scale / scale
        )
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
    run = open_run(Path(model))
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
        folder.write_json(made / CONFIG, _config(run))

    to_torch.make_folder_whole(dst, total, write)
    return {
        "tensors": len(tensors),
        "bytes": total,
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": folder.peak_rss_bytes(),
    }


# A tensor to write: shape, dtype, our parameter, its place on the stacked axes, "a", "b" or "".
_Entry = tuple[tuple[int, ...], np.dtype, str, tuple[slice, ...], str]


def _pairs(run: Run) -> dict[str, _Entry]:
    out: dict[str, _Entry] = {}
    for slot in table.slots(run.config).values():
        if slot.path in run.updated:
            lead = tuple(slice(i, i + 1) for i in slot.index)
            rank = run.update_shape(slot.path, "a")[len(lead)]
            key = _PREFIX + slot.name.removesuffix(".weight")
            # Beside a convolution PEFT has convolutions, the second one of a single point.
            high = (slot.shape[0], rank, *(1 for _ in slot.shape[2:]))
            out[key + _A] = ((rank, *slot.shape[1:]), np.dtype(np.float32), slot.path, lead, "a")
            out[key + _B] = (high, np.dtype(np.float32), slot.path, lead, "b")
    return out


def _full(run: Run) -> dict[str, _Entry]:
    return {
        _PREFIX + slot.name: (
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
    patterns = [
        re.escape(rule.name.removesuffix(".weight"))
        .replace(r"\{l\}", r"\d+")
        .replace(r"\{e\}", r"\d+")
        for rule in table.RULES
        if rule.path in run.updated
    ]
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
    }


def _modules(run: Run) -> list[str]:
    """The largest modules of which all has trained in full, by the shortest names for them."""
    names = table.slots(run.config)
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


def _check_kind(told: Any, path: Path) -> None:
    """Refuses a configuration of anything but plain LoRA."""
    if not isinstance(told, dict) or told.get("peft_type") != "LORA":
        kind = told.get("peft_type") if isinstance(told, dict) else told
        raise InputError(f"{path}: peft_type is {quoted(kind)}; only LORA is read")
    if told.get("bias", "none") != "none":
        raise InputError(f"{path}: bias is {quoted(told['bias'])}; only none is read")
    for key in _OTHER:
        if told.get(key):
            raise InputError(f"{path}: {key} is set, which is not read; merge the adapter in PEFT")


def _check_tensor(
    path: Path, key: str, tensor: sources.Tensor, slot: table.Slot, half: str
) -> None:
    shape, wanted = tensor.shape, slot.shape
    if half:
        rank = shape[0 if half == _A else 1] if len(shape) > 1 else 0
        ones = (1,) * (len(wanted) - 2)
        wanted = (rank, *wanted[1:]) if half == _A else (wanted[0], rank, *ones)
    if shape != wanted or not math.prod(shape):
        raise InputError(
            f"{path}: {quoted(key)} has shape {list(shape)}, expected {list(wanted)}; is the"
            " adapter of another model?"
        )
    if tensor.dtype.name not in folder.WEIGHT_DTYPES:
        raise InputError(
            f"{path}: {quoted(key)} has the dtype {tensor.dtype.name}; weights must be one of"
            f" {', '.join(folder.WEIGHT_DTYPES)}"
        )


def _scale(told: dict[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or what the configuration says of one module or of both."""
    alpha = told.get("lora_alpha", 8)  # PEFT's own default
    patterns = told.get("alpha_pattern") or {}
    try:
        for pattern, own in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = own
                break
        scale = float(alpha) / (math.sqrt(rank) if told.get("use_rslora") else rank)
    except (TypeError, ValueError, AttributeError, re.error):
        scale = math.nan
    if not math.isfinite(scale):
        raise InputError(f"{CONFIG}: lora_alpha or alpha_pattern is no number for {quoted(module)}")
    return scale


def _outputs(slot: table.Slot) -> int:
    """How many of a slot's own axes, from the first, make the tensor's first."""
    return next(n for n in range(1, len(slot.part)) if math.prod(slot.part[:n]) == slot.shape[0])


def _float32(tensor: sources.Tensor, start: int, stop: int) -> np.ndarray:
    return tensor.read(start, stop).astype(np.float32)


def _whole(tensor: sources.Tensor) -> np.ndarray:
    return _float32(tensor, 0, math.prod(tensor.shape))
