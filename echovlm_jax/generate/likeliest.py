"""The likeliest answers to a prompt, each with its probability: a beam search."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.errors import InputError
from echovlm_jax.generate.engine import Prefilled, prefill
from echovlm_jax.generate.offline import columns_for
from echovlm_jax.generate.prompts import check_new_tokens, check_room, prompt_lengths, split_rows
from echovlm_jax.model import Cache, EchoVLM, extend_cache, init_cache, insert_row
from echovlm_jax.model.compute import Compute

_STATIC = ("config", "dtype", "compute")


class Beams(NamedTuple):
    """The likeliest beginnings of answers so far, the best first."""

    cache: Cache
    tokens: jax.Array  # [K, N] int32
    count: jax.Array  # [K] int32: how many of them are there
    score: jax.Array  # [K] float32: Σ of their logarithmic probabilities
    position: jax.Array  # [K] int32: of the newest
    done: jax.Array  # [K] bool: the newest ends the answer


class Size(NamedTuple):
    rows: int
    columns: int  # of the cache
    new: int  # tokens of an answer, at most


class Answer(NamedTuple):
    """An answer that a model holds possible."""

    text: str
    probability: float  # of exactly this text, its end included


def likeliest(
    model: Any, inputs: Mapping[str, np.ndarray], *, count: int = 5, max_new_tokens: int = 32
) -> list[Answer]:
    """What a model holds possible, the likeliest first.

    The prompt is read once; then the `count` likeliest beginnings go on together, token by token.
    What was left behind early may have become likely: the list can lack an answer, but each
    probability is the model's own (at temperature 1). What is missing from 1 is other answers.

    Args:
      model: what `load_model` gives, on one device.
      inputs: of one prompt, as `model.prepare` gives them.
      count: how many beginnings, 1 to 64; equal texts are one answer.
      max_new_tokens: limit of each; one that reaches it counts as it stands.

    Raises:
      InputError: a count out of range, or a prompt that leaves no room for max_new_tokens.
    """
    if not 1 <= count <= min(64, model.config.text.vocab_size):
        raise InputError(f"count must be from 1 to 64, found {count}")
    check_new_tokens(model.config, max_new_tokens)
    length = int(prompt_lengths(inputs)[0])
    check_room(model.config, length, max_new_tokens)
    static = {"config": model.config, "dtype": jnp.dtype(model.dtype), "compute": model.compute}
    [prompt] = split_rows(model.config, inputs)
    beams = _search(
        model.params,
        prefill(model.params, prompt, **static),
        np.array(model.stop_ids, np.int32),
        size=Size(count, columns_for(length + max_new_tokens), max_new_tokens),
        **static,
    )
    found: dict[str, float] = {}
    for tokens, number, score in zip(*map(np.asarray, beams[1:4]), strict=True):
        ids = [token for token in tokens[:number].tolist() if token not in model.stop_ids]
        text = model.processor.tokenizer.decode(ids).strip()
        found[text] = found.get(text, 0.0) + float(np.exp(score))
    return sorted(map(Answer, found, found.values()), key=lambda one: -one.probability)


@functools.partial(jax.jit, static_argnames=("size", *_STATIC))
def _search(
    params: Any,
    read: Prefilled,
    stops: jax.Array,
    *,
    size: Size,
    config: ModelConfig,
    dtype: Any,
    compute: Compute,
) -> Beams:
    rows, columns, new = size
    cache = init_cache(config.text, rows, columns, compute.cache or dtype)
    for row in range(rows):
        cache = insert_row(cache, read.cache, jnp.int32(row))
    score, token = jax.lax.top_k(jax.nn.log_softmax(read.logits[0]), rows)
    beams = Beams(
        cache=cache,
        tokens=jnp.zeros((rows, new), jnp.int32).at[:, 0].set(token),
        count=jnp.ones(rows, jnp.int32),
        score=score,
        position=jnp.broadcast_to(read.position, (rows,)),
        done=jnp.isin(token, stops),
    )
    model = EchoVLM(config, dtype, compute=compute)
    step = functools.partial(_step, functools.partial(model.apply, {"params": params}), stops)
    return jax.lax.while_loop(lambda beams: jnp.any(~beams.done & (beams.count < new)), step, beams)


def _step(model: Any, stops: jax.Array, beams: Beams) -> Beams:
    """One more token of those that go on. Answers that have ended stay as long as they are likely
    enough: each stands for itself as its only continuation."""
    number = jnp.arange(len(beams.done))
    last = beams.tokens[number, beams.count - 1]
    live = ~beams.done
    positions = jnp.broadcast_to(beams.position[:, None, None], (len(number), 3, 1))
    x, _ = model({"tokens": last[:, None]}, method="embed")
    segments = live[:, None].astype(jnp.int32)
    hidden, outputs = model(x, positions, segments, beams.cache, method="decode")
    cache = extend_cache(beams.cache, outputs.kv, segments)
    cache = cache._replace(length=jnp.where(live, cache.length, beams.cache.length))
    log_p = jax.nn.log_softmax(model(hidden, method="logits")[:, 0])
    alone = jnp.where(jnp.arange(log_p.shape[1]) == 0, 0.0, -jnp.inf)
    log_p = jnp.where(live[:, None], log_p, alone)
    score, flat = jax.lax.top_k((beams.score[:, None] + log_p).reshape(-1), len(number))
    parent, token = flat // log_p.shape[1], flat % log_p.shape[1]
    live, at = live[parent], beams.count[parent]
    tokens = beams.tokens[parent]
    written = tokens.at[number, jnp.where(live, at, tokens.shape[1])].set(token, mode="drop")
    return Beams(
        cache=Cache(
            jax.tree.map(lambda x: x[:, parent], cache.stored),
            cache.segments[parent],
            cache.length[parent],
        ),
        tokens=written,
        count=at + live,
        score=score,
        position=beams.position[parent] + live,
        done=~live | jnp.isin(token, stops),
    )
