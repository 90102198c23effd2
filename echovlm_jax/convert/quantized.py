"""Checkpoints whose weights are quantized: told apart, read as floats, or refused with what to do.

Their tensors have other names and shapes than the model's, each method's own. What config.json says
decides how they are read; nothing is found out by trying.
"""

import functools
import math
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from echovlm_jax.convert import dequantize
from echovlm_jax.convert import source as sources
from echovlm_jax.convert.table import quoted, released_name
from echovlm_jax.errors import InputError
from echovlm_jax.storage.layout import CONFIG

# Where programs say how they quantized: a part of config.json, or a file of its own.
_PARTS = ("quantization_config", "compression_config")
QUANTIZED_FILES = (
    *("quantize_config.json", "quant_config.json", "quantization_config.json"),
    "hf_quant_config.json",
)
_BITS = ("bits", "w_bit", "wbits", "weight_bits")

# What a method leaves beside or instead of X.weight, as ends of tensor names; the first of them
# that a checkpoint has names it.
_METHODS = (
    ("GPTQ", r"\.g_idx"),
    ("AWQ or GPTQ", r"\.(qweight|qzeros|scales)"),
    ("bitsandbytes, 8 bit", r"\.(SCB|CB|weight_format)"),
    ("bitsandbytes, 4 bit", r"\.(nested_)?(absmax|quant_map)|\.quant_state\..*"),
    ("compressed-tensors", r"\.weight_(packed|shape|zero_point|g_idx|global_scale)"),
    ("fp8", r"\.weight_scale_inv|\.(input|weight|activation|k|v)_scale(_2)?"),
    ("AQLM, VPTQ or SpQR", r"\.(codes|codebooks|centroids|indices|dense_weights)"),
    ("HQQ", r"\.W_q"),
    ("a method with zero points", r"\.(zero_points?|smooth_scale|act_scale)"),
    ("quanto or torchao", r"\.weight(\._(data|scale|shift)|_qdata)"),
    ("MXFP4", r"_(blocks|scales)"),
    ("GGUF or EETQ", r"\.weight_scales|\.qtype"),
)
_MEND = (
    "give the checkpoint that it was made from, in bfloat16, float16 or float32, or write one with"
    " dequantize() and save_pretrained() of transformers"
)


# The methods that are read, with the ends of their tensors' names.
_ENDS = {
    "awq": r"qweight|qzeros|scales",
    "gptq": r"qweight|qzeros|scales|g_idx",
    "compressed-tensors": r"weight_(?:packed|scale|zero_point|shape|g_idx)",
    "bitsandbytes": r"weight\.(?:(?:nested_)?(?:absmax|quant_map)|quant_state\.\w+)"
    r"|SCB|weight_format",
}
# Of compressed-tensors, for rounding activations, which nothing here does.
_ACTIVATIONS = re.compile(r".*\.(input|output|[qkv])_(scale|zero_point)")
# The settings that say what the tensors mean, with the values that `dequantize` knows.
_KNOWN: dict[str, dict[str, tuple[Any, ...]]] = {
    "awq": {"bits": (4,), "version": ("gemm",), "format": ("gemm",)},
    "gptq": {
        "bits": (2, 3, 4, 8),
        "checkpoint_format": ("gptq", "gptq_v2"),
        "format": ("gptq", "gptq_v2"),
        "is_marlin_format": (False,),
        "pack_dtype": ("int32",),
        "desc_act": (False, True),
        "adapter": (),  # low-rank updates of its own
    },
    "compressed-tensors": {
        "format": ("pack-quantized", "int-quantized", "naive-quantized"),
        "transform_config": (),  # rotations of activations
    },
    "bitsandbytes": {},
}
_KNOWN_WEIGHTS = {
    "num_bits": (2, 4, 8),
    "type": ("int",),
    "symmetric": (False, True),
    "strategy": ("tensor", "channel", "group"),
    "actorder": (False, "weight", "static", "group", "dynamic"),
}


@dataclass(frozen=True)
class Method:
    """How a checkpoint says that it is quantized.

    Attributes:
      path, key: the file and its key.
      name: of `_ENDS`.
      said: the method and its width, as the file says.
      told: the settings that `dequantize` reads.
    """

    path: Path
    key: str
    name: str
    said: str
    told: Mapping[str, Any]

    def fault(self, what: str) -> InputError:
        return InputError(
            f"{self.path}: {self.key} says that the weights are quantized ({self.said}), {what};"
            f" {_MEND}"
        )


def quantization(folder: Path) -> Method | None:
    """How a checkpoint is quantized, as its config.json says; None where nothing says that it is.

    Raises:
      InputError: it is in a way that isn't read, or a file beside config.json alone says so.
    """
    path = folder / CONFIG
    found = sources.read_json(path) if path.is_file() else None
    raw = found if isinstance(found, dict) else {}
    for part in (raw, raw.get("text_config")):
        for key in _PARTS:
            if isinstance(part, dict) and _says_something(told := part.get(key)):
                return _method_of_config(path, key, told, raw)
    for name in QUANTIZED_FILES:
        path = folder / name
        if path.is_file() and _says_something(told := sources.read_json(path)):
            raise InputError(
                f"{path}: says that the weights are quantized ({_method(told)}), and {CONFIG} does"
                f" not; {_MEND}, and remove the file if the weights are not"
            )
    return None


def _method_of_config(path: Path, key: str, told: Any, raw: Mapping[str, Any]) -> Method:
    name = str(told.get("quant_method")) if isinstance(told, Mapping) else ""
    if name == "None" and key == "compression_config":
        name = "compressed-tensors"
    method = Method(path, key, name, _method(told), told)
    if name not in _ENDS:
        raise method.fault(f"and only {', '.join(_ENDS)} are read")
    _check(method, told, _KNOWN[method.name])
    if name == "bitsandbytes":
        text = raw.get("text_config")
        parts = (raw, text) if isinstance(text, Mapping) else (raw,)
        found = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
        known = next((one for one in found if one in sources.WEIGHT_DTYPES), None)
        return replace(method, told={"dtype": np.dtype(jnp.dtype(known)) if known else None})
    if name == "compressed-tensors":
        return replace(method, told=_weights(method))
    _check_size(method, told, "bits", "group_size")
    forms = {str(told.get(key) or "").lower() for key in ("checkpoint_format", "format")} - {""}
    if len(forms) > 1:
        raise method.fault("and checkpoint_format and format differ, which is not read")
    rules = told.get("dynamic") or {}
    if not isinstance(rules, Mapping) or not all(rule.startswith("-:") for rule in rules):
        raise method.fault("some modules in another way (dynamic), which is not read")
    return method


def _weights(method: Method) -> Mapping[str, Any]:
    """What compressed-tensors' config_groups say of weights: the same in all of them."""
    sparsity = method.told.get("sparsity_config")
    if _says_something(sparsity) and not (
        isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"
    ):
        raise method.fault("and they are sparse (sparsity_config), which is not read")
    groups = method.told.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    if not groups or not all(isinstance(group, Mapping) for group in groups):
        raise method.fault("and config_groups does not say how")
    found = []
    for group in groups:
        _check(method, {"format": group.get("format")}, _KNOWN[method.name])
        weights = group.get("weights")
        if not isinstance(weights, Mapping):
            raise method.fault("and a config_group does not say how weights are")
        size = weights.get("group_size")
        inferred = "tensor" if size is None else "channel" if size == -1 else "group"
        told = {
            "num_bits": weights.get("num_bits"),
            "type": weights.get("type") or "int",
            "symmetric": weights.get("symmetric") is not False,
            "strategy": weights.get("strategy") or inferred,
            "group_size": size,
            "actorder": weights.get("actorder"),
        }
        _check(method, {**told, "symmetric": weights.get("symmetric")}, _KNOWN_WEIGHTS)
        sized = ("group_size",) if told["strategy"] == "group" else ()
        _check_size(method, told, "num_bits", *sized, least=1)
        found.append(told)
    if any(one != found[0] for one in found):
        raise method.fault("and its config_groups differ, which is not read")
    return found[0]


def _check(method: Method, told: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses a value that isn't known. One that says nothing stands for the method's default."""
    for key, values in known.items():
        value = told.get(key)
        same = value.lower() if isinstance(value, str) else value
        if _says_something(value) and not any(
            type(same) is type(one) and same == one for one in values
        ):
            only = f" ({', '.join(map(str, values))} are)" if values else ""
            raise method.fault(f"with {key} {quoted(value)}, which is not read{only}")


def _check_size(method: Method, told: Mapping[str, Any], *keys: str, least: int = -1) -> None:
    for key in keys:
        value = told.get(key)
        if type(value) is not int or value < least or value == 0:
            raise method.fault(f"and {key} is {quoted(value)}, which is not a size")


def dequantized(
    source: sources.Source, method: Method | None, wanted: Container[str]
) -> sources.Source:
    """A checkpoint as if its weights weren't quantized: `X.weight` in the place of what makes it.

    Opening reads a few numbers of each module; the values are computed as they are read, out of the
    stored tensors of one module at a time.

    Args:
      source: the checkpoint as it is stored.
      method: what `quantization` says of it.
      wanted: the released names of the model's tensors.

    Raises:
      InputError: what is stored of a module is not what its method stores, none is quantized, or
        tensors are in a way that `method` is not.
    """
    tensors = dict(source.tensors)
    modules = _modules(source, method) if method else {}

    @functools.lru_cache(maxsize=1)
    def stored(name: str) -> dict[str, np.ndarray]:
        return {
            part: tensor.read(0, math.prod(tensor.shape)).reshape(tensor.shape)
            for part, tensor in modules[name].tensors.items()
        }

    for name, module in modules.items():
        assert method is not None
        weight = _LAYOUTS[method.name](module, method.told)
        for part in weight.parts:
            del tensors[f"{name}.{part}"]
        if f"{name}.weight" in tensors:
            raise module.fault("weight", f"is there beside {', '.join(weight.parts)}")
        tensors[f"{name}.weight"] = dequantize.as_tensor(module, weight, stored)
    if method and method.name == "gptq":
        for name in _zero_biases(tensors, modules, wanted):
            del tensors[name]
    if method and method.name == "compressed-tensors":
        tensors = {name: one for name, one in tensors.items() if not _ACTIVATIONS.fullmatch(name)}
    _refuse_quantized_tensors(replace(source, tensors=tensors))
    if method and not modules:
        raise method.fault(f"and no tensor is; remove {method.key} if none should be")
    return replace(source, tensors=tensors, quantized=method.said if method else None)


def _modules(source: sources.Source, method: Method) -> dict[str, dequantize.Module]:
    """The quantized modules by name, each with the stored tensors of it."""
    pattern = re.compile(rf"(.+)\.({_ENDS[method.name]})")
    found: dict[str, dict[str, sources.Tensor]] = {}
    for name, tensor in source.tensors.items():
        if part := pattern.fullmatch(name):
            found.setdefault(part[1], {})[part[2]] = tensor
    for name, parts in found.items():
        if (weight := source.tensors.get(f"{name}.weight")) and "qweight" not in parts:
            parts["weight"] = weight
    return {name: dequantize.Module(source.folder, name, parts) for name, parts in found.items()}


def _zero_biases(
    tensors: Mapping[str, sources.Tensor], modules: Iterable[str], wanted: Container[str]
) -> list[str]:
    """The biases that the model has no place for and that change nothing: AutoGPTQ's programs gave
    one to every module, of zeros where there was none."""
    found = []
    for name in (f"{module}.bias" for module in modules):
        if released_name(name) not in wanted and (bias := tensors.get(name)) is not None:
            values = bias.read(0, math.prod(bias.shape))
            if not values.astype(np.float32).any():
                found.append(name)
    return found


def _bitsandbytes(module: dequantize.Module, told: Mapping[str, Any]) -> dequantize.Weight:
    eight = "SCB" in module.tensors or "weight_format" in module.tensors
    layout = dequantize.bitsandbytes_8bit if eight else dequantize.bitsandbytes_4bit
    return layout(module, told)


_LAYOUTS = {
    "awq": dequantize.awq,
    "gptq": dequantize.gptq,
    "compressed-tensors": dequantize.compressed_tensors,
    "bitsandbytes": _bitsandbytes,
}


def without_quantization(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model in floats."""
    text = raw.get("text_config")
    own = {"text_config": without_quantization(text)} if isinstance(text, dict) else {}
    return {key: value for key, value in {**raw, **own}.items() if key not in _PARTS}


def _refuse_quantized_tensors(source: sources.Source) -> None:
    """Refuses a checkpoint whose tensors are a quantization method's, by their names or dtypes.

    Raises:
      InputError: they are; the message names one.
    """
    name = None
    method = _method_of(source.tensors)
    if method is not None:
        method, name = method
    else:
        for name, tensor in source.tensors.items():
            kind = tensor.dtype.name
            if name.endswith(".weight") and (tensor.dtype.kind in "iub" or "float8" in kind):
                method = kind
                break
    if method is not None:
        raise InputError(
            f"{source.folder}: the weights are quantized ({method}; tensor {quoted(name)}); {_MEND}"
        )


def _method_of(names: Iterable[str]) -> tuple[str, str] | None:
    for method, ends in _METHODS:
        pattern = re.compile(rf".*({ends})$")
        for name in names:
            if pattern.match(name):
                return method, name
    return None


def _says_something(value: Any) -> bool:
    """A null, an empty object, and one of nulls say nothing."""
    if isinstance(value, Mapping):
        return any(map(_says_something, value.values()))
    return value is not None and value != []


def _method(told: Any) -> str:
    """The method and how wide its weights are, as far as the settings say."""
    if not isinstance(told, Mapping):
        return quoted(told)
    kind = told.get("quant_method") or told.get("quant_algo") or told.get("format")
    bits = next((told[key] for key in _BITS if told.get(key) is not None), None)
    for key, width in (("load_in_4bit", 4), ("_load_in_4bit", 4), ("load_in_8bit", 8)):
        if bits is None and told.get(key) is True:
            bits = width
    said = [quoted(kind) if kind else "by a method that it doesn't name"]
    return ", ".join([*said, *([f"{quoted(bits)} bit"] if bits is not None else [])])
