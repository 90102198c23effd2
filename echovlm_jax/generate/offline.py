"""Answers to prompts that are all there, or come from a file: rows end, and others take them."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.generate import engine
from echovlm_jax.generate.prompts import (
    Inputs,
    Prompt,
    check_new_tokens,
    check_room,
    prompt_lengths,
    split_rows,
)
from echovlm_jax.model.compute import Compute
from echovlm_jax.ops.attention.cached import COLUMNS
from echovlm_jax.ops.sampling import SamplingOptions
from echovlm_jax.processing.batch import bucket

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


def generate(
    config: ModelConfig,
    params: Any,
    inputs: Inputs,
    options: SamplingOptions = SamplingOptions(),
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int] = (),
    rows: Sequence[int] | None = None,
    dtype: Any = jnp.float32,
    on_tokens: Callable[[np.ndarray, np.ndarray], object] | None = None,
    compute: Compute = Compute(),
) -> Generated:
    """Continues each row of a batch.

    A row's answer doesn't depend on the other rows: each is read alone, in its own bucket, and has
    its own place in the cache. The number of rows chooses the program, and so the rounding of a
    product's last bits; their contents, lengths and order don't.

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
      compute: how it is computed; its layout is that of the mesh in the context.

    Raises:
      InputError: a prompt that leaves no room for max_new_tokens, or no such number.
    """
    check_new_tokens(config, max_new_tokens)
    lengths = prompt_lengths(inputs)
    check_room(config, int(lengths.max()), max_new_tokens)
    prompts = split_rows(config, inputs)
    numbers = range(len(prompts)) if rows is None else rows
    asked = (
        (prompt, engine.request(options, tuple(eos_token_ids), max_new_tokens, number))
        for prompt, number in zip(prompts, numbers, strict=True)
    )
    run = Run(config, params, dtype=jnp.dtype(dtype), compute=compute, on_tokens=on_tokens)
    made = dict(run.answer(asked, rows=len(prompts), new=max_new_tokens))
    tokens = np.zeros((len(made), max(map(len, made.values()))), np.int32)
    for b, row in made.items():
        tokens[b, : len(row)] = row
    counts = np.array([len(made[b]) for b in range(len(made))])
    return Generated(tokens, counts, lengths, *run.seconds.values())


Asked = tuple[Prompt, engine.Request]


@dataclass
class Run:
    """A model at work, and its clocks.

    Attributes:
      on_tokens: callback as `generate`'s; then tokens come a few at a time.
      seconds: of compiling, of prefill (until prompts' first tokens are there), and of decoding.
    """

    config: ModelConfig
    params: Any
    dtype: Any
    compute: Compute = Compute()
    on_tokens: Callable[[np.ndarray, np.ndarray], object] | None = None
    seconds: dict[str, float] = field(
        default_factory=lambda: {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
    )

    def answer(
        self, asked: Iterable[Asked], *, rows: int, new: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Answers prompts in a state of `rows` rows; as one ends, the next takes its row.

        A prompt that the cache has no room for waits until all rows have ended: then there is a
        larger one. `asked` is read one prompt ahead of the rows.

        Args:
          asked: prompts of one row each, and their requests.
          rows: how many are answered at one time.
          new: limit of new tokens of every request.

        Yields:
          As they end, the number of each prompt in `asked`, and its tokens [T].
        """
        coming, waiting = iter(enumerate(asked)), deque[tuple[int, Asked]]()
        running: dict[int, int] = {}  # row -> number
        state: Any = None
        columns = 0
        while True:
            while len(waiting) <= rows - len(running) and (one := next(coming, None)):
                waiting.append(one)
            if not waiting and not running:
                return
            if not running and _columns(waiting, rows, new) > columns:
                columns = _columns(waiting, rows, new)
                state = self._init(rows, columns, new, waiting[0][1][1])
            free = [row for row in range(rows) if row not in running]
            while waiting and free and _needed(waiting[0], new) <= columns:
                running[free[0]], (prompt, own) = waiting.popleft()
                state = self._insert(state, free.pop(0), prompt, own)
            following = bool(waiting) and _needed(waiting[0], new) <= columns
            while True:
                # Copies: what is kept must not lie in a buffer that the next call takes over.
                tokens, counts, done = (
                    np.array(x) for x in (state.tokens, state.count, state.done)
                )
                if self.on_tokens is not None:
                    self.on_tokens(tokens[:, : counts.max()], counts)
                ended = [row for row in running if done[row]]
                for row in ended:
                    yield running.pop(row), tokens[row, : counts[row]]
                if not running or (ended and following):
                    break
                state = self._decode(state, len(running) if following else 1)

    def _init(self, rows: int, columns: int, new: int, own: engine.Request) -> engine.State:
        stops, room = own.stop.shape[1], bucket(new)
        return engine.init_state(rows=rows, columns=columns, new=room, stops=stops, **self._static)

    def _insert(
        self, state: engine.State, row: int, prompt: Prompt, own: engine.Request
    ) -> engine.State:
        read = self._run("prefill", engine.prefill, self.params, prompt, **self._static)
        token = self._run("prefill", engine.first_token, read.logits, read.seen, own)
        static = {"config": self.config, "compute": self.compute}
        given = state, read, token, np.int32(row), own
        return self._run("prefill", engine.insert, *given, **static)

    def _decode(self, state: engine.State, least: int) -> engine.State:
        steps = np.int32(2**31 - 1 if self.on_tokens is None else STREAM_CHUNK)
        arguments = self.params, state, steps, np.int32(least)
        return self._run("decode", engine.decode, *arguments, **self._static)

    @property
    def _static(self) -> dict[str, Any]:
        return {"config": self.config, "dtype": jnp.dtype(self.dtype), "compute": self.compute}

    def _run(self, clock: str, program: Any, *arguments: Any, **static: Any) -> Any:
        started = time.perf_counter()
        # jit finds this program again in the call; made here, it counts as what it is.
        program.lower(*arguments, **static).compile()
        begun = time.perf_counter()
        result = jax.block_until_ready(program(*arguments, **static))
        self.seconds["compile"] += begun - started
        self.seconds[clock] += time.perf_counter() - begun
        return result


def _needed(one: tuple[int, Asked], new: int) -> int:
    return int(one[1][0].length[0]) + new


def _columns(waiting: Iterable[tuple[int, Asked]], rows: int, new: int) -> int:
    """Columns of a cache for the first `rows` of those that wait."""
    return columns_for(max(_needed(one, new) for one in itertools.islice(waiting, rows)))


def columns_for(tokens: int) -> int:
    """Columns of a cache that holds so many tokens a row: whole pieces of attention, two at least,
    since a single one is rounded in another way."""
    return max(-(-bucket(tokens) // COLUMNS), 2) * COLUMNS
