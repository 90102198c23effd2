"""The engine: three pure programs on an explicit state.

`prefill` reads a prompt, `insert` puts it into a free row of the state, with its first token, and
`decode_step` takes one more token of every row. Each row has its own length, position, settings of
sampling, stop tokens and limit: rows begin and end when they like, and none depends on another.
Nothing of a state's size is copied: its buffers are given to each program and written in place.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from echovlm_jax.config import ModelConfig
from echovlm_jax.generate.prompts import Prompt
from echovlm_jax.model import (
    Cache,
    EchoVLM,
    extend_cache,
    init_cache,
    insert_row,
    place_cache,
)
from echovlm_jax.model.compute import Compute
from echovlm_jax.ops.attention.cached import HEADS, ROWS, Stored
from echovlm_jax.ops.layout import Layout
from echovlm_jax.ops.sampling import Sampling, SamplingOptions, choose, sampling

Params = Any  # nested dict; its leaves are arrays, or what stands for one
# Stop tokens are filled up to a multiple of this: a few more or fewer make no other program.
_STOPS = 8


class Request(NamedTuple):
    """How a row goes on, and until when."""

    sampling: Sampling
    stop: Any  # [B, W] int32: tokens that end a row; −1, which no token is, fills up
    limit: Any  # [B] int32: of new tokens


class Prefilled(NamedTuple):
    """What `prefill` returns: all that an answer needs of its prompt."""

    cache: Cache
    logits: jax.Array  # [B, V] float32, of the last column
    seen: jax.Array  # [B, V] bool: tokens of the prompt
    position: jax.Array  # [B] int32: of the first new token


class State(NamedTuple):
    """Rows that are being answered, and free ones, which are done."""

    cache: Cache
    request: Request
    tokens: jax.Array  # [B, N] int32: the new tokens
    count: jax.Array  # [B] int32: how many of them are there
    last: jax.Array  # [B] int32: the newest
    position: jax.Array  # [B] int32: of `last`
    done: jax.Array  # [B] bool
    seen: jax.Array  # [B, V] bool: tokens of the prompt and the new ones


def request(
    options: SamplingOptions, stop: tuple[int, ...] | list[int], limit: int, row: int
) -> Request:
    """The request of one row, whose draws depend on the number `row`."""
    width = -(-max(len(stop), 1) // _STOPS) * _STOPS
    filled = [*stop, *[-1] * (width - len(stop))]
    limits = np.full(1, limit, np.int32)
    return Request(sampling(options, [row]), np.array([filled], np.int32), limits)


_STATIC = ("config", "dtype", "compute")


@functools.partial(
    jax.jit, static_argnames=("rows", "columns", "new", "stops", "config", "dtype", "compute")
)
def init_state(
    *,
    rows: int,
    columns: int,
    new: int,
    stops: int,
    config: ModelConfig,
    dtype: Any,
    compute: Compute = Compute(),
) -> State:
    """A state of free rows: a cache of `columns` each, and room for `new` tokens."""
    none = jnp.zeros(rows, jnp.int32)
    settings = sampling(SamplingOptions(), [0] * rows)
    return _placed(
        State(
            cache=init_cache(config.text, rows, columns, compute.cache or dtype),
            request=Request(jax.tree.map(jnp.asarray, settings), _no_stops(rows, stops), none),
            tokens=jnp.zeros((rows, new), jnp.int32),
            count=none,
            last=none,
            position=none,
            done=jnp.ones(rows, bool),
            seen=jnp.zeros((rows, config.text.vocab_size), bool),
        ),
        _layout(config, compute, rows),
    )


def _no_stops(rows: int, stops: int) -> jax.Array:
    return jnp.full((rows, stops), -1, jnp.int32)


@functools.partial(jax.jit, static_argnames=_STATIC)
def prefill(
    params: Params, prompt: Prompt, *, config: ModelConfig, dtype: Any, compute: Compute = Compute()
) -> Prefilled:
    """Reads prompts, most often one.

    One of more than compute.chunk columns is read piece by piece, each over the cache of those
    before it: then no array but the cache and the embeddings grows with the prompt.
    """
    batch, length = prompt.batch, prompt.length
    rows, columns = batch["tokens"].shape
    layout = _layout(config, compute, rows)
    model = _Model(params, config, dtype, compute, layout)
    x, _ = model("embed", batch)
    pieces = -(-columns // compute.chunk)
    if pieces == 1:
        hidden, outputs = model("decode", x, batch["positions"], batch["segment_ids"])
        cache = Cache(Stored(*outputs.kv), batch["segment_ids"], length)
        last = jnp.take_along_axis(hidden, length[:, None, None] - 1, axis=1)
    else:
        cache, last = _in_pieces(model, x, batch, length, pieces)
    vocab = config.text.vocab_size
    # Out-of-range columns of the scatter are dropped: padding isn't seen.
    real = jnp.where(batch["segment_ids"] > 0, batch["tokens"], vocab)
    seen = jnp.zeros((rows, vocab), bool)
    return Prefilled(
        cache=place_cache(cache, layout.constrain),
        # Only the last column goes through the head: [B, S, V] would be gigabytes.
        logits=_logits(model, last, layout),
        seen=seen.at[jnp.arange(rows)[:, None], real].set(True, mode="drop"),
        position=prompt.position,
    )


def _in_pieces(
    model: "_Model", x: jax.Array, batch: dict[str, Any], length: jax.Array, pieces: int
) -> tuple[Cache, jax.Array]:
    """The cache of a prompt that is read piece by piece, and its last column's result [B, 1, D]."""
    rows, columns = x.shape[:2]
    piece = -(-columns // (64 * pieces)) * 64

    def split(array: jax.Array, axis: int) -> jax.Array:
        gaps = [(0, pieces * piece - n if i == axis else 0) for i, n in enumerate(array.shape)]
        array = jnp.pad(array, gaps)
        shape = (*array.shape[:axis], pieces, piece, *array.shape[axis + 1 :])
        return jnp.moveaxis(array.reshape(shape), axis, 0)

    def read(carry: tuple[Cache, jax.Array], own: tuple[Any, ...]) -> tuple[Any, None]:
        cache, last = carry
        x, positions, segments, start = own
        hidden, outputs = model("decode", x, positions, segments, cache)
        at = length[:, None, None] - 1 - start
        found = jnp.take_along_axis(hidden, jnp.clip(at, 0, piece - 1), axis=1)
        last = jnp.where((at >= 0) & (at < piece), found, last)
        return (extend_cache(cache, outputs.kv, segments, model.layout), last), None

    cache = init_cache(model.config.text, rows, pieces * piece, x.dtype)
    starts = jnp.arange(pieces, dtype=jnp.int32) * piece
    own = (split(x, 1), split(batch["positions"], 2), split(batch["segment_ids"], 1), starts)
    begun = (place_cache(cache, model.layout.constrain), jnp.zeros_like(x[:, :1]))
    (cache, last), _ = jax.lax.scan(read, begun, own)
    return cache._replace(length=length), last


@jax.jit
def first_token(logits: jax.Array, seen: jax.Array, own: Request) -> jax.Array:
    """The first new token [B] of prompts as `prefill` returns them. It is a program of its own, so
    that all buckets share it."""
    none = jnp.zeros(logits.shape[0], jnp.int32)
    return jnp.asarray(choose(logits, seen, own.sampling, none))


@functools.partial(jax.jit, static_argnames=("config", "compute"), donate_argnames=("state",))
def insert(
    state: State,
    prompt: Prefilled,
    token: jax.Array,
    row: jax.Array,
    own: Request,
    *,
    config: ModelConfig,
    compute: Compute = Compute(),
) -> State:
    """Puts a prompt that `prefill` has read into a row of the state, with its first token.

    Args:
      state: rows; the one that is taken should be free.
      prompt: of one row; the state's cache has room for it and for what is to come.
      token: its `first_token` [1].
      row: which row [].
      own: its request, [1] or [1, W] each.
    """
    layout = _layout(config, compute, state.done.shape[0])
    one = jnp.ones(1, jnp.int32)

    def put(old: Any, new: Any) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, jnp.asarray(new, old.dtype), row, 0)

    return _placed(
        State(
            cache=insert_row(state.cache, prompt.cache, row, layout),
            request=jax.tree.map(put, state.request, own),
            tokens=put(state.tokens, jnp.pad(token[:, None], ((0, 0), (0, _room(state) - 1)))),
            count=put(state.count, one),
            last=put(state.last, token),
            position=put(state.position, prompt.position),
            done=put(state.done, _ended(token, one, own)),
            seen=put(state.seen, prompt.seen.at[0, token[0]].set(True)),
        ),
        layout,
    )


def _room(state: State) -> int:
    return state.tokens.shape[1]


def _ended(token: jax.Array, count: jax.Array, own: Request) -> jax.Array:
    return (token[:, None] == own.stop).any(axis=1) | (count >= own.limit)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames=("state",))
def decode_step(
    params: Params, state: State, *, config: ModelConfig, dtype: Any, compute: Compute = Compute()
) -> State:
    """One more token of every row that isn't done."""
    rows = state.done.shape[0]
    layout = _layout(config, compute, rows)
    model = _Model(params, config, dtype, compute, layout)
    live = ~state.done
    segments = live[:, None].astype(jnp.int32)
    positions = jnp.broadcast_to(state.position[:, None, None], (rows, 3, 1))
    x, _ = model("embed", {"tokens": state.last[:, None]})
    hidden, outputs = model("decode", x, positions, segments, state.cache)
    cache = extend_cache(state.cache, outputs.kv, segments, layout)
    cache = cache._replace(length=jnp.where(live, cache.length, state.cache.length))
    logits = _logits(model, hidden, layout)
    token = choose(logits, state.seen, state.request.sampling, state.count, state.done)
    token = jnp.where(live, token, 0)
    number, count = jnp.arange(rows), state.count + live
    at = jnp.where(live, state.count, _room(state))  # out of range: not written
    return _placed(
        State(
            cache=cache,
            request=state.request,
            tokens=state.tokens.at[number, at].set(token, mode="drop"),
            count=count,
            last=token,
            position=state.position + live,
            done=state.done | _ended(token, count, state.request),
            seen=state.seen.at[number, token].set(True),
        ),
        layout,
    )


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames=("state",))
def decode(
    params: Params,
    state: State,
    steps: jax.Array,
    least: jax.Array,
    *,
    config: ModelConfig,
    dtype: Any,
    compute: Compute = Compute(),
) -> State:
    """Up to `steps` [] decoding steps; ends before with fewer than `least` [] unfinished rows."""
    step = functools.partial(decode_step, params, config=config, dtype=dtype, compute=compute)

    def unfinished(carry: tuple[jax.Array, State]) -> jax.Array:
        return (carry[0] < steps) & ((~carry[1].done).sum() >= least)

    def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        return carry[0] + 1, step(carry[1])

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def _logits(model: "_Model", hidden: jax.Array, layout: Layout) -> jax.Array:
    """[B, V], whole on every device, of [B, 1, D].

    First each device's part of the vocabulary: asked for whole ones alone, XLA gathers the head's
    weight, which is larger by far.
    """
    parts = layout.constrain(model("logits", hidden)[:, 0], None, "vocab")
    return layout.constrain(parts, None, None)


class _Model:
    """The model's methods, applied to parameters."""

    def __init__(
        self, params: Params, config: ModelConfig, dtype: Any, compute: Compute, layout: Layout
    ) -> None:
        self.config, self.layout = config, layout
        self._params = {"params": params}
        self._module = EchoVLM(config, dtype, compute=dataclasses.replace(compute, layout=layout))

    def __call__(self, method: str, *arguments: Any) -> Any:
        return self._module.apply(self._params, *arguments, method=method)


def _layout(config: ModelConfig, compute: Compute, rows: int) -> Layout:
    """Where generation's arrays lie on the context's mesh.

    Activations are whole on every device but for their widths: they are small, so that they travel
    to the weights, which never move. The cache is split by rows over the mesh axes that split a
    batch, where they divide, and by heads.
    """
    given = compute.layout
    if not given.rules:
        return given
    split = given.size("batch") > 1 and rows % given.size("batch") == 0
    kv_heads = config.text.num_kv_heads
    heads = next(n for n in ("attn_kv_heads", "kv_heads") if kv_heads % given.size(n) == 0)
    rules = [rule for rule in given.rules if rule[0] not in ("batch", "lookup_batch", "length")]
    rules += [(ROWS, given.mesh_axes("batch") if split else ()), (HEADS, given.mesh_axes(heads))]
    return Layout(tuple(rules), given.sum_dtype)


def _placed(state: State, layout: Layout) -> State:
    """The state, laid out the same whichever program made it: the next one takes its buffers."""
    return _place(state, layout.constrain)


def _place(state: State, put: Any) -> State:
    """The state with `put(array, *logical axes)` in place of every array."""
    rest = jax.tree.map(lambda x: put(x, *[None] * x.ndim), state._replace(cache=None))
    return rest._replace(cache=place_cache(state.cache, put))


def lower_prefill(
    config: ModelConfig,
    params: Params,
    *,
    rows: int,
    prompt: int,
    patches: int,
    dtype: Any,
    slots: int | None = None,
    compute: Compute = Compute(),
) -> jax.stages.Lowered:
    """The program that reads prompts, for the compiler; nothing is computed.

    Args:
      config: sizes.
      params: parameters: arrays, or jax.ShapeDtypeStruct with shardings.
      rows, prompt, patches: sizes of the prompts, in rows, columns and patches a row; 0 patches for
        text alone.
      dtype: compute dtype.
      slots: columns of a cache for `rows` rows that lies beside it, and that one prompt goes into:
        what a device holds when it generates. None: the prompts alone.
      compute: how it is computed; its layout is that of the mesh in the context.
    """
    static: dict[str, Any] = {"config": config, "dtype": jnp.dtype(dtype), "compute": compute}
    if slots is None:
        return prefill.lower(params, _abstract(config, rows, prompt, patches), **static)

    def program(params: Params, state: State, prompt: Prompt, row: Any, own: Request) -> State:
        read = prefill(params, prompt, **static)
        token = first_token(read.logits, read.seen, own)
        return insert(state, read, token, row, own, config=config, compute=compute)

    own = request(SamplingOptions(), (), NEW_TOKENS, 0)
    return jax.jit(program, donate_argnums=1).lower(
        params,
        _abstract_state(rows, slots, static),
        _abstract(config, 1, prompt, patches),
        jax.ShapeDtypeStruct((), jnp.int32),
        own,
    )


def lower_decode(
    config: ModelConfig,
    params: Params,
    *,
    rows: int,
    slots: int,
    dtype: Any,
    compute: Compute = Compute(),
) -> jax.stages.Lowered:
    """One decoding step of `rows` rows over a cache of `slots` columns; see `lower_prefill`."""
    static: dict[str, Any] = {"config": config, "dtype": jnp.dtype(dtype), "compute": compute}
    return decode_step.lower(params, _abstract_state(rows, slots, static), **static)


NEW_TOKENS = 512  # that `lower_prefill` and `lower_decode` leave room for


def _abstract_state(rows: int, slots: int, static: dict[str, Any]) -> Any:
    """The shapes of a state, and on a mesh where it lies."""
    sizes = {"rows": rows, "columns": slots, "new": NEW_TOKENS, "stops": _STOPS}
    state = jax.eval_shape(lambda: init_state(**sizes, **static))
    layout = _layout(static["config"], static["compute"], rows)
    if not layout.rules:
        return state
    mesh = jax.sharding.get_mesh()

    def put(x: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, layout.spec(*axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return _place(state, put)


def _abstract(config: ModelConfig, rows: int, prompt: int, patches: int) -> Prompt:
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
    return Prompt(batch, shape(rows), shape(rows))
