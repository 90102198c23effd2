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

FEW = 64  # a top-k up to this many needs no sort of the vocabulary


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
    """Each row's settings as arrays, so that no value of any row compiles anything anew."""

    temperature: Any  # [B] float32; 0 takes the likeliest
    top_k: Any  # [B] int32
    top_p: Any  # [B] float32
    repetition_penalty: Any  # [B] float32
    seed: Any  # [B] uint32
    rows: Any  # [B] int32: a number for each row, that its draws depend on


def sampling(options: SamplingOptions, rows: Sequence[int]) -> Sampling:
    """The settings of a batch whose rows share them, with a number for each row."""
    heat = options.temperature
    # 0 is greedy and divides nothing; what is smaller than a millionth overflows a float32.
    values = (max(heat, 1e-6) if heat else 0, options.top_k, options.top_p)
    values = (*values, options.repetition_penalty, options.seed)
    dtypes = (np.float32, np.int32, np.float32, np.float32, np.uint32)
    arrays = [np.full(len(rows), x, dtype) for x, dtype in zip(values, dtypes, strict=True)]
    return Sampling(*arrays, rows=np.asarray(rows, np.int32))


def choose(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    settings: Sampling,
    step: Int[Array, "B"],
    idle: Bool[Array, "B"] | None = None,
) -> Int[Array, "B"]:
    """The next token of each row. A row's own is the same whatever the others ask for.

    The work is what the rows together ask for, found at run time: greedy rows cost an argmax; a
    temperature, and a top-k of at most FEW, no sort of the vocabulary; anything else sorts it.

    Args:
      logits: float32.
      seen: the tokens that the repetition penalty counts.
      settings: temperature, top-k and top-p are not looked at where greedy.
      step: the number of each row's draw.
      idle: rows whose token doesn't matter.
    """
    logits = jnp.asarray(penalise_repetition(logits, seen, settings.repetition_penalty))
    greedy = settings.temperature == 0
    heat = jnp.where(greedy, 1, settings.temperature)
    whole = (settings.top_k <= 0) | (settings.top_k >= logits.shape[-1])
    few = (whole | (settings.top_k <= FEW)) & (settings.top_p >= 1)

    def likeliest(logits: Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn(logits: Array) -> jax.Array:
        key = jax.vmap(jax.random.key)(settings.seed)
        return jnp.asarray(draw(logits, key, settings.rows, step), jnp.int32)

    def top(logits: Array) -> jax.Array:
        warm = logits / heat[:, None]
        best = jax.lax.top_k(warm, min(FEW, warm.shape[-1]))[0]
        at = jnp.clip(settings.top_k - 1, 0, best.shape[-1] - 1)
        least = jnp.take_along_axis(best, at[:, None], axis=-1)
        kept = jnp.where((warm >= least) | whole[:, None], warm, -jnp.inf)
        return jnp.where(greedy, likeliest(logits), drawn(kept))

    def full(logits: Array) -> jax.Array:
        kept = filter_logits(logits, temperature=heat, top_k=settings.top_k, top_p=settings.top_p)
        return jnp.where(greedy, likeliest(logits), drawn(kept))

    idle = jnp.zeros(greedy.shape, bool) if idle is None else idle
    branch = jnp.where((greedy | idle).all(), 0, jnp.where((greedy | few | idle).all(), 1, 2))
    return jax.lax.switch(branch, [likeliest, top, full], logits)


def penalise_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Makes tokens that are already there less likely (Keskar et al., arXiv 1909.05858, eq. 5).

    A seen token's logit is divided by `penalty` where it is positive and multiplied by it where it
    is negative, so that a penalty above 1 lowers it in both cases.
    """
    penalty = jnp.asarray(penalty)[:, None]
    changed = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, changed, logits)


def filter_logits(
    logits: Float[Array, "B V"],
    *,
    temperature: Float[Array, "B"],
    top_k: Int[Array, "B"],
    top_p: Float[Array, "B"],
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
    logits = logits / jnp.asarray(temperature)[:, None]
    order = jnp.argsort(logits, axis=-1)  # ascending
    ordered = jnp.take_along_axis(logits, order, axis=-1)
    k = jnp.where((top_k <= 0) | (top_k > vocab), vocab, top_k)
    smallest = jnp.take_along_axis(ordered, vocab - k[:, None], axis=-1)
    ordered = jnp.where(ordered < smallest, -jnp.inf, ordered)
    # Summing from the small end: what lies within 1 − top_p of it is the tail to cut.
    top_p = jnp.asarray(top_p)[:, None]
    tail = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) <= 1 - top_p
    tail = tail.at[:, -1].set(False) & (top_p < 1)
    ordered = jnp.where(tail, -jnp.inf, ordered)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.zeros_like(logits).at[rows, order].set(ordered)


def draw(
    logits: Float[Array, "B V"],
    key: Key[Array, "B"],
    rows: Int[Array, "B"],
    step: Int[Array, "B"],
) -> Int[Array, "B"]:
    """One token a row, in proportion to exp(logits).

    A row's draw depends on its key, its number and its step alone: the other rows of the
    batch don't matter.
    """

    def one(logits: Array, key: Array, row: Array, step: Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, row), step)
        return jax.random.categorical(own, logits)

    return jax.vmap(one)(logits, key, rows, step)
