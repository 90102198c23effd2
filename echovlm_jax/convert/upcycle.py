"""A dense Qwen2-VL or Qwen2.5-VL into the EchoVLM that the first stage of training starts from.

Every decoder layer gets a second path beside its MLP and a pair of weights for the two:
out = h + c[0] · MoE(u) + c[1] · MLP(u). The work is `from_torch`'s, on a checkpoint that has the
new tensors too: they are computed when they are read, a range at a time, so that memory stays flat
and a killed run goes on where it stopped.

The function is preserved by three exact steps. The coefficient's weight and bias are zero, so
c = (1/2, 1/2). The dense down projection is doubled, and c[1] halves it again: both are exact in
floating point. The new down projections are zero, so MoE(u) = 0. Gradients live nevertheless: those
of the coefficient (from the dense path) and of the down projections at once, the router's through
the balancing loss; those of gate, up and the shared gate pass through the down projections, and so
come to life with the second update.
"""

import copy
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from echovlm_jax.config import PRESETS, ModelConfig, MoEConfig, from_hf, preset, to_hf
from echovlm_jax.convert import folder, layerwise, table
from echovlm_jax.convert import source as sources
from echovlm_jax.convert.from_torch import carry_out, identity_of
from echovlm_jax.convert.job import Conversion
from echovlm_jax.errors import InputError
from echovlm_jax.model import param_specs
from echovlm_jax.processing.batch import make_batch
from echovlm_jax.storage.files import as_path
from echovlm_jax.storage.layout import TREE

INITS = ("random", "sliced", "released")
PRESERVED = 1e-5  # the most that a logit may change where the function is preserved, in float32

_NEW = ("text/layers/moe/", "text/layers/coefficient/")
_MLP = "text/layers/mlp/"
_BLOCK = 2**16  # values that one generator makes: their place alone decides which
_TEXT_TOKENS = 40  # of the random prompt
_HEAD_ROWS = 16384  # of the output head that are in memory at once


def upcycle(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    like: MoEConfig | None = None,
    sizes: Mapping[str, int | None] | None = None,
    init: str = "random",
    seed: int = 0,
    dtype: Any = None,
) -> dict[str, Any]:
    """Makes DST, a folder as `convert` makes, and measures how far its logits are from SRC's.

    Args:
      src: a Qwen2-VL or Qwen2.5-VL in Hugging Face form.
      dst: the folder to make. As with `convert`, the same call resumes.
      like: the mixture's sizes; by default `scaled_mixture` of the source.
      sizes: num_experts, top_k, expert_mlp_dim or shared_mlp_dim to differ from `like`; None for
        no difference.
      init: "random" draws the new weights from a normal distribution, with the source's
        initializer_range (0.02 where it states none); "sliced" takes the experts' gate and up
        projections from the dense MLP's neurons, each of them once before any is taken twice. Both
        preserve the function. "released" draws every new weight, as the released training scripts
        do, and preserves nothing: the dense path starts with about half its weight.
      seed: of the random weights and of the prompt.
      dtype: bfloat16, float32 or float16 to cast to; by default the source's.

    Returns:
      `convert`'s report, with params_before, params_after, max_logit_change (over a random prompt
      with an image, in float32), max_logit_change_bound, init, moe (its sizes), and ok: whether the
      change is within the bound. That is 1e-5 where the function is preserved. Otherwise it is
      2 √D · max_v ‖final_norm · lm_head_v‖, which no prompt can exceed: the final norm leaves
      hidden states no longer than √D.

    Raises:
      InputError: as `convert`; the source has a mixture already; sizes that can't be.
    """
    if init not in INITS:
        raise InputError(f"init {init!r} is unknown; choose one of {', '.join(INITS)}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed {seed} must be a whole number of at least 0")
    target_dtype = folder.as_dtype(dtype)
    raw, before = _read_dense(as_path(src))
    changes = {key: value for key, value in (sizes or {}).items() if value is not None}
    moe = dataclasses.replace(like or scaled_mixture(before), **changes)
    after = before.replace(moe=moe)
    if init == "sliced":
        _check_slices(after)
    report = carry_out(lambda: _prepare(src, raw, after, init, seed, target_dtype), dst)
    opened = folder.open_model(src), folder.open_model(dst)
    change = logit_change(*opened, seed)
    bound = _released_bound(opened[0]) if init == "released" else PRESERVED
    counts = (sum(map(math.prod, table.leaf_shapes(c).values())) for c in (before, after))
    return {
        **report,
        **dict(zip(("params_before", "params_after"), counts, strict=True)),
        "peak_rss_bytes": folder.peak_rss_bytes(),
        "max_logit_change": change,
        "max_logit_change_bound": bound,
        "init": init,
        "moe": dataclasses.asdict(moe),
        "ok": change <= bound,  # false for a NaN
    }


def scaled_mixture(config: ModelConfig) -> MoEConfig:
    """The released mixture, its widths in the same proportion to the dense MLP's.

    The expert's width is a multiple of 128 above 1024 and of 8 below. Qwen2-VL-7B gets the released
    1408 and 5632, Qwen2-VL-2B 640 and 2560.
    """
    released = preset("echovlm_11b")
    assert released.moe is not None
    width = released.moe.expert_mlp_dim * config.text.mlp_dim / released.text.mlp_dim
    unit = 128 if config.text.mlp_dim > 1024 else 8
    expert = max(1, round(width / unit)) * unit
    shared = expert * released.moe.shared_mlp_dim // released.moe.expert_mlp_dim
    return dataclasses.replace(released.moe, expert_mlp_dim=expert, shared_mlp_dim=shared)


def read_mixture(model: str | os.PathLike[str]) -> MoEConfig:
    """The mixture of a preset, a model's folder, or a config.json.

    Raises:
      InputError: there is none.
    """
    path = as_path(model)
    if str(model) in PRESETS:
        config = preset(str(model))
    elif path.is_file():
        config = from_hf(sources.read_json(path), source=str(path))
    elif path.is_dir():
        config = folder.read_config(path)
    else:
        raise InputError(
            f"{model}: neither a preset ({', '.join(PRESETS)}) nor a folder or file; name one that"
            " says the mixture's sizes"
        )
    if config.moe is None:
        raise InputError(f"{model}: has no mixture of experts to take sizes from; try echovlm_11b")
    return config.moe


def _read_dense(src: Path) -> tuple[dict[str, Any], ModelConfig]:
    """config.json of a dense model, as it is and as ours. Raises InputError for anything else."""
    if not src.is_dir():
        raise InputError(f"{src}: no such folder; give a dense model in Hugging Face form")
    if (src / folder.PARAMS / TREE).is_file():
        raise InputError(f"{src}: was made by convert; give the Hugging Face folder, or export it")
    folder.refuse_run(src)
    config = folder.read_config(src)
    raw = sources.read_json(src / folder.CONFIG)
    if config.moe is not None:
        raise InputError(
            f"{src}: has {config.moe.num_experts} experts a layer and is an EchoVLM already; train"
            " from it as it is, or give a dense model"
        )
    return raw, config


def _check_slices(config: ModelConfig) -> None:
    assert config.moe is not None
    for key in ("expert_mlp_dim", "shared_mlp_dim"):
        if (width := getattr(config.moe, key)) > config.text.mlp_dim:
            raise InputError(
                f"{key} {width} exceeds the dense MLP's {config.text.mlp_dim} neurons: no slice is"
                " that wide; choose a smaller one, or init random"
            )


def _new_config(raw: Mapping[str, Any], after: ModelConfig) -> dict[str, Any]:
    """config.json with the mixture; all else stays as the source has it."""
    full = to_hf(after)
    new = {key: full[key] for key in full.keys() - to_hf(after.replace(moe=None)).keys()}
    out = copy.deepcopy(dict(raw))
    text = out.get("text_config")
    inside = out if not isinstance(text, dict) or "hidden_size" not in text else text
    inside.update(sorted(new.items()))
    return out | {"architectures": full["architectures"]}


# --- The tensors ----------------------------------------------------------------------------------


def _prepare(
    src: str | os.PathLike[str],
    raw: Mapping[str, Any],
    after: ModelConfig,
    init: str,
    seed: int,
    dtype: np.dtype | None,
) -> Conversion:
    source, _ = folder.open_checkpoint(src, once=True)
    dense, slots = table.slots(after.replace(moe=None)), table.slots(after)
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    match = table.match(dense, shapes, str(source.folder))
    folder.check_duplicates(source, match)
    text = raw.get("text_config")
    said = [part.get("initializer_range") for part in (text, raw) if isinstance(part, Mapping)]
    std = next((value for value in said if value is not None), 0.02)
    if isinstance(std, bool) or not isinstance(std, int | float) or not 0 < std < math.inf:
        raise InputError(
            f"{source.folder / folder.CONFIG}: initializer_range must be a number above 0, found"
            f" {table.quoted(std)}"
        )
    found = {name: source.tensors[match.found[name]] for name in dense}
    tensors = found | _new_tensors(found, slots, after, init, std, seed, dtype)
    if init != "released":
        for name in [name for name, slot in dense.items() if slot.path == f"{_MLP}down/kernel"]:
            read = _doubled(found[name].read, f"{source.folder}: {match.found[name]}")
            tensors[name] = dataclasses.replace(found[name], read=read)
    made = dataclasses.replace(source, tensors=tensors)
    own = dataclasses.replace(match, found={name: name for name in slots})
    assert after.moe is not None
    config = _new_config(raw, after)
    identity = identity_of(source, dtype) | {
        "config": hashlib.sha256(repr(sorted(config.items())).encode()).hexdigest(),
        "upcycle": {"init": init, "seed": seed, "std": std, **dataclasses.asdict(after.moe)},
    }
    dtypes = folder.leaf_dtypes(made, slots, own, dtype)
    return Conversion(made, slots, own, dtypes, param_specs(after), identity, config)


def _new_tensors(
    dense: Mapping[str, sources.Tensor],
    slots: Mapping[str, table.Slot],
    after: ModelConfig,
    init: str,
    std: float,
    seed: int,
    dtype: np.dtype | None,
) -> dict[str, sources.Tensor]:
    """Every tensor that the source lacks, by released name."""
    places = {(slots[name].path, slots[name].index): tensor for name, tensor in dense.items()}
    out = {}
    for name, slot in slots.items():
        if not slot.path.startswith(_NEW):
            continue
        layer, kind = slot.index[:1], slot.path.split("/")[-2]
        beside = places[f"{_MLP}down/kernel", layer]
        zero = kind == "coefficient" or kind == "down"
        if slot.path.endswith("/bias") or (init != "released" and zero):
            read, kept = _zeros(dtype or beside.dtype), dtype or beside.dtype
        elif init == "sliced" and kind in ("gate", "up"):
            neurons = places[f"{_MLP}{kind}/kernel", layer]
            read, kept = (
                _wrapped(neurons, _first_neuron(slot, after) * slot.shape[1]),
                neurons.dtype,
            )
        else:
            key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
            kept = dtype or beside.dtype
            read = _normal(int.from_bytes(key, "little"), std, kept)
        # Made when the layer's MLP is read: slices are then read from where the disk is at.
        out[name] = sources.Tensor(slot.shape, kept, beside.order, read)
    return out


Read = Callable[[int, int], np.ndarray]  # the values [start, stop) of a tensor, counted flat


def _first_neuron(slot: table.Slot, config: ModelConfig) -> int:
    """Where a slice of the dense MLP begins: experts one after another, then the shared one."""
    assert config.moe is not None
    expert = slot.index[1] if len(slot.index) == 2 else config.moe.num_experts
    return expert * config.moe.expert_mlp_dim % config.text.mlp_dim


def _zeros(dtype: np.dtype) -> Read:
    return lambda start, stop: np.zeros(stop - start, dtype)


def _wrapped(tensor: sources.Tensor, first: int) -> Read:
    """Of a tensor that begins again where it ends, the values from `first`."""
    size = math.prod(tensor.shape)

    def read(start: int, stop: int) -> np.ndarray:
        start, count = (first + start) % size, stop - start
        head = tensor.read(start, min(start + count, size))
        rest = count - len(head)
        return np.concatenate([head, tensor.read(0, rest)]) if rest else head

    return read


def _normal(key: int, std: float, dtype: np.dtype) -> Read:
    """Values of a normal distribution around 0, the same however they are cut into ranges."""

    def block(number: int) -> np.ndarray:
        bits = np.random.Philox(key=key, counter=number << 64)
        return np.random.Generator(bits).standard_normal(_BLOCK, dtype=np.float32)

    def read(start: int, stop: int) -> np.ndarray:
        out = np.empty(stop - start, dtype)
        for number in range(start // _BLOCK, -(-stop // _BLOCK)):
            begin = number * _BLOCK
            a, b = max(start, begin), min(stop, begin + _BLOCK)
            out[a - start : b - start] = (std * block(number)[a - begin : b - begin]).astype(dtype)
        return out

    return read


def _doubled(original: Read, name: str) -> Read:
    def read(start: int, stop: int) -> np.ndarray:
        values = original(start, stop)
        with np.errstate(over="ignore", invalid="ignore"):
            out = values * np.asarray(2, values.dtype)
        if not np.isfinite(out).all():
            raise InputError(
                f"{name} holds a value that is not finite, or whose double is too large for"
                f" {values.dtype.name}; cast the checkpoint to float32 or mend it"
            )
        return out

    return read


# --- The measurement ------------------------------------------------------------------------------


def logit_change(before: folder.StoredModel, after: folder.StoredModel, seed: int = 0) -> float:
    """The largest change of a logit, over a random prompt with an image; in float32.

    Both models are read layer by layer, so that they may be larger than memory.
    """
    batch = _random_prompt(before.config, seed)
    with jax.default_matmul_precision("highest"):
        logits = layerwise.forward(before, batch)[1]
        return float(np.max(np.abs(layerwise.forward(after, batch)[1] - logits)))


def _random_prompt(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Text, an image of 2 × 3 tokens, and text: a batch of one row."""
    rng = np.random.default_rng(seed)
    special = [v for k, v in dataclasses.asdict(config).items() if k.endswith("_token_id")]
    words = np.setdiff1d(rng.integers(0, config.text.vocab_size, 4 * _TEXT_TOKENS), special)
    words = rng.permutation(np.resize(words, _TEXT_TOKENS))
    image = [config.vision_start_token_id, *[config.image_token_id] * 6, config.vision_end_token_id]
    ids = np.concatenate([words[: _TEXT_TOKENS // 4], image, words[_TEXT_TOKENS // 4 :]])
    side = config.vision.spatial_merge_size
    grid = np.array([[1, 2 * side, 3 * side]])
    pixels = rng.standard_normal((int(grid.prod()), config.vision.patch_dim), dtype=np.float32)
    inputs = {"input_ids": ids[None], "pixel_values": pixels, "image_grid_thw": grid}
    return make_batch(config, inputs)


def _released_bound(model: folder.StoredModel) -> float:
    """2 √D · max_v ‖final_norm · lm_head_v‖: the farthest that two logits of one head can be."""
    text = model.config.text
    path = "text/embed/embedding" if text.tie_word_embeddings else "text/lm_head/kernel"
    scale = model.read("text/final_norm/scale", (slice(0, text.hidden_size),)).astype(np.float32)
    longest = 0.0
    for row in range(0, text.vocab_size, _HEAD_ROWS):
        rows = slice(row, min(row + _HEAD_ROWS, text.vocab_size))
        head = model.read(path, (rows, slice(0, text.hidden_size))).astype(np.float32)
        longest = max(longest, float(np.linalg.norm(head * scale, axis=1).max()))
    return 2 * math.sqrt(text.hidden_size) * longest
