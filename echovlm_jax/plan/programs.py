"""The programs that `plan` compiles: a training step, or what generation runs."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from echovlm_jax.config import ModelConfig, preset
from echovlm_jax.errors import InputError
from echovlm_jax.flops import Work
from echovlm_jax.generate.defaults import compute_on
from echovlm_jax.generate.engine import NEW_TOKENS, lower_decode, lower_prefill
from echovlm_jax.mesh import make_mesh
from echovlm_jax.model import ParamSpec, init_cache, param_specs
from echovlm_jax.quantize import abstract, recipe, takes
from echovlm_jax.quantize import placed as quantized_placed
from echovlm_jax.train.program import Config, check_patches, config_mesh, make_program, placed
from echovlm_jax.train.stages import count

# A program whose gathers and scatters run on a SparseCore (v5p) is one that libtpu 0.0.52 can't
# print.
# until: libtpu 0.1
PRINTABLE: dict[str, Any] = {
    "xla_tpu_offload_gather_to_sparsecore": "false",
    "xla_tpu_enable_offloading_gather_to_sparsecore": "false",
    "xla_tpu_enable_offloading_scatter_to_sparsecore": "false",
}


def _printable(devices: Sequence[Any]) -> dict[str, Any]:
    return dict(PRINTABLE) if devices[0].platform == "tpu" else {}


@dataclass(frozen=True)
class Serving:
    """What generation is planned for.

    Attributes:
      rows: answers at one time.
      context: slots of the cache, a row. A prompt takes all but 512, which are for its answer.
      patches: of one prompt's images; four make a token. 5,120 are 1,280 tokens.
      quantize: a kind of `quantize.KINDS`; None leaves weights in the compute dtype.
      cache: what keys and values are kept in, "int8" or "" for the compute dtype.
    """

    rows: int = 1
    context: int = 2048
    patches: int = 5120
    quantize: str | None = None
    cache: str = ""


class Planned(NamedTuple):
    """A program for the compiler, and what it is about."""

    model: ModelConfig
    mesh: Mesh
    work: Work
    arrays: dict[str, Any]  # kind → a tree of jax.ShapeDtypeStruct with shardings
    params: int
    trainable: int
    lower: Callable[[], jax.stages.Lowered]
    compile: Callable[[jax.stages.Lowered], jax.stages.Compiled]
    needed_bytes: float | None = None  # `needed_bytes`, of a decoding step


def training(config: Config, devices: Sequence[Any], model: ModelConfig | None) -> Planned:
    """The step that `train` compiles for this configuration."""
    program = make_program(config, devices, model)
    state = program.state
    return Planned(
        program.model,
        program.mesh,
        Work(
            rows=config.global_batch_size,
            seq_len=config.seq_len,
            max_patches=config.max_patches,
            frame_patches=min(config.max_image_patches, config.max_patches) or None,
            trains=program.how,
            lora_rank=config.lora.rank,
        ),
        {"parameters": (state.trainable, state.frozen), "optimizer": state.opt_state},
        count(state.frozen) + count(state.trainable["params"]),
        count(state.trainable),
        program.lower,
        functools.partial(program.compile, options=_printable(devices)),
    )


def generation(
    config: Config,
    devices: Sequence[Any],
    model: ModelConfig | None,
    step: str,
    serving: Serving,
) -> Planned:
    """What generation holds and runs: `engine.prefill` of one prompt and its way into the state, or
    `engine.decode_step`. Of the configuration it takes model, dtype and mesh (`serving_mesh`)."""
    model = preset(config.model) if model is None else model
    prompt = serving.context - NEW_TOKENS
    if step == "prefill":
        _check_prompt(model, serving, prompt)
    mesh = serving_mesh(config, devices, model)
    dtype = jnp.dtype(config.dtype)
    specs = param_specs(model)
    shapes = serving_params(specs, mesh, dtype, serving.quantize)
    compute = compute_on(devices[0], mesh, cache=serving.cache)

    def lower() -> jax.stages.Lowered:
        common: dict[str, Any] = {
            "rows": serving.rows, "slots": serving.context, "dtype": dtype, "compute": compute
        }  # fmt: skip
        with jax.set_mesh(mesh):
            if step == "prefill":
                sizes: dict[str, Any] = {"prompt": prompt, "patches": serving.patches}
                return lower_prefill(model, shapes, **common, **sizes)
            return lower_decode(model, shapes, **common)

    decode = step == "decode"
    return Planned(
        model,
        mesh,
        Work(
            rows=serving.rows if decode else 1,
            seq_len=serving.context if decode else prompt,
            max_patches=serving.patches,
            step=step,
        ),
        {"parameters": shapes},
        sum(math.prod(spec.shape) for spec in specs.values()),
        0,
        lower,
        lambda lowered: lowered.compile(_printable(devices)),
        needed_bytes(model, shapes, serving, dtype) if decode else None,
    )


def _check_prompt(model: ModelConfig, serving: Serving, prompt: int) -> None:
    check_patches(model, serving.patches)
    visual = serving.patches // model.vision.merge_unit
    if prompt <= visual:
        raise InputError(
            f"context {serving.context} leaves {prompt} tokens for a prompt, beside {NEW_TOKENS} of"
            f" its answer: {serving.patches} patches, {visual} tokens, and text need more"
        )


def serving_mesh(config: Config, devices: Sequence[Any], model: ModelConfig) -> Mesh:
    """The configuration's mesh; where it leaves data and fsdp open, as the files in configs/ do for
    training, as many devices as key/value heads share them out split heads and widths, and copies
    of that have rows of their own: a weight that moved for each token would cost more than it
    saves."""
    if not config.mesh["data"] == config.mesh["fsdp"] == -1:
        return config_mesh(config, devices)
    return make_mesh(
        {"tensor": math.gcd(len(devices), model.text.num_kv_heads), "data": -1}, devices
    )


def serving_params(
    specs: Mapping[str, ParamSpec], mesh: Mesh, dtype: jnp.dtype, kind: str | None
) -> Any:
    """The parameters as generation holds them: quantized, or in the compute dtype."""
    how = None if kind is None else recipe(kind)

    def stored(spec: ParamSpec, path: str, wide: jax.ShapeDtypeStruct) -> Any:
        if how is None or not takes(path, spec):
            return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=wide.sharding)
        form = abstract(spec, how)
        return jax.tree.map(
            lambda array, sharding: jax.ShapeDtypeStruct(
                array.shape, array.dtype, sharding=sharding
            ),
            form,
            quantized_placed(form, wide.sharding),
        )

    flat: dict[str, Any] = flatten_dict(placed(specs, mesh), sep="/")
    return unflatten_dict({p: stored(specs[p], p, wide) for p, wide in flat.items()}, sep="/")


def needed_bytes(model: ModelConfig, params: Any, serving: Serving, dtype: jnp.dtype) -> float:
    """Bytes that one decoding step can't do without reading, over all devices, each once.

    Every weight of the decoder and the head at its stored width, scales included; of the embedding
    a row for each token; of E experts, k a token, the share min(1, rows · k / E), which is what the
    tokens choose at most; nothing of the vision tower. And the whole cache of the bucket, every
    row's slots, used or not.
    """
    moe, rows = model.moe, serving.rows
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(str(getattr(part, "key", getattr(part, "name", ""))) for part in path)
        share = 1.0
        if name.startswith("vision/"):
            share = 0.0
        elif name.startswith("text/embed/") and not model.text.tie_word_embeddings:
            share = min(1.0, rows / model.text.vocab_size)
        elif "/moe/experts/" in name:
            assert moe is not None
            share = min(1.0, rows * moe.top_k / moe.num_experts)
        total += share * nbytes(leaf.shape, leaf.dtype)
    kept = serving.cache or dtype
    cache = jax.eval_shape(lambda: init_cache(model.text, rows, serving.context, kept))
    return total + sum(nbytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(cache))


def nbytes(shape: Sequence[int], dtype: Any) -> float:
    """Bytes of an array as a device stores it: two values of int4 make one."""
    info = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
    return math.prod(shape) * info(dtype).bits / 8
