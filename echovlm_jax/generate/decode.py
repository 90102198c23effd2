"""Prefill and decode: token ids out of prompts and images.

Every size that a program is compiled for comes from a bucket. A row's image tokens and its other
columns are rounded up apart from each other, so that one question asked about images of many sizes
needs one prefill program for each bucket of image sizes and no more.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.errors import InputError
from echovlm_jax.model import Cache, EchoVLM, extend_cache, init_cache
from echovlm_jax.ops.sampling import Sampling, SamplingOptions, choose, sampling
from echovlm_jax.processing.batch import PATCH_BUCKETS, bucket, make_batch
from echovlm_jax.processing.processor import check_length

Inputs = Mapping[str, np.ndarray]
Params = dict[str, Any]

# Tokens between two calls of a listener.
STREAM_CHUNK = 2


class Generated(NamedTuple):
    """What `generate` returns."""

    tokens: np.ndarray  # [B, T] int32; behind a row's stop token, zeros
    lengths: np.ndarray  # [B]: how many of them count, the stop token among them
    prompt_lengths: np.ndarray  # [B]: tokens of the prompt, padding not counted
    compile_seconds: float
    prefill_seconds: float  # until the first token is there
    decode_seconds: float  # from there to the last


class State(NamedTuple):
    """Everything that decoding carries from one token to the next."""

    cache: Cache
    tokens: jax.Array  # [B, N] int32: the new tokens
    step: jax.Array  # [] int32: how many columns of `tokens` are filled
    last: jax.Array  # [B] int32
    position: jax.Array  # [B] int32: of `last`
    lengths: jax.Array  # [B] int32
    done: jax.Array  # [B] bool
    seen: jax.Array  # [B, V] bool: tokens of the prompt and the new ones


def generate(
    config: ModelConfig,
    params: Params,
    inputs: Inputs,
    options: SamplingOptions = SamplingOptions(),
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int] = (),
    rows: Sequence[int] | None = None,
    dtype: Any = jnp.float32,
    on_tokens: Callable[[np.ndarray, np.ndarray], object] | None = None,
) -> Generated:
    """Continues each row of a batch.

    Args:
      config: sizes.
      params: the parameter tree.
      inputs: Hugging Face-style arrays: input_ids and attention_mask [B, S], and optionally
        pixel_values [P, patch_dim] with image_grid_thw [N, 3], pixel_values_videos with
        video_grid_thw. The next token follows the last column, whatever that holds, so pad on the
        left.
      options: settings of sampling; padding doesn't count for the repetition penalty.
      max_new_tokens: limit of each row.
      eos_token_ids: a row ends with the first of these.
      rows: a number for each row that its draws depend on, in place of its place in the batch;
        equal numbers and equal prompts give equal answers.
      dtype: compute dtype.
      on_tokens: callback as tokens come, with all so far [B, t] and the lengths [B].

    Raises:
      InputError: a prompt that leaves no room for max_new_tokens, or no such number.
    """
    check_new_tokens(config, max_new_tokens)
    prompt_lengths = (_mask(inputs) != 0).sum(axis=1)
    check_room(config, int(prompt_lengths.max()), max_new_tokens)
    batch, position = _prepare(config, inputs)
    count, columns = batch["tokens"].shape
    settings = sampling(options, range(count) if rows is None else rows)
    # Filled up with what no token is: a few more or fewer make no other program.
    stop = np.full(-(-max(len(eos_token_ids), 1) // 8) * 8, -1, np.int32)
    stop[: len(eos_token_ids)] = eos_token_ids
    new = bucket(max_new_tokens)
    sizes: dict[str, Any] = {"slots": columns + new, "new": new}
    static: dict[str, Any] = {
        "config": config,
        "dtype": jnp.dtype(dtype),
        "greedy": options.temperature == 0,
    }
    clock = time.perf_counter
    started = clock()
    # jit finds these programs again in the calls below; made here, they don't count as prefill.
    _prefill.lower(params, batch, position, settings, stop, **sizes, **static).compile()
    begun = clock()
    state = jax.block_until_ready(
        _prefill(params, batch, position, settings, stop, **sizes, **static)
    )
    compiling, prefill, begun = begun - started, clock() - begun, clock()
    if max_new_tokens > 1:
        _decode.lower(params, state, np.int32(1), settings, stop, **static).compile()
        compiling, begun = compiling + clock() - begun, clock()
    while True:
        # Copies: what the listener keeps must not lie in a buffer that the next call takes over.
        tokens, lengths, done, step = jax.tree.map(
            np.array, (state.tokens, state.lengths, state.done, state.step)
        )
        if on_tokens is not None:
            on_tokens(tokens[:, :step], lengths)
        if done.all() or step >= max_new_tokens:
            break
        chunk = max_new_tokens if on_tokens is None else STREAM_CHUNK
        limit = np.int32(min(step + chunk, max_new_tokens))
        state = _decode(params, state, limit, settings, stop, **static)
    seconds = clock() - begun
    return Generated(tokens[:, :step], lengths, prompt_lengths, compiling, prefill, seconds)


def check_new_tokens(config: ModelConfig, new: int) -> None:
    """Refuses a number of new tokens that no prompt leaves room for (InputError)."""
    limit = config.text.max_position_embeddings
    if not isinstance(new, int | np.integer) or isinstance(new, bool) or not 1 <= new < limit:
        raise InputError(
            f"max_new_tokens must be a whole number, at least 1 and below this model's"
            f" max_position_embeddings {limit}: {new!r}"
        )


def check_room(config: ModelConfig, prompt: int, new: int) -> None:
    """Refuses a prompt of `prompt` tokens that leaves no room for `new` more (InputError)."""
    limit = config.text.max_position_embeddings
    check_length(prompt, limit - new, f"max_position_embeddings {limit} less max_new_tokens {new}:")


def _prepare(config: ModelConfig, inputs: Inputs) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The model batch, padded to its buckets, and each row's next position [B] int32."""
    ids = np.asarray(inputs["input_ids"])
    if ids.min() < 0 or ids.max() >= config.text.vocab_size:
        raise InputError(
            f"token ids {ids.min()} to {ids.max()} lie outside vocab_size"
            f" {config.text.vocab_size}; the tokenizer belongs to another model"
        )
    unit = config.vision.merge_unit
    vision = np.isin(ids, (config.image_token_id, config.video_token_id)) & (_mask(inputs) != 0)
    images = int(vision.sum(axis=1).max())
    room = bucket(4 * images, PATCH_BUCKETS) // 4 if images else 0  # the buckets count 4 a token
    columns = room + bucket(max(ids.shape[1] - images, 1))
    batch = make_batch(config, inputs, seq_len=columns, max_patches=room * unit or None)
    own = slice(columns - ids.shape[1], None)
    positions = batch["positions"].max(axis=1)[:, own]
    if images:
        # Padding has position 1. As in PyTorch it only counts where the batch is text alone, which
        # shows in rows of a single token.
        positions = np.where(batch["segment_ids"][:, own] > 0, positions, -1)
    return batch, positions.max(axis=1).astype(np.int32) + 1


def _mask(inputs: Inputs) -> np.ndarray:
    mask = inputs.get("attention_mask")
    return np.ones_like(inputs["input_ids"]) if mask is None else np.asarray(mask)


def lower_prefill(config: ModelConfig, params: Params, **sizes: Any) -> jax.stages.Lowered:
    """The prefill program of greedy generation, for the compiler; nothing is computed.

    Args:
      config: sizes.
      params: arrays, or jax.ShapeDtypeStruct with shardings.
      **sizes: of `_abstract`.
    """
    arguments, static, slots = _abstract(config, params, **sizes)
    return _prefill.lower(params, *arguments, **static, slots=slots, new=NEW_TOKENS)


def lower_decode(config: ModelConfig, params: Params, **sizes: Any) -> jax.stages.Lowered:
    """The decoding program, one token at a time; see `lower_prefill`."""
    arguments, static, slots = _abstract(config, params, **sizes)
    state = jax.eval_shape(
        functools.partial(_prefill, **static, slots=slots, new=NEW_TOKENS), params, *arguments
    )
    _, _, settings, stop = arguments
    limit = jax.ShapeDtypeStruct((), jnp.int32)
    return _decode.lower(params, state, limit, settings, stop, **static)


NEW_TOKENS = 512  # that `lower_prefill` and `lower_decode` leave room for


def _abstract(
    config: ModelConfig, params: Params, *, rows: int, prompt: int, patches: int, dtype: Any
) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """(arguments after the parameters, static arguments, cache slots) of a prompt of these sizes.

    Args:
      rows, prompt, patches: of the batch; 0 patches for text alone.
      dtype: compute dtype.
    """

    def shape(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    batch = {
        "tokens": shape(rows, prompt),
        "positions": shape(rows, 3, prompt),
        "segment_ids": shape(rows, prompt),
    }
    if patches:
        batch |= {
            "patches": shape(rows, patches, config.vision.patch_dim, dtype=jnp.float32),
            "patch_segment_ids": shape(rows, patches),
            "patch_positions": shape(rows, patches, 2),
            "patch_index": shape(rows, prompt),
        }
    settings = sampling(SamplingOptions(), range(rows))
    static = {"config": config, "dtype": jnp.dtype(dtype), "greedy": True}
    arguments = (batch, shape(rows), settings, np.full(8, -1, np.int32))
    return arguments, static, prompt + NEW_TOKENS


_STATIC = ("config", "dtype", "greedy")


@functools.partial(jax.jit, static_argnames=(*_STATIC, "slots", "new"))
def _prefill(
    params: Params,
    batch: dict[str, jax.Array],
    position: jax.Array,
    settings: Sampling,
    stop: jax.Array,
    *,
    config: ModelConfig,
    dtype: jnp.dtype,
    greedy: bool,
    slots: int,
    new: int,
) -> State:
    """Reads the prompts [B, S] into a cache of `slots` and takes the first token."""
    model = EchoVLM(config, dtype)
    out: Any = model.apply({"params": params}, batch)
    count = batch["tokens"].shape[0]
    cache = init_cache(config.text, count, slots, dtype)
    # Out-of-range columns of the scatter are dropped: padding isn't seen.
    vocab = config.text.vocab_size
    real = jnp.where(batch["segment_ids"] > 0, batch["tokens"], vocab)
    seen = jnp.zeros((count, vocab), bool)
    state = State(
        cache=extend_cache(cache, out.kv, batch["segment_ids"]),
        tokens=jnp.zeros((count, new), jnp.int32),
        step=jnp.int32(0),
        last=jnp.zeros(count, jnp.int32),
        position=position - 1,
        lengths=jnp.zeros(count, jnp.int32),
        done=jnp.zeros(count, bool),
        seen=seen.at[jnp.arange(count)[:, None], real].set(True, mode="drop"),
    )
    # Only the last column goes through the head: [B, S, V] would be gigabytes.
    logits: Any = model.apply({"params": params}, out.hidden[:, -1:], method="logits")
    return _take(state, logits[:, 0], settings, stop, greedy)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames=("state",))
def _decode(
    params: Params,
    state: State,
    limit: jax.Array,
    settings: Sampling,
    stop: jax.Array,
    *,
    config: ModelConfig,
    dtype: jnp.dtype,
    greedy: bool,
) -> State:
    """Goes on until `limit` tokens are there or every row has ended."""
    model = EchoVLM(config, dtype)

    def unfinished(state: State) -> jax.Array:
        return (state.step < limit) & ~state.done.all()

    def body(state: State) -> State:
        count = state.last.shape[0]
        batch = {
            "tokens": state.last[:, None],
            "positions": jnp.broadcast_to(state.position[:, None, None], (count, 3, 1)),
            "segment_ids": jnp.ones((count, 1), jnp.int32),
        }
        out: Any = model.apply({"params": params}, batch, state.cache)
        state = state._replace(cache=extend_cache(state.cache, out.kv, batch["segment_ids"]))
        logits: Any = model.apply({"params": params}, out.hidden, method="logits")
        return _take(state, logits[:, 0], settings, stop, greedy)

    return jax.lax.while_loop(unfinished, body, state)


def _take(
    state: State, logits: jax.Array, settings: Sampling, stop: jax.Array, greedy: bool
) -> State:
    """Chooses the next token of each row from its logits [B, V] and writes it down."""
    token = choose(logits, state.seen, settings, state.step, greedy=greedy)
    token = jnp.where(state.done, 0, token)
    return State(
        cache=state.cache,
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
        step=state.step + 1,
        last=token,
        position=state.position + 1,
        lengths=state.lengths + ~state.done,
        done=state.done | jnp.isin(token, stop),
        seen=state.seen.at[jnp.arange(token.shape[0]), token].set(True),
    )
