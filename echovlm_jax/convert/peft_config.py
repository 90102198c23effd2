"""What an adapter_config.json asks for, by PEFT's own rules.

Every setting is known by name. What can change a merged weight is applied as PEFT applies it, or
refused; what this doesn't know is refused unless it says nothing. Nothing here needs PEFT.
https://huggingface.co/docs/peft/package_reference/lora
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echovlm_jax.convert import source as sources
from echovlm_jax.convert.table import quoted
from echovlm_jax.errors import InputError
from echovlm_jax.patterns import Pattern

# Settings that are read below, with PEFT's defaults.
APPLIED: dict[str, Any] = {
    "peft_type": None,
    "task_type": None,
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    "ensure_weight_tying": False,
    "bias": "none",
    "init_lora_weights": True,
}
# Settings that no merged weight depends on, whatever they say: where an adapter comes from, how it
# trained, and details of methods that are refused when another setting chooses them.
WITHOUT_EFFECT: dict[str, Any] = {
    "auto_mapping": None,
    "peft_version": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": False,
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,  # PEFT itself sets it to what the layer is
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "runtime_config": None,
}
# Settings that ask for another sum than W + scale · B A, refused unless they say nothing.
REFUSED: dict[str, Any] = {
    "use_dora": False,
    "lora_bias": False,
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "megatron_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
}
# Ways to begin that leave the base's weights as they are; the others (pissa, olora, corda, loftq,
# lora_ga) take away from the base what they put into the adapter.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
# A model for one of the other tasks has another head in lm_head's place.
_TASKS = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
ALL_LINEAR = "all-linear"
# What PEFT makes of an expression before it matches a module's name.
_INSIDE, _ENDING = r"(^|.*\.){}($|\..*)", r"(.*\.)?({})$"
_LAYER, _ANY_LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", r".*?\.[^.]*\.(?P<idx>\d+)\."
_FORMS = {
    "modules_to_save": _INSIDE,
    "layers_pattern": _LAYER,
    "rank_pattern": _ENDING,
    "alpha_pattern": _ENDING,
}


@dataclass(frozen=True)
class Settings:
    """The settings that are applied, checked; module names are those of the adapter's file."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: str | list[str]
    exclude_modules: str | list[str]
    layers_to_transform: list[int]
    layers_pattern: list[str]
    modules_to_save: list[str]
    ensure_weight_tying: bool
    path: Path = field(compare=False)
    # Each expression that the settings hold, as PEFT completes it.
    patterns: dict[str, Pattern] = field(compare=False)

    def all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def targets(self, module: str, *, linear: bool) -> bool:
        """Whether a module has an update; `linear` says that it is a linear layer."""
        if self._named(self.exclude_modules, module) or any(
            self.patterns[_INSIDE.format(one)].find(module, "match") for one in self.modules_to_save
        ):
            return False
        if self.all_linear():
            return linear
        return self._named(self.target_modules, module) and self._in_layers(module)

    def _named(self, names: str | list[str], module: str) -> bool:
        """A string is a pattern of whole names; of a list, each is a name or the end of one."""
        if isinstance(names, str):
            return bool(names) and self.patterns[names].find(module, "fullmatch") is not None
        return module in names or any(module.endswith(f".{one}") for one in names)

    def _in_layers(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        # The first number in a name is the layer's; an expert's comes after it.
        found = None
        for one in [_LAYER.format(one) for one in self.layers_pattern] or [_ANY_LAYER]:
            if found := self.patterns[one].find(module, "match"):
                break
        index = found.get("idx") if found else None
        return index is not None and int(index) in self.layers_to_transform

    def saves(self, module: str) -> bool:
        """Whether a module, or one that it lies in, is in the file whole."""
        parts = module.split(".")
        above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(one.endswith(end) for one in above for end in self.modules_to_save)

    def rank(self, module: str) -> int:
        return self.rank_pattern.get(self._first(self.rank_pattern, module), self.r)

    def _first(self, endings: dict[str, Any], module: str) -> str:
        """The first pattern that a module's name ends with; the name itself where none does."""
        own = ((one, self.patterns[_ENDING.format(one)]) for one in endings)
        return next((one for one, pattern in own if pattern.find(module, "match")), module)

    def scale(self, module: str) -> float:
        """What B A is multiplied with beside a module."""
        alpha = self.alpha_pattern.get(self._first(self.alpha_pattern, module), self.lora_alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_settings(path: Path) -> Settings:
    """Reads an adapter_config.json.

    Raises:
      InputError: it is no adapter's, or asks for something that is not applied; the message names
        the setting.
    """
    told = sources.read_json(path)
    if not isinstance(told, dict):
        raise InputError(f"{path}: is not a JSON object; save the adapter again")
    try:
        _refuse_other_kinds(told)
        checked = _checked(told)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Settings(**checked, path=path, patterns=_patterns(checked, path))


def _refuse_other_kinds(told: dict[str, Any]) -> None:
    kind = told.get("peft_type")
    if kind != "LORA":
        raise InputError(f"peft_type is {quoted(kind)}; only LORA is read")
    if (task := told.get("task_type")) not in _TASKS:
        raise InputError(
            f"task_type is {quoted(task)}; read are {', '.join(filter(None, _TASKS))} and null"
        )
    if (bias := told.get("bias", "none")) != "none":
        raise InputError(f"bias is {quoted(bias)}; only none is read; merge the adapter in PEFT")
    begun = told.get("init_lora_weights", True)
    if not any(begun is one or (isinstance(begun, str) and begun == one) for one in _BEGINNINGS):
        raise InputError(
            f"init_lora_weights is {quoted(begun)}, which may change the base's weights; save the"
            " adapter with path_initial_model_for_weight_conversion, or merge it in PEFT"
        )
    for key, value in told.items():
        if key in APPLIED or key in WITHOUT_EFFECT or _says_nothing(value):
            continue
        why = "is not read" if key in REFUSED else "is not known here"
        raise InputError(
            f"{quoted(key)} is {quoted(value)}, which {why}; merge the adapter in PEFT"
        )


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _checked(told: dict[str, Any]) -> dict[str, Any]:
    told = {**APPLIED, **told}
    targets = told["target_modules"]
    if targets is None:
        raise InputError("target_modules is null; name the modules that have updates")
    # PEFT leaves it open whether an empty list means no layer or all.
    layers = told["layers_to_transform"]
    layers = [layers] if type(layers) is int else [] if layers is None else layers
    if not isinstance(layers, list) or not all(type(one) is int for one in layers):
        raise InputError(f"layers_to_transform is {quoted(layers)}; give whole numbers")
    pattern = _names(told, "layers_pattern")
    pattern = [pattern] if isinstance(pattern, str) else pattern
    pattern = [one for one in pattern if one]
    if (layers or pattern) and isinstance(targets, str):
        raise InputError("layers_to_transform and layers_pattern need target_modules to be a list")
    if pattern and told["layers_to_transform"] is None:
        raise InputError("layers_pattern needs layers_to_transform")
    saved = _names(told, "modules_to_save")
    if isinstance(saved, str) and saved:
        raise InputError(f"modules_to_save is {quoted(saved)}; give a list of names")
    if "" in saved:
        raise InputError("modules_to_save has an empty name, which is every module's ending")
    for key in ("use_rslora", "ensure_weight_tying"):
        if not isinstance(told[key] or False, bool):
            raise InputError(f"{key} is {quoted(told[key])}; it must be true or false")
    return {
        "r": _rank(told["r"], "r"),
        "lora_alpha": _alpha(told["lora_alpha"], "lora_alpha"),
        "use_rslora": bool(told["use_rslora"]),
        "rank_pattern": _by_pattern(told, "rank_pattern", _rank),
        "alpha_pattern": _by_pattern(told, "alpha_pattern", _alpha),
        "target_modules": _names(told, "target_modules"),
        "exclude_modules": _names(told, "exclude_modules"),
        "layers_to_transform": layers,
        "layers_pattern": pattern,
        "modules_to_save": list(saved),
        "ensure_weight_tying": bool(told["ensure_weight_tying"]),
    }


def _names(told: dict[str, Any], key: str) -> str | list[str]:
    value = told[key]
    if value is None:
        return []
    if isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(one, str) for one in value)
    ):
        return value
    raise InputError(f"{key} is {quoted(value)}; give a list of names, or a pattern")


def _rank(value: Any, key: str) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise InputError(f"{key} is {quoted(value)}; a rank is a whole number of at least 1")
    return value


def _alpha(value: Any, key: str) -> float:
    try:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise InputError(f"{key} is no number: {quoted(value)}")


def _by_pattern(told: dict[str, Any], key: str, check: Any) -> dict[str, Any]:
    value = told[key] if told[key] is not None else {}
    if not isinstance(value, dict):
        raise InputError(f"{key} is {quoted(value)}; give an object of patterns")
    return {pattern: check(own, f"{key} {quoted(pattern)}") for pattern, own in value.items()}


def _patterns(checked: dict[str, Any], path: Path) -> dict[str, Pattern]:
    """The expressions of `_checked` settings, by what PEFT makes of them."""
    found = [(_ANY_LAYER, "layers_to_transform")]
    for key in ("target_modules", "exclude_modules"):
        found += [(checked[key], key)] if isinstance(checked[key], str) else []
    for key, form in _FORMS.items():
        found += [(form.format(one), key) for one in checked[key]]
    return {text: Pattern(text, f"{path}: {key}, {quoted(text)}") for text, key in found}
