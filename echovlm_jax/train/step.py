"""One training step: a pure function (state, batch) → (state, metrics)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from echovlm_jax.config import ModelConfig
from echovlm_jax.data.record import ORGANS
from echovlm_jax.model import Compute, EchoVLM, param_specs
from echovlm_jax.ops import Array
from echovlm_jax.ops.moe.routing import balancing_losses, balancing_part
from echovlm_jax.train.lora import scaled, with_dropout
from echovlm_jax.train.loss import IGNORE, label_weights, token_losses
from echovlm_jax.train.optimizer import global_norm, in_float32, updates_made
from echovlm_jax.train.stages import merge
from echovlm_jax.train.telemetry import mixture_sums, z_loss

Batch = Mapping[str, Array]
Metrics = dict[str, jax.Array]

BALANCES = ("batch", "row")  # what the router's load is balanced over
_DROPOUT = 1  # what a step's random numbers are for: a purpose has its own
ORGAN_NUMBERS = len(ORGANS) + 1  # the last is for all others
# The logical axes of a batch's arrays.
BATCH_AXES: Mapping[str, tuple[str | None, ...]] = {
    "tokens": ("batch", "length"),
    "labels": ("batch", "length"),
    "segment_ids": ("batch", "length"),
    "positions": ("batch", None, "length"),
    "organs": ("batch", "length"),
    "patch_index": ("batch", "length"),
    "patches": ("batch", "length", None),
    "patch_segment_ids": ("batch", "length"),
    "patch_positions": ("batch", "length", None),
}


class TrainState(NamedTuple):
    """All that a run needs to go on, besides its position in the data."""

    step: Any  # [] int32, steps made, those left out too
    trainable: Any  # {"params": …, "lora": …}: own gradients and optimizer state
    frozen: Any  # the rest of "params": own neither
    opt_state: Any


class Totals(NamedTuple):
    """What the global means divide by, over the whole batch and all its accumulation steps."""

    labels: jax.Array  # labels that count
    weight: jax.Array  # what they weigh together
    tokens: jax.Array  # tokens that are not padding
    chosen: jax.Array | None = None  # [E], how often each expert was; None: by the part itself


class Objective(NamedTuple):
    """What the loss is made of.

    Attributes:
      z_weight: of the router's z-loss.
      balance_over: one of BALANCES. Of "batch", over all tokens of the global batch; with
        grad_accum above 1 that costs a forward pass more, because a part's loss needs to know how
        often each expert is chosen in the others. "row": in each row by itself, and the mean of
        that over the rows' tokens.
      loss_weighting: what a label weighs, of `label_weights`.
    """

    z_weight: float = 0.0
    balance_over: str = "batch"
    loss_weighting: str = "token"


def targets(labels: Array, segment_ids: Array) -> jax.Array:
    """Each position's next token, IGNORE where there is none in its segment. All [B, T] int32."""
    shifted = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
    after = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    return jnp.where((after == segment_ids) & (segment_ids != 0), shifted, IGNORE)


def loss_and_metrics(
    variables: dict[str, Any],
    batch: Batch,
    totals: Totals,
    *,
    config: ModelConfig,
    compute: Compute,
    dtype: DTypeLike,
    objective: Objective = Objective(),
) -> tuple[jax.Array, Metrics]:
    """This batch's part of the global loss: parts add up to the loss over all of `totals`.

    loss = Σ weight · cross-entropy / totals.weight + coefficient · balancing
    + z_weight · Σ router z-loss / totals.tokens.

    Args:
      variables: {"params": …}, and "lora" with the updates, their scale in them.
      batch: the model's batch with `labels` [B, T], IGNORE where a token does not count, and
        optionally `organs` [B, T], each token's organ by number.
      totals: of the global batch.
      objective: what the loss is made of.

    Returns:
      The loss [] in float32, and parts of metrics that add up likewise.
    """
    out: Any = EchoVLM(config, dtype, compute=compute).apply(variables, batch)
    text = variables["params"]["text"]
    head = text["embed"]["embedding"]
    if not config.text.tie_word_embeddings:
        head = text["lm_head"]["kernel"]
    wanted = targets(batch["labels"], batch["segment_ids"])
    losses = token_losses(out.hidden, head, wanted, layout=compute.layout)
    weights = label_weights(wanted, batch["segment_ids"], objective.loss_weighting)
    cross_entropy = jnp.sum(weights * losses) / totals.weight
    loss, metrics = cross_entropy, {"ce_loss": cross_entropy}
    if config.moe is not None:
        counted = batch["segment_ids"] != 0
        mixture = mixture_sums(
            out, batch, top_k=config.moe.top_k, organs=ORGAN_NUMBERS, layout=compute.layout
        )
        if objective.balance_over == "row":
            share = jnp.sum(counted, axis=-1) / totals.tokens
            rows = balancing_losses(out.router_logits, counted, top_k=config.moe.top_k)
            metrics["aux_loss"] = jnp.sum(rows * share)
        else:
            chosen = _chosen(mixture) if totals.chosen is None else totals.chosen
            metrics["aux_loss"] = balancing_part(out.router_logits, counted, chosen, totals.tokens)
        metrics["dropped"] = jnp.sum(out.dropped).astype(jnp.float32)
        loss = loss + config.moe.router_aux_loss_coef * metrics["aux_loss"]
        if objective.z_weight:
            metrics["z_loss"] = z_loss(out.router_logits, counted / totals.tokens)
            loss = loss + objective.z_weight * metrics["z_loss"]
        metrics |= mixture
    return loss, {"loss": loss, **metrics}


def make_train_step(
    config: ModelConfig,
    compute: Compute,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    grad_accum: int = 1,
    lora_scale: float = 1.0,
    lora_dropout: float = 0.0,
    seed: int = 0,
    objective: Objective = Objective(),
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step for a model and a way to compute it; jit it with the state donated.

    Where the loss or the gradient's norm is not finite the update is left out: parameters and
    optimizer stay as they were, and the metric `skipped` is 1.

    Args:
      config, compute: what is computed, and how.
      optimizer: over the trainable parameters.
      dtype: of the activations and products; parameters keep theirs.
      grad_accum: the batch's rows go in this many equal parts, one after the other. The update is
        the whole batch's: means are global, not means of means.
      lora_scale: alpha / rank.
      lora_dropout: of the updates' inputs.
      seed: with a step's number and a part's it makes the keys of all that is random in them: a run
        that goes on draws what it would have drawn.
      objective: what the loss is made of.
    """
    ahead = objective.balance_over == "batch" and grad_accum > 1 and config.moe is not None

    def variables_of(trainable: Any, frozen: Any, key: Any) -> dict[str, Any]:
        variables = _variables(trainable, frozen, lora_scale)
        if "lora" in variables and lora_dropout:
            low = variables["lora"]
            variables["lora"] = with_dropout(low, param_specs(config), key, lora_dropout)
        return variables

    def choices(trainable: Any, frozen: Any, key: Any, part: Batch) -> jax.Array:
        """[E], how often each expert is chosen in a part."""
        model, top_k = EchoVLM(config, dtype, compute=compute), config.moe and config.moe.top_k
        out: Any = model.apply(variables_of(trainable, frozen, key), part)
        return _chosen(
            mixture_sums(out, part, top_k=top_k or 0, organs=ORGAN_NUMBERS, layout=compute.layout)
        )

    def loss_fn(trainable: Any, frozen: Any, key: Any, part: Batch, totals: Totals) -> Any:
        return loss_and_metrics(
            variables_of(trainable, frozen, key),
            part,
            totals,
            config=config,
            compute=compute,
            dtype=dtype,
            objective=objective,
        )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = {name: compute.layout.constrain(x, *BATCH_AXES[name]) for name, x in batch.items()}
        totals = totals_of(batch, objective.loss_weighting)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), _DROPOUT)
        if ahead:

            def chosen(part: Batch, number: Any) -> jax.Array:
                own = jax.random.fold_in(key, number)
                return choices(state.trainable, state.frozen, own, part)

            totals = totals._replace(chosen=_accumulate(chosen, batch, grad_accum))

        def gradients(part: Batch, number: Any) -> tuple[Any, Metrics]:
            own = jax.random.fold_in(key, number)
            return jax.grad(loss_fn, has_aux=True)(state.trainable, state.frozen, own, part, totals)

        grads, metrics = _accumulate(gradients, batch, grad_accum)
        grads = in_float32(grads)
        grad_norm = global_norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        metrics |= {
            "grad_norm": grad_norm,
            "tokens": totals.tokens,
            "labels": totals.labels,
            "patches": _patches(batch),
            "skipped": 1.0 - finite.astype(jnp.float32),
            **updates_made(state.opt_state),  # before this one
        }

        def update(trainable: Any, opt_state: Any) -> tuple[Any, Any]:
            wide = in_float32(trainable)
            updates, opt_state = optimizer.update(grads, opt_state, wide, norm=grad_norm)
            return optax.apply_updates(trainable, updates), opt_state

        # A loss or gradient that is no number changes nothing but the step's own number.
        trainable, opt_state = jax.lax.cond(
            finite, update, lambda *same: same, state.trainable, state.opt_state
        )
        return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics

    return step


def make_eval_step(
    config: ModelConfig,
    compute: Compute,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    lora_scale: float = 1.0,
) -> Callable[[Any, Any, Batch], Metrics]:
    """(trainable, frozen, batch) → the batch's `ce_loss`, its mean over `labels`, and `labels`."""

    def step(trainable: Any, frozen: Any, batch: Batch) -> Metrics:
        variables = _variables(trainable, frozen, lora_scale)
        _, metrics = loss_and_metrics(
            variables, batch, totals_of(batch), config=config, compute=compute, dtype=dtype
        )
        return {"ce_loss": metrics["ce_loss"], "labels": totals_of(batch).labels}

    return step


def totals_of(batch: Batch, loss_weighting: str = "token") -> Totals:
    """What a batch's means divide by; 1 where there is nothing to count."""
    wanted = targets(batch["labels"], batch["segment_ids"])
    weight = jnp.sum(label_weights(wanted, batch["segment_ids"], loss_weighting))
    return Totals(
        weight=jnp.where(weight > 0, weight, 1.0),
        labels=jnp.maximum(jnp.sum(wanted != IGNORE), 1).astype(jnp.float32),
        tokens=jnp.maximum(jnp.sum(batch["segment_ids"] != 0), 1).astype(jnp.float32),
    )


def _patches(batch: Batch) -> jax.Array:
    """How many patches are an image's, float32 []."""
    segments = batch.get("patch_segment_ids")
    used = 0 if segments is None else jnp.sum(jnp.asarray(segments) != 0)
    return jnp.asarray(used, jnp.float32)


def _variables(trainable: Any, frozen: Any, lora_scale: float) -> dict[str, Any]:
    variables = {"params": merge(trainable["params"], frozen)}
    if trainable.get("lora"):
        variables["lora"] = scaled(trainable["lora"], lora_scale)
    return variables


def _chosen(mixture: Mapping[str, jax.Array]) -> jax.Array:
    """[E] of `mixture_sums`."""
    return jnp.sum(mixture["expert_counts"], axis=(0, 1, 2))


def _accumulate(function: Callable[[Batch, Any], Any], batch: Batch, parts: int) -> Any:
    """The sum of `function`, of a part and its number, over equal parts of the batch's rows, in
    float32."""
    if parts == 1:
        return function(batch, 0)
    # Row r goes to part r mod parts: every device splits its own rows, and none travels.
    split = {
        name: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
        for name, x in batch.items()
    }

    def add(total: Any, part: tuple[Batch, Any]) -> tuple[Any, None]:
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, function(*part)), None

    shapes = jax.eval_shape(function, {name: x[0] for name, x in split.items()}, 0)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    return jax.lax.scan(add, start, (split, jnp.arange(parts)))[0]
