"""The one table between a PyTorch checkpoint's tensor names and our parameter paths.

Weights keep PyTorch's [out, in] order on our side, so a parameter is a stack, over layers and
experts, of reshaped checkpoint tensors: converting either way moves bytes and computes nothing.
Every expected shape is derived from `model.param_specs`; none is written here.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import traverse_util

from echovlm_jax.config import ModelConfig
from echovlm_jax.errors import InputError
from echovlm_jax.model import param_specs


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
      name: the checkpoint's tensor name; {l} and {e} stand for a layer and an expert, and each of
        them is one leading axis of our parameter.
      path: our parameter.
      merged: whether our outputs are one axis of the checkpoint, and our inputs another; those of
        its convolution are not.
    """

    name: str
    path: str
    merged: bool = True


def _biased(name: str, path: str, weight: str = "kernel") -> tuple[Row, Row]:
    return Row(f"{name}.weight", f"{path}/{weight}"), Row(f"{name}.bias", f"{path}/bias")


def _gated(name: str, path: str, bias: bool = False) -> tuple[Row, ...]:
    parts = (_biased(f"{name}.{part}_proj", f"{path}/{part}") for part in ("gate", "up", "down"))
    return tuple(row for pair in parts for row in pair[: 1 + bias])


_BLOCK, _OUR_BLOCK = "visual.blocks.{l}", "vision/blocks"
_LAYER, _OUR_LAYER = "model.layers.{l}", "text/layers"

TABLE: tuple[Row, ...] = (
    Row("visual.patch_embed.proj.weight", "vision/patch_embed/kernel", merged=False),
    *_biased(f"{_BLOCK}.norm1", f"{_OUR_BLOCK}/norm1", "scale"),
    *_biased(f"{_BLOCK}.attn.qkv", f"{_OUR_BLOCK}/attn/qkv"),
    *_biased(f"{_BLOCK}.attn.proj", f"{_OUR_BLOCK}/attn/proj"),
    *_biased(f"{_BLOCK}.norm2", f"{_OUR_BLOCK}/norm2", "scale"),
    *_biased(f"{_BLOCK}.mlp.fc1", f"{_OUR_BLOCK}/mlp/fc1"),
    *_biased(f"{_BLOCK}.mlp.fc2", f"{_OUR_BLOCK}/mlp/fc2"),
    *_gated(f"{_BLOCK}.mlp", f"{_OUR_BLOCK}/mlp", bias=True),
    *_biased("visual.merger.ln_q", "vision/merger/ln_q", "scale"),
    *_biased("visual.merger.mlp.0", "vision/merger/fc1"),
    *_biased("visual.merger.mlp.2", "vision/merger/fc2"),
    Row("model.embed_tokens.weight", "text/embed/embedding"),
    Row(f"{_LAYER}.input_layernorm.weight", f"{_OUR_LAYER}/attn_norm/scale"),
    *_biased(f"{_LAYER}.self_attn.q_proj", f"{_OUR_LAYER}/attn/q"),
    *_biased(f"{_LAYER}.self_attn.k_proj", f"{_OUR_LAYER}/attn/k"),
    *_biased(f"{_LAYER}.self_attn.v_proj", f"{_OUR_LAYER}/attn/v"),
    Row(f"{_LAYER}.self_attn.o_proj.weight", f"{_OUR_LAYER}/attn/o/kernel"),
    Row(f"{_LAYER}.post_attention_layernorm.weight", f"{_OUR_LAYER}/mlp_norm/scale"),
    *_gated(f"{_LAYER}.mlp", f"{_OUR_LAYER}/mlp"),
    Row(f"{_LAYER}.moe.gate.weight", f"{_OUR_LAYER}/moe/router/kernel"),
    *_gated(f"{_LAYER}.moe.experts.{{e}}", f"{_OUR_LAYER}/moe/experts"),
    *_gated(f"{_LAYER}.moe.shared_expert", f"{_OUR_LAYER}/moe/shared"),
    Row(f"{_LAYER}.moe.shared_expert_gate.weight", f"{_OUR_LAYER}/moe/shared_gate/kernel"),
    *_biased(f"{_LAYER}.coefficient", f"{_OUR_LAYER}/coefficient"),
    Row("model.norm.weight", "text/final_norm/scale"),
    Row("lm_head.weight", "text/lm_head/kernel"),
)

# What newer exporters write in front, and the released form of it.
_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))
# Tables of rotary frequencies that some exporters store: computed from the config, never loaded.
_BUFFER = re.compile(r"(^|\.)rotary(_pos)?_emb\.(original_)?inv_freq$")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Slot:
    """Where one checkpoint tensor lives in our tree.

    Attributes:
      name: the tensor's released name.
      path: our parameter, e.g. "text/layers/attn/q/kernel".
      index: its place on the parameter's stacked axes; empty where nothing is stacked.
      shape: the tensor's shape in the checkpoint.
      part: the same values as the parameter's remaining axes.
    """

    name: str
    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    part: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Match:
    """A checkpoint's tensors, all accounted for.

    Attributes:
      found: released name → the name in the checkpoint.
      ignored: buffers that nothing loads, by the checkpoint's name.
      duplicates: a tied checkpoint's lm_head, by the released name → the embedding's. Its bytes are
        still to be compared.
    """

    found: dict[str, str]
    ignored: list[str]
    duplicates: dict[str, str]


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict as {"a/b/c": leaf}."""
    return traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict that `flatten` came from."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's path and shape."""
    return {path: spec.shape for path, spec in param_specs(config).items()}


def slots(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor that a checkpoint of this configuration holds, by released name.

    Raises KeyError for a parameter without a row: the table is then incomplete.
    """
    specs = param_specs(config)
    out: dict[str, Slot] = {}
    for row in TABLE:
        if (spec := specs.pop(row.path, None)) is None:
            continue
        stacked, outputs, inputs = spec.cut(spec.shape)
        part = outputs + inputs
        shape = tuple(math.prod(axes) for axes in (outputs, inputs) if axes)
        for index in np.ndindex(stacked):
            name = row.name.format(**dict(zip("le", index, strict=False)))
            place = tuple(int(i) for i in index)
            out[name] = Slot(name, row.path, place, shape if row.merged else part, part)
    if specs:
        raise KeyError(f"no row for the parameters {sorted(specs)}")
    return out


def released_name(name: str) -> str:
    """The released form of a tensor name: newer exporters' prefixes taken off."""
    for new, old in _PREFIXES:
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def newer_name(name: str) -> str:
    """`released_name`'s way back: a released name as newer exporters write it."""
    for new, old in _PREFIXES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def match(wanted: Mapping[str, Slot], shapes: Mapping[str, tuple[int, ...]], where: str) -> Match:
    """Pairs a checkpoint's tensors with the slots that the configuration asks for.

    Args:
      wanted: the result of `slots`.
      shapes: the checkpoint's tensor names and shapes.
      where: the checkpoint, for errors.

    Raises:
      InputError: a tensor is missing, unexpected, there under two names, or of another shape.
    """
    found: dict[str, str] = {}
    ignored, unexpected = [], []
    duplicates: dict[str, str] = {}
    for name in shapes:
        released = released_name(name)
        if released in found:
            raise InputError(
                f"{where}: {found[released]} and {name} are the same parameter; keep one of them"
            )
        if released in wanted:
            found[released] = name
        elif _BUFFER.search(released):
            ignored.append(name)
        elif released == HEAD and EMBEDDING in wanted:
            duplicates[name] = EMBEDDING
        else:
            unexpected.append(name)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(
            f"{where}: missing {_listed(missing)}; config.json asks for it: use the checkpoint's"
            " own config.json and all of its files"
        )
    if unexpected:
        raise InputError(
            f"{where}: unexpected {_listed(unexpected)}; config.json has no place for it: use the"
            " checkpoint's own config.json"
        )
    for released, name in [*found.items(), *((EMBEDDING, name) for name in duplicates)]:
        expected, actual = wanted[released].shape, tuple(shapes[name])
        if expected != actual:
            raise InputError(
                f"{where}: {name} has shape {list(actual)}, expected {list(expected)} by"
                " config.json"
            )
    return Match(found, ignored, duplicates)


def _listed(names: Iterable[str]) -> str:
    """A few names and a count, on one line."""
    shown = [quoted(name) for name in names]
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    return f"{'tensor' if len(shown) == 1 else 'tensors'} {', '.join(shown[:3])}{more}"


def quoted(value: object) -> str:
    """A value out of a file as one short line, whatever it holds."""
    text = str(value)
    if not text.isprintable() or not text:
        text = repr(text)
    return text if len(text) <= 120 else f"{text[:117]}..."
