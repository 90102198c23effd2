"""From a training configuration to the one program that a run compiles.

A configuration is an `ml_collections.ConfigDict` (configs/). What is here decides from it and from
the devices: sizes, layout, what trains, the optimizer, and the shapes and places of every array of
the state and the batch. `plan` compiles the same program for machines that aren't there.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echovlm_jax import quantize
from echovlm_jax.chips import defaults
from echovlm_jax.config import ModelConfig, preset
from echovlm_jax.errors import InputError
from echovlm_jax.mesh import AXES, activation_layout, make_mesh, param_shardings
from echovlm_jax.model import Compute, ParamSpec, axes_of, init_params, param_specs, shapes_of
from echovlm_jax.ops.product.weight import Quantized
from echovlm_jax.train.config_file import check_config
from echovlm_jax.train.lora import init_lora, lora_specs, of_experts
from echovlm_jax.train.optimizer import in_float32, learning_rate, make_optimizer
from echovlm_jax.train.stages import Rule, by_leaf, match_rules, read_rules, split
from echovlm_jax.train.step import (
    BATCH_AXES,
    Objective,
    TrainState,
    make_eval_step,
    make_train_step,
)

Config = Any  # an ml_collections.ConfigDict, whose attributes no type checker knows

# The widest split of the weights that is inferred. Every width of the model is a multiple of it, a
# sixty-fourth of the state is 2 GiB, and a wider one can cost: over 128 chips of a v5p:4x4x8,
# XLA:TPU gathers by all-reduce, with twice the traffic.
# until: libtpu 0.1
MOST_FSDP = 64

# Nothing from YNNPACK: with jax 0.10.2 a step is some 5 % faster with Eigen's products. Sums over
# the last axis are slower without it (`optimizer.global_norm`, and attention's "xla_halves").
# until: jax 0.13
_ON_CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}


_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def _attention(device: Any) -> str:
    return "xla_halves" if device.platform == "cpu" else defaults(device).attention


def _dispatch(config: Config, device: Any) -> str:
    given = config.moe_dispatch
    return defaults(device).moe_dispatch if given == "auto" else given


class Program(NamedTuple):
    """A training step and all that it is made for."""

    model: ModelConfig
    compute: Compute
    mesh: Mesh
    how: dict[str, str]  # each parameter's path → full, lora or frozen
    quantize: str | None  # the kind of what is frozen, of `quantize.KINDS`
    updates: dict[str, ParamSpec]  # `lora.lora_specs`
    rules: dict[str, Rule]  # its rule, with a weight decay
    optimizer: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    step: Callable[..., Any]  # jitted: (state, batch) → (state, metrics), in jax.set_mesh(mesh)
    evaluate: Callable[..., Any]  # `step.make_eval_step`
    state: TrainState  # of jax.ShapeDtypeStruct, with shardings
    batch: dict[str, jax.ShapeDtypeStruct]  # with shardings
    optimization_level: str | None  # XLA's; None is its default

    def compile(
        self,
        lowered: jax.stages.Lowered | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> jax.stages.Compiled:
        """Compiles the step for the mesh's devices, be they here or not.

        Args:
          lowered: what `lower` returned, where it was called.
          options: XLA's.
        """
        lowered = self.lower() if lowered is None else lowered
        before = jax.config.jax_optimization_level  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_optimization_level", self.optimization_level or "UNKNOWN")
        try:
            return self._compile(lowered, options)
        finally:
            jax.config.update("jax_optimization_level", before)

    def compile_eval(self) -> jax.stages.Compiled:
        """(trainable, frozen, batch) → the loss without its gradient (`step.make_eval_step`)."""
        with jax.set_mesh(self.mesh):
            lowered = jax.jit(self.evaluate, out_shardings=self.state.step.sharding).lower(
                self.state.trainable, self.state.frozen, self.batch
            )
        return self._compile(lowered)

    def _compile(
        self, lowered: jax.stages.Lowered, options: Mapping[str, Any] | None = None
    ) -> jax.stages.Compiled:
        options = dict(options or {})
        if self.mesh.devices.flat[0].platform == "cpu":
            return _on_cpu(lowered.compile(compiler_options=_known(_ON_CPU) | options))
        return lowered.compile(compiler_options=options)

    def lower(self) -> jax.stages.Lowered:
        """The step as a program for the compiler."""
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.state, self.batch)


def fingerprint(lowered: jax.stages.Lowered) -> str:
    """Of a program before it is compiled: the same in `plan` and in `train`, for one configuration
    and topology, with one version of this package and of JAX.

    The code of Pallas kernels, which are long strings in the text, is left out: it says in which
    folder their source lies.
    """
    text = _STRING.sub(lambda found: found[0] if len(found[0]) < 256 else "", lowered.as_text())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_program(
    config: Config, devices: Sequence[Any] | None = None, model: ModelConfig | None = None
) -> Program:
    """The program of a configuration on these devices; nothing is computed or allocated.

    Args:
      config: as the files in configs/ return it.
      devices: all of this job's by default.
      model: sizes, where config.model is not a preset's name.

    Raises:
      InputError: a key is missing or its value is impossible; the message names it.
    """
    check_config(config)
    devices = list(jax.devices() if devices is None else devices)
    model = preset(config.model) if model is None else model
    balance = config.get("balance_weight")
    if balance is not None and model.moe is not None:
        model = model.replace(moe={"router_aux_loss_coef": float(balance)})
    mesh = config_mesh(config, devices)
    layout = activation_layout(mesh, sum_dtype=config.get("grad_sum_dtype") or "float32")
    compute = Compute(
        moe_dispatch=_dispatch(config, devices[0]),
        capacity_factor=config.get("capacity_factor"),
        attention=_attention(devices[0]),
        remat=config.remat,
        layout=layout,
    )
    dtype, param_dtype = _dtype(config, "dtype"), _dtype(config, "param_dtype")
    specs = param_specs(model)
    rules = _rules(config, specs)
    how = {path: rule.how for path, rule in rules.items()}
    full, frozen = split(placed(specs, mesh), how)
    trainable = {"params": cast(full, param_dtype)}
    updates = lora_specs(specs, how, config.lora.rank)
    if updates:
        trainable["lora"] = placed(updates, mesh)
    schedule = learning_rate(config.learning_rate, config.steps, config.warmup_fraction)
    leaves = by_leaf(trainable, rules)
    optimizer = make_optimizer(
        schedule,
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=_each(leaves, "weight_decay"),
        rates=_each(leaves, "rate"),
        clip=config.clip_norm,
    )
    state = TrainState(
        step=_struct(jax.ShapeDtypeStruct((), jnp.int32), NamedSharding(mesh, PartitionSpec())),
        trainable=trainable,
        frozen=_in_few_bits(cast(frozen, dtype), specs, config.get("quantize")),
        opt_state=_optimizer_state(optimizer, trainable, mesh),
    )
    with jax.set_mesh(mesh):
        batch = _batch(config, model, mesh, layout)
    step = make_train_step(
        model,
        compute,
        optimizer,
        dtype=dtype,
        grad_accum=config.grad_accum,
        lora_scale=config.lora.alpha / config.lora.rank,
        lora_dropout=config.lora.dropout,
        seed=config.seed,
        objective=_objective(config),
    )
    jitted = jax.jit(
        step,
        donate_argnums=0,
        # Metrics are whole everywhere: any process may read them.
        out_shardings=(jax.tree.map(lambda s: s.sharding, state), state.step.sharding),
    )
    return Program(
        model,
        compute,
        mesh,
        how,
        config.get("quantize"),
        updates,
        rules,
        optimizer,
        schedule,
        jitted,
        make_eval_step(
            model, compute, dtype=dtype, lora_scale=config.lora.alpha / config.lora.rank
        ),
        state,
        batch,
        config.get("optimization_level"),
    )


def _objective(config: Config) -> Objective:
    return Objective(
        z_weight=config.get("router_z_weight") or 0.0,
        balance_over=config.get("balance_over") or "batch",
        loss_weighting=config.get("loss_weighting") or "token",
    )


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """XLA's options, or none where this jaxlib no longer knows them."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def _on_cpu(compiled: jax.stages.Compiled) -> jax.stages.Compiled:
    """The program, which takes arrays as `jit` does: it compares no layouts.

    On a CPU arrays of int4 say that they are not packed, and programs ask for packed ones. Both
    mean the same, and only a program that was compiled ahead minds.
    """
    executable: Any = compiled._executable
    executable._xla_in_layouts = [None] * len(executable._xla_in_layouts)  # until: jax 0.13
    return compiled


def config_mesh(config: Config, devices: Sequence[Any]) -> Mesh:
    """The mesh of a configuration on these devices.

    Its sizes are those in one slice, and mesh.dcn says over which axis slices are multiplied.
    Where data and fsdp are both -1, fsdp takes up to MOST_FSDP, and data the rest.
    """
    dcn = {axis: int(size or 1) for axis, size in (config.mesh.get("dcn") or {}).items()}
    in_slice = len(devices) // max(math.prod(dcn.values()), 1)
    sizes = {axis: config.mesh[axis] for axis in AXES}
    if sizes["data"] == sizes["fsdp"] == -1:
        others = math.prod(size for size in sizes.values() if size != -1)
        sizes["fsdp"] = math.gcd(max(in_slice // max(others, 1), 1), MOST_FSDP)
    return make_mesh(sizes, devices, dcn=dcn)


def init_state(program: Program, key: jax.Array, params: Any = None) -> TrainState:
    """The state before the first step.

    Args:
      program: whose state.
      key: of the random parameters and updates.
      params: the parameters to start from, which are used up; random ones by default. Those that
        the state holds quantized may be so already.
    """

    def init(key: jax.Array, params: Any) -> TrainState:
        params_key, lora_key = jax.random.split(key)
        params = init_params(program.model, params_key) if params is None else params
        full, frozen = split(params, program.how)
        frozen = _rounded(frozen, program)
        trainable = {"params": full}
        if program.updates:
            trainable["lora"] = init_lora(program.updates, lora_key)
        trainable, frozen = jax.tree.map(
            lambda x, s: x.astype(s.dtype),
            (trainable, frozen),
            (program.state.trainable, program.state.frozen),
        )
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, trainable, frozen, program.optimizer.init(in_float32(trainable)))

    shardings = jax.tree.map(lambda s: s.sharding, program.state)
    lowered = jax.jit(init, out_shardings=shardings, donate_argnums=1).lower(key, params)
    # It runs once: on a CPU, compiling it well takes four times as long as this.
    if program.mesh.devices.flat[0].platform == "cpu":
        options: dict[str, Any] = {"xla_backend_optimization_level": 0}
        return _on_cpu(lowered.compile(options))(key, params)
    return lowered.compile()(key, params)


def _in_few_bits(frozen: Any, specs: Mapping[str, ParamSpec], kind: str | None) -> Any:
    """The tree of shapes with shardings, quantized where the kind's recipe takes a parameter."""
    if kind is None:
        return frozen

    def stored(path: str, leaf: Any) -> Any:
        if not quantize.takes(path, specs[path]):
            return leaf
        form = quantize.abstract(specs[path], quantize.recipe(kind))
        return jax.tree.map(_struct, form, quantize.placed(form, leaf.sharding))

    made = {path: stored(path, leaf) for path, leaf in flatten_dict(frozen, sep="/").items()}
    if not any(isinstance(leaf, Quantized) for leaf in made.values()):
        raise InputError(
            f"config key quantize {kind} is of weights that are frozen or have an update, and every"
            " one that it takes trains in full; leave it out, or say otherwise in stage_rules"
        )
    return unflatten_dict(made, sep="/")


def _rounded(frozen: Any, program: Program) -> Any:
    """What is frozen, quantized where the state holds it so and it isn't yet."""
    wanted: dict[str, Any] = flatten_dict(program.state.frozen, sep="/")
    specs = param_specs(program.model)

    def stored(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Quantized) or not isinstance(wanted[path], Quantized):
            return leaf
        return quantize.quantize(leaf, specs[path], quantize.recipe(program.quantize or ""))

    flat = flatten_dict(frozen, sep="/")
    return unflatten_dict({path: stored(path, leaf) for path, leaf in flat.items()}, sep="/")


def _rules(config: Config, specs: Mapping[str, ParamSpec]) -> dict[str, Rule]:
    """Each parameter's rule, with the configuration's weight decay where it has none of its own."""
    listed = config.get("stage_rules")
    name = config.stage if listed is None else "stage_rules"
    found = match_rules(specs, read_rules(config.stage, listed), name)
    if not any(rule.how != "frozen" for rule in found.values()):
        raise InputError("config key stage_rules leaves every parameter frozen; let one train")
    found = {
        path: rule
        if rule.weight_decay is not None
        else rule._replace(weight_decay=float(config.weight_decay))
        for path, rule in found.items()
    }
    experts = of_experts(specs, {path: rule.how for path, rule in found.items()})
    if experts and config.lora.dropout:
        raise InputError(
            f"config key lora.dropout must be 0 where {experts[0]} has an update: that is added to"
            " the weight, whose inputs are spread over experts"
        )
    return found


def _each(leaves: Any, field: str) -> Any:
    """One field of a tree of rules."""
    return jax.tree.map(
        lambda rule: float(getattr(rule, field)), leaves, is_leaf=lambda x: isinstance(x, Rule)
    )


def _optimizer_state(optimizer: Any, trainable: Any, mesh: Mesh) -> Any:
    """Shapes of the optimizer's state: its moments lie where their parameters lie."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return optax.tree_map_params(
        optimizer,
        lambda leaf, parameter: _struct(leaf, parameter.sharding),
        jax.eval_shape(lambda tree: optimizer.init(in_float32(tree)), trainable),
        trainable,
        transform_non_params=lambda leaf: _struct(leaf, everywhere),
    )


def _batch(config: Config, model: ModelConfig, mesh: Mesh, layout: Any) -> dict[str, Any]:
    rows, length, patches = config.global_batch_size, config.seq_len, config.max_patches
    shards = layout.size("batch") * config.grad_accum
    if rows % shards:
        raise InputError(
            f"global_batch_size {rows} must be a multiple of {shards}: {layout.size('batch')}"
            f" devices with rows of their own × grad_accum {config.grad_accum}"
        )
    pieces = layout.size("length")
    if length % pieces:
        raise InputError(f"seq_len {length} must be a multiple of mesh.sequence {pieces}")
    check_patches(model, patches, pieces)
    shapes = {
        "tokens": ((rows, length), jnp.int32),
        "labels": ((rows, length), jnp.int32),
        "segment_ids": ((rows, length), jnp.int32),
        "positions": ((rows, 3, length), jnp.int32),
        "organs": ((rows, length), jnp.int32),
    }
    if patches:
        shapes |= {
            "patch_index": ((rows, length), jnp.int32),
            "patches": ((rows, patches, model.vision.patch_dim), _dtype(config, "dtype")),
            "patch_segment_ids": ((rows, patches), jnp.int32),
            "patch_positions": ((rows, patches, 2), jnp.int32),
        }
    return {
        name: jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, layout.spec(*BATCH_AXES[name]))
        )
        for name, (shape, dtype) in shapes.items()
    }


def check_patches(model: ModelConfig, patches: int, pieces: int = 1) -> None:
    """Refuses a number of patches that whole tokens, or devices along a row, can't share out."""
    unit = model.vision.merge_unit * pieces
    if patches % unit:
        raise InputError(
            f"max_patches {patches} must be a multiple of {unit}: {model.vision.merge_unit} make a"
            f" token, and mesh.sequence {pieces} shares them out"
        )


def _dtype(config: Config, key: str) -> jnp.dtype:
    allowed = ("float32", "bfloat16")
    if config[key] not in allowed:
        raise InputError(f"{key} {config[key]!r} must be one of {', '.join(allowed)}")
    return jnp.dtype(config[key])


def _struct(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def placed(specs: Mapping[str, ParamSpec], mesh: Mesh) -> Any:
    """The tree of shapes with shardings."""
    shapes = shapes_of(specs)
    return jax.tree.map(_struct, shapes, param_shardings(axes_of(specs), shapes, mesh))


def cast(tree: Any, dtype: jnp.dtype) -> Any:
    """A tree of shapes, of this dtype instead."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), tree
    )
