"""An adapter's tensors: what each is of the model, and whether the settings ask for just these.

PEFT leaves out, without an error, what its settings don't name, and makes up what they name and the
file lacks. Both are refused here: the settings and the file say the same, or one line says where
they don't.
"""

import math
from pathlib import Path

from echovlm_jax.config import ModelConfig
from echovlm_jax.convert import folder, table
from echovlm_jax.convert import source as sources
from echovlm_jax.convert.peft_config import Settings
from echovlm_jax.convert.table import EMBEDDING, HEAD, quoted
from echovlm_jax.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What a tensor of the file is: a half of an update, an embedding's half, which lies the other way
# round, or a whole tensor of the model, under its own name or as the base of an update.
A, B = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
WHOLE, BASE = "", ".base_layer"

Parts = dict[str, sources.Tensor]


def place_tensors(
    source: sources.Source, settings: Settings, config: ModelConfig
) -> dict[str, tuple[str, Parts]]:
    """Released tensor name → (its module's name in the file, what the file has of it).

    Raises:
      InputError: a tensor without a place, or of another shape, or the settings ask for others.
    """
    path = settings.path.with_name(WEIGHTS)
    slots = table.slots(config)
    found: dict[str, tuple[str, Parts]] = {}
    forms = set()
    for key, tensor in source.tensors.items():
        own, part = _place(key)
        name = table.released_name(own)
        if config.text.tie_word_embeddings:
            _check_tied(settings, key, part, name)
        _check_place(path, key, part, slots.get(name))
        _check_tensor(path, key, tensor, slots[name], part)
        if table.newer_name(name) != name:
            forms.add(own != name)
        parts = found.setdefault(name, (own.rpartition(".")[0], {}))[1]
        parts[part] = tensor
        if len(forms) > 1:
            raise InputError(f"{path}: names tensors as two versions of the model do; keep one")
    _check_agree(settings, slots, found, newer=True in forms)
    return found


def _place(key: str) -> tuple[str, str]:
    """The tensor of the model that an adapter's tensor belongs to, by the file's name, and which
    part of it this is."""
    own = key.removeprefix(PREFIX) if key.startswith(PREFIX) else ""
    for end in (A, B, EMBEDDING_A, EMBEDDING_B):
        if own.endswith(end):
            return own.removesuffix(end) + ".weight", end
    module, _, last = own.rpartition(".")
    if module.endswith(BASE):
        return f"{module.removesuffix(BASE)}.{last}", BASE
    return own, WHOLE


def _check_place(path: Path, key: str, part: str, slot: table.Slot | None) -> None:
    """Refuses a tensor that the model has no place for, or none of this kind."""
    embedding = slot is not None and slot.name == EMBEDDING
    fits = {
        WHOLE: True,
        BASE: slot is not None and slot.name in (HEAD, EMBEDDING),
        **dict.fromkeys((A, B), not embedding and slot is not None and len(slot.shape) > 1),
        **dict.fromkeys((EMBEDDING_A, EMBEDDING_B), embedding),
    }
    if slot is None or not fits[part]:
        raise InputError(
            f"{path}: {quoted(key)} has no place in this model; is the adapter of another one?"
        )


def _check_tied(settings: Settings, key: str, part: str, name: str) -> None:
    """lm_head and embed_tokens are one tensor here: refuses what changes one of them alone."""
    both = name == EMBEDDING and not part and settings.ensure_weight_tying
    if name in (HEAD, EMBEDDING) and not both:
        raise InputError(
            f"{settings.path.with_name(WEIGHTS)}: {quoted(key)} changes one of lm_head and"
            " embed_tokens, which are one tensor in this model (tie_word_embeddings); merge the"
            " adapter in PEFT, or list embed_tokens in modules_to_save with ensure_weight_tying"
        )


def _check_agree(
    settings: Settings,
    slots: dict[str, table.Slot],
    found: dict[str, tuple[str, Parts]],
    newer: bool,
) -> None:
    said, weights = settings.path, settings.path.with_name(WEIGHTS)
    above, anything = set(), False
    for name, slot in slots.items():
        module = (table.newer_name(name) if newer else name).rpartition(".")[0]
        above |= {module[:i] for i, letter in enumerate(module) if letter == "."}
        parts = found.get(name, ("", {}))[1]
        updated = _check_update(settings, module, name, parts)
        linear = name != EMBEDDING and len(slot.shape) == 2
        wanted = settings.targets(module, linear=linear)
        if updated and not wanted:
            raise InputError(
                f"{weights}: has an update of {quoted(module)}, which target_modules and the"
                f" settings beside it in {CONFIG} don't name; save the adapter again"
            )
        anything = anything or wanted
        optional = settings.all_linear() and name == HEAD  # PEFT asks the model's class
        if wanted and not updated and name.endswith(".weight") and not optional:
            raise InputError(
                f"{said}: target_modules names {quoted(module)}, and {WEIGHTS} has no update of it;"
                " save the adapter again"
            )
        _check_whole(settings, module, name, parts)
    if not anything:
        raise InputError(f"{said}: target_modules names no module of this model")
    for module in sorted(above):
        if settings.targets(module, linear=False):
            raise InputError(f"{said}: target_modules names {quoted(module)}, which is no layer")


def _check_update(settings: Settings, module: str, name: str, parts: Parts) -> bool:
    """Whether there is an update, both halves of it and of the rank that the settings say."""
    halves = [parts[end] for end in (A, B, EMBEDDING_A, EMBEDDING_B) if end in parts]
    if not halves:
        return False
    if len(halves) != 2 or halves[0].shape[0] != halves[1].shape[1]:
        raise InputError(
            f"{settings.path.with_name(WEIGHTS)}: of {quoted(name)} lora_A and lora_B don't fit"
            " each other; save the adapter again"
        )
    if (rank := halves[0].shape[0]) != settings.rank(module):
        raise InputError(
            f"{settings.path}: r or rank_pattern gives {quoted(module)} the rank"
            f" {settings.rank(module)}, and {WEIGHTS} has {rank}; save the adapter again"
        )
    return True


def _check_whole(settings: Settings, module: str, name: str, parts: Parts) -> None:
    whole = [part for part in (WHOLE, BASE) if part in parts]
    updated, saved = len(parts) > len(whole), settings.saves(module)
    if saved and updated:
        raise InputError(
            f"{settings.path}: modules_to_save and target_modules both name {quoted(module)}"
        )
    if saved and not whole:
        raise InputError(
            f"{settings.path}: modules_to_save names {quoted(module)}, and {WEIGHTS} lacks"
            f" {quoted(name)}; save the adapter again"
        )
    # Without being asked PEFT saves what a new vocabulary changes. Beside an update it looks for
    # the base's values under another name than elsewhere.
    explained = saved or name in (HEAD, EMBEDDING)
    if whole and not (explained and whole == [BASE if updated else WHOLE]):
        raise InputError(
            f"{settings.path.with_name(WEIGHTS)}: has {quoted(name)} whole, which modules_to_save"
            f" in {CONFIG} doesn't name; save the adapter again"
        )


def _check_tensor(
    path: Path, key: str, tensor: sources.Tensor, slot: table.Slot, part: str
) -> None:
    shape, wanted = tensor.shape, slot.shape
    if part in (A, EMBEDDING_A):
        columns = wanted[1:] if part == A else wanted[:1]
        wanted = (shape[0] if shape else 0, *columns)
    elif part in (B, EMBEDDING_B):
        rows = wanted[0] if part == B else wanted[1]
        wanted = (rows, shape[1] if len(shape) > 1 else 0, *(1 for _ in wanted[2:]))
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
