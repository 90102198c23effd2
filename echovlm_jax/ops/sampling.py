"""Choosing the next token: Hugging Face's logits processors in their order, and the draw."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key

from echovlm_jax.errors import InputError
from echovlm_jax.ops import Array

_REAL, _WHOLE = (int, float, np.integer, np.floating), (int, np.integer)
_RANGES = {
    "temperature": (_REAL, 0, 1e6),
    "top_k": (_WHOLE, 0, 2**31 - 1),
    "top_p": (_REAL, 1e-9, 1),
    "repetition_penalty": (_REAL, 1e-6, 1e6),
    "seed": (_WHOLE, 0, 2**32 - 1),
}


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen, as in Hugging Face's `generate` and in its order: repetition
    penalty (over the prompt and the new tokens), temperature, top-k, top-p.

    Attributes:
      temperature: 0 takes the likeliest token; top_k, top_p and seed don't matter then.
      top_k: 0 for all.
      top_p: 1 for all.
      repetition_penalty: 1 for none.
      seed: the same seed gives the same tokens.

    Raises:
      InputError: a number of the wrong kind or out of range; the message names it.
    """

    temperature: Any = 0.0
    top_k: Any = 0
    top_p: Any = 1.0
    repetition_penalty: Any = 1.0
    seed: Any = 0

    def __post_init__(self) -> None:
        for name, (kind, least, most) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not (isinstance(value, kind) and least <= value <= most):
                what = "a whole number" if kind is _WHOLE else "a number"
                raise InputError(f"{name} must be {what} from {least} to {most}, found {value!r}")


class Sampling(NamedTuple):
    """The settings as arrays, so that changing a value compiles nothing anew."""

    temperature: Any  # [] float32
    top_k: Any  # [] int32
    top_p: Any  # [] float32
    repetition_penalty: Any  # [] float32
    key: jax.Array  # [] key
    rows: Any  # [B] int32: a number for each row, that its draws depend on


def sampling(options: SamplingOptions, rows: Sequence[int]) -> Sampling:
    """The settings of a batch, with a number for each row."""
    heat = options.temperature
    return Sampling(
        # 0 is greedy and divides nothing; what is smaller than a millionth overflows a float32.
        temperature=np.asarray(max(heat, 1e-6) if heat else 1, np.float32),
        top_k=np.asarray(options.top_k, np.int32),
        top_p=np.asarray(options.top_p, np.float32),
        repetition_penalty=np.asarray(options.repetition_penalty, np.float32),
        key=jax.random.key(options.seed),
        rows=np.asarray(rows, np.int32),
    )


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
