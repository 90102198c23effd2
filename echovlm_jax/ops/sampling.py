"""Choosing the next token: Hugging Face's logits processors in their order, and the draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key

from echovlm_jax.errors import InputError
from echovlm_jax.ops import Array


class Sampling(NamedTuple):
    """The settings as arrays, so that changing a value compiles nothing anew."""

    temperature: Any  # [] float32
    top_k: Any  # [] int32
    top_p: Any  # [] float32
    repetition_penalty: Any  # [] float32
    key: jax.Array  # [] key
    rows: Any  # [B] int32: a number for each row, that its draws depend on


def sampling(
    *,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    repetition_penalty: Any,
    seed: Any,
    rows: Sequence[int],
) -> Sampling:
    """Settings from plain numbers.

    Raises:
      InputError: a number out of range; the message names it.
    """
    check_sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    return Sampling(
        # 0 is greedy and divides nothing; what is smaller than a millionth overflows a float32.
        temperature=np.asarray(max(temperature, 1e-6) if temperature else 1, np.float32),
        top_k=np.asarray(top_k, np.int32),
        top_p=np.asarray(top_p, np.float32),
        repetition_penalty=np.asarray(repetition_penalty, np.float32),
        key=jax.random.key(seed),
        rows=np.asarray(rows, np.int32),
    )


def check_sampling(
    *,
    temperature: Any = 0.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    repetition_penalty: Any = 1.0,
    seed: Any = 0,
) -> None:
    """Refuses a setting of the wrong kind or out of range (InputError, which names it)."""
    real, whole = (int, float, np.integer, np.floating), (int, np.integer)
    for name, value, kind, least, most in (
        ("temperature", temperature, real, 0, 1e6),
        ("top_k", top_k, whole, 0, 2**31 - 1),
        ("top_p", top_p, real, 1e-9, 1),
        ("repetition_penalty", repetition_penalty, real, 1e-6, 1e6),
        ("seed", seed, whole, 0, 2**32 - 1),
    ):
        right = isinstance(value, kind) and not isinstance(value, bool)
        if not (right and least <= value <= most):
            what = "a whole number" if kind is whole else "a number"
            raise InputError(f"{name} must be {what} from {least} to {most}, found {value!r}")


def choose(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    settings: Sampling,
    step: Int[Array, ""],
    *,
    greedy: bool,
) -> Int[Array, "B"]:
    """The next token of each row.

    Args:
      logits: float32.
      seen: the tokens that the repetition penalty counts.
      settings: temperature, top-k and top-p are not looked at where greedy.
      step: the number of the draw.
      greedy: whether to take the likeliest.
    """
    logits = penalise_repetition(logits, seen, settings.repetition_penalty)
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filter_logits(
        logits, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
    )
    return draw(logits, settings.key, settings.rows, step).astype(jnp.int32)


def penalise_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""]
) -> Float[Array, "B V"]:
    """Makes tokens that are already there less likely (Keskar et al., arXiv 1909.05858, eq. 5).

    A seen token's logit is divided by `penalty` where it is positive and multiplied by it where it
    is negative, so that a penalty above 1 lowers it in both cases.
    """
    changed = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, changed, logits)


def filter_logits(
    logits: Float[Array, "B V"],
    *,
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
) -> Float[Array, "B V"]:
    """Temperature, then top-k, then top-p; what is ruled out becomes −inf.

    Args:
      logits: float32.
      temperature: above 0; logits are divided by it.
      top_k: keeps the k largest, and whatever equals the k-th; 0 or at least V keeps all.
      top_p: keeps the fewest likeliest tokens whose probabilities, after top-k, sum to at least
        top_p, and one token at least (Holtzman et al., arXiv 1904.09751); 1 keeps all.
    """
    vocab = logits.shape[-1]
    logits = logits / temperature
    order = jnp.argsort(logits, axis=-1)  # ascending
    ordered = jnp.take_along_axis(logits, order, axis=-1)
    k = jnp.where((top_k <= 0) | (top_k > vocab), vocab, top_k)
    smallest = jnp.take(ordered, vocab - k, axis=-1)[:, None]
    ordered = jnp.where(ordered < smallest, -jnp.inf, ordered)
    # Summing from the small end: what lies within 1 − top_p of it is the tail to cut.
    tail = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) <= 1 - top_p
    tail = tail.at[:, -1].set(False) & (top_p < 1)
    ordered = jnp.where(tail, -jnp.inf, ordered)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.zeros_like(logits).at[rows, order].set(ordered)


def draw(
    logits: Float[Array, "B V"],
    key: Key[Array, ""],
    rows: Int[Array, "B"],
    step: Int[Array, ""],
) -> Int[Array, "B"]:
    """One token a row, in proportion to exp(logits).

    A row's draw depends on the key, the row's own number and the step alone: the other rows of the
    batch don't matter.
    """

    def one(logits: Array, row: Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, row), step)
        return jax.random.categorical(own, logits)

    return jax.vmap(one)(logits, rows)
