"""AdamW under a warm-up and a cosine: an optax chain over the trainable parameters alone."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def learning_rate(peak: float, steps: int, warmup_fraction: float) -> optax.Schedule:
    """From 0 to `peak` over the first share of the steps, then along a cosine back to 0."""
    warmup = round(steps * warmup_fraction)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))


def in_float32(tree: Any) -> Any:
    """What the optimizer is given, gradients and parameters alike: moments in bfloat16 would stand
    still, because 0.999 of one rounds back to it."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def global_norm(tree: Any) -> jax.Array:
    """√Σ x² over all arrays of a tree, in their dtype.

    Each is first added up over its first axis, most often the layers: whole rows are added at once.
    XLA:CPU's own loops, all that is left without YNNPACK (`program.compile`), add neighbours one by
    one, four times as slowly, and round more.
    """

    def square(x: jax.Array) -> jax.Array:
        rows = jnp.sum(jnp.square(jnp.atleast_1d(x)), axis=0)
        return jnp.sum(jax.lax.optimization_barrier(rows))  # else XLA makes one sum of the two

    return jnp.sqrt(sum(square(x) for x in jax.tree.leaves(tree)))


def make_optimizer(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Any = 0.0,
    rates: Any = 1.0,
    clip: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Clip by the global norm, then AdamW (Loshchilov and Hutter 2019), for trees of `in_float32`.

    `update` takes the gradients' norm too, as `norm`, from a caller that has it.

    Args:
      schedule: step → learning rate.
      b1, b2, eps: Adam's.
      weight_decay: decoupled, and times the rate: a number, or a tree of one for each array.
      rates: what the schedule's rate is multiplied with, likewise.
      clip: the gradient's norm over all trainable parameters is at most this.
    """

    def decay_and_rate(updates: Any, params: Any) -> Any:
        decays, times = (_for_each(given, updates) for given in (weight_decay, rates))
        return jax.tree.map(
            lambda u, p, decay, rate: _times(rate, u + decay * p if decay else u),
            updates,
            params,
            decays,
            times,
        )

    return optax.chain(
        _clip_by_global_norm(clip),
        optax.scale_by_adam(b1, b2, eps),
        optax.stateless(decay_and_rate),
        optax.scale_by_learning_rate(schedule),
    )


def updates_made(opt_state: Any) -> dict[str, Any]:
    """{"updates": []}, int32: where a schedule in the optimizer's state stands; {} without one.
    Steps that were left out don't count."""

    def scheduled(state: Any) -> bool:
        return isinstance(state, optax.ScaleByScheduleState)

    states = filter(scheduled, jax.tree.leaves(opt_state, is_leaf=scheduled))
    return next(({"updates": state.count} for state in states), {})


def _clip_by_global_norm(most: float) -> optax.GradientTransformationExtraArgs:
    """As optax's, with one number that all gradients are multiplied with. optax divides each of
    them, which XLA stores in between on a CPU: a division is too costly to repeat."""

    def clip(
        updates: Any, state: Any, params: Any = None, *, norm: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        del params
        norm = global_norm(updates) if norm is None else norm
        factor = jnp.where(norm < most, 1.0, most / norm)
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, clip)


def _times(rate: float, x: jax.Array) -> jax.Array:
    return x if rate == 1 else rate * x


def _for_each(given: Any, tree: Any) -> Any:
    """A number for each array of the tree."""
    return jax.tree.map(lambda _: given, tree) if isinstance(given, int | float) else given
