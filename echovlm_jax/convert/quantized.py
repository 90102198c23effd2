"""Checkpoints whose weights are quantized: told apart, and refused with what to do.

Their tensors have other names and shapes than the model's, each method's own; without this they
would be "missing".
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from echovlm_jax.convert import source as sources
from echovlm_jax.convert.table import quoted
from echovlm_jax.errors import InputError
from echovlm_jax.storage.layout import CONFIG

# Where programs say how they quantized: a part of config.json, or a file of its own.
_PARTS = ("quantization_config", "compression_config")
_FILES = (
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


def refuse_quantized(folder: Path) -> None:
    """Refuses a checkpoint whose config.json, or a file beside it, says that it is quantized.

    Raises:
      InputError: it does; the message says how.
    """
    path = folder / CONFIG
    raw = sources.read_json(path) if path.is_file() else None
    for part in (raw, raw.get("text_config")) if isinstance(raw, dict) else ():
        for key in _PARTS:
            if isinstance(part, dict) and _says_something(part.get(key)):
                raise InputError(
                    f"{path}: {key} says that the weights are quantized ({_method(part[key])});"
                    f" {_MEND}, and remove {key} if the weights are not"
                )
    for name in _FILES:
        path = folder / name
        if path.is_file() and _says_something(told := sources.read_json(path)):
            raise InputError(
                f"{path}: says that the weights are quantized ({_method(told)}); {_MEND}, and"
                " remove the file if the weights are not"
            )


def refuse_quantized_tensors(source: sources.Source) -> None:
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
