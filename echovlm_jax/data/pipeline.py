"""Batches for training: Grain over the plan's rows, built by worker processes, on any number of
hosts, from any step on."""

import contextlib
import dataclasses
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from echovlm_jax.data import rows
from echovlm_jax.data.epoch import Epoch, Epochs, Sample, make_epoch
from echovlm_jax.data.examples import Source, open_source
from echovlm_jax.data.settings import Settings
from echovlm_jax.data.workers import Layout, Shared, Workers
from echovlm_jax.errors import InputError

Batch = dict[str, np.ndarray]

# From so many samples on, the next epoch is planned in the background, while this one is read. It
# takes seconds then; below that it isn't worth a process.
PLAN_AHEAD = 20_000


def make_batches(
    config: Mapping[str, Any],
    *,
    process_index: int = 0,
    process_count: int = 1,
    start_step: int = 0,
) -> Iterator[Batch]:
    """Training batches without end, epoch after epoch.

    The global batch of a step follows from the configuration and the data alone. Process p of n
    gets its p-th n-th of the rows; neither `process_count` nor the number of workers nor
    `start_step` changes a byte of any row. So the position in the data is one number, the step.

    Args:
      config: a training configuration (`Settings` names the keys read).
      process_index, process_count: which rows; `jax.process_index()` and `jax.process_count()`.
      start_step: the first step; what an uninterrupted run would see there.

    Yields:
      R = global_batch_size / process_count rows of up to S = seq_len tokens and P = max_patches
      patches, int32 unless said otherwise. tokens, labels (−100: no loss), segment_ids (a number
      for each exam from 1, 0 = padding), organs (see `rows.fill_row`) and patch_index (a vision
      token's merged patch, −1 = text) [R, S]; positions [R, 3, S]; patches float32 [R, P, 1176];
      patch_segment_ids (a number for each frame from 1) [R, P]; patch_positions (h, w) [R, P, 2].
      No patch arrays where P is 0.
      The arrays are the caller's to keep. `close()` ends the worker processes; so does dropping
      the iterator.

    Raises:
      InputError: the data, or a value of the configuration, can't be used; while iterating: a
        record can't be read, and the message names it.
      WorkerDied: while iterating: a worker process ended. It names the record that it was at.
    """
    settings = Settings.from_config(config)
    size = settings.global_batch_size
    if not 0 <= process_index < process_count or size % process_count:
        raise InputError(
            f"process {process_index} of {process_count} can't share global_batch_size {size}:"
            " it must be a multiple of the number of processes"
        )
    if start_step != int(start_step) or start_step < 0:
        raise InputError(f"start_step must be a whole number of at least 0, found {start_step}")
    source = open_source(settings)
    unit = source.model.vision.merge_unit
    if settings.max_patches % unit:
        raise InputError(f"max_patches {settings.max_patches} must be a multiple of {unit}")
    ahead = _Ahead(settings)
    epochs = Epochs(source, ahead.epoch)
    epochs.locate(
        start_step
    )  # now: what is wrong with the data is said before anything is compiled
    count = size // process_count
    return _batches(epochs, ahead, process_index * count, count, start_step)


def global_arrays(batch: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict[str, Any]:
    """This process's rows of a batch as its part of global `jax.Array`s, which on a CPU may share
    the batch's memory.

    Args:
      batch: one of `make_batches`, with this process's index and the number of processes.
      like: a jax.ShapeDtypeStruct of each wanted global array, with its sharding; a
        process's devices must hold its own rows and no others.
    """
    import jax

    return {
        key: jax.make_array_from_process_local_data(
            one.sharding, batch[key].astype(one.dtype, copy=False), one.shape
        )
        for key, one in like.items()
    }


def _batches(
    epochs: Epochs, ahead: "_Ahead", first: int, count: int, start_step: int
) -> Iterator[Batch]:
    """Rows `first` to `first + count` of each global batch."""
    import grain  # here: it imports JAX, which worker processes do without

    source, settings = epochs.source, epochs.source.settings
    layout = {
        key: ((count, *shape), dtype)
        for key, (shape, dtype) in rows.row_layout(settings, source.model).items()
    }
    building: dict[int, Shared] = {}  # by step; Grain asks for a row at a time, in order
    lock = threading.Lock()

    def row(i: int) -> tuple[int, Batch]:
        """Builds the i-th row of this process where it belongs: in its batch, which is returned."""
        step, at = start_step + i // count, i % count
        samples = epochs.row(step, first + at)
        with lock:
            if step not in building:
                building[step] = workers.share() if workers else _own(layout)
            batch = building[step]
        build(samples, batch, at)
        return step, batch.arrays

    def whole(parts: Sequence[tuple[int, Batch]]) -> Batch:
        step, batch = parts[0]
        with lock:
            del building[step]
        return batch

    with contextlib.ExitStack() as stack:
        stack.callback(ahead.close)
        ahead.start()
        workers = None
        if settings.workers:
            fill = partial(rows.fill_row_in_worker, settings)
            workers = Workers(fill, settings.workers, layout, partial(_name, source))
            stack.callback(workers.close)
        build = workers or partial(_fill_here, source)
        # A thread more than workers: its row waits for the first worker that is idle.
        threads = settings.workers + 1
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + count)
        numbers = grain.MapDataset.range(sys.maxsize)
        batches = iter(numbers.map(row).to_iter_dataset(options).batch(count, batch_fn=whole))
        stack.callback(batches.close)
        while True:
            batch = next(batches)
            if workers:
                workers.check()  # of a row that is yet to come: better now than batches later
            yield batch
            del batch  # it is large, and the caller's


def _own(layout: Layout) -> Shared:
    """A batch of this process's own memory."""
    return Shared({key: np.empty(shape, dtype) for key, (shape, dtype) in layout.items()}, 0)


def _fill_here(source: Source, samples: list[Sample], batch: Shared, row: int) -> None:
    out = {key: array[row] for key, array in batch.arrays.items()}
    at = -1

    def note(n: int) -> None:
        nonlocal at
        at = n

    try:
        rows.fill_row(source, samples, out, note)
    except InputError as error:
        raise InputError(f"{_name(source, samples, at)}: {error}") from None


def _name(source: Source, samples: list[Sample], part: int) -> str:
    """The name of a part of a row in errors."""
    names = [repr(source.dataset.record(sample.record).id) for sample in samples]
    if not 0 <= part < len(names):
        return f"the records {', '.join(names)} of {source.settings.data}"
    return f"record {names[part]} of {source.settings.data}"


class _Ahead:
    """Plans the next epoch in a process of its own while the rows of this one are read: no batch
    waits for it, and this process's interpreter lock stays the training loop's."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._latest = (-1, 0)  # the last epoch planned, and its number of samples
        self._on = False
        self._coming: dict[int, Future[None]] = {}
        self._folder: Path | None = None
        self._stack = contextlib.ExitStack()
        self._workers: Workers | None = None

    def epoch(self, source: Source, number: int) -> Epoch:
        """`make_epoch`, once what is being planned already is there. Then the next one is begun."""
        if coming := self._coming.pop(number, None):
            coming.result()
            epoch = make_epoch(source._replace(settings=self._with_cache()), number)
            if self._folder:
                for file in self._folder.iterdir():
                    file.unlink()
        else:
            epoch = make_epoch(source, number)
        self._latest = (number, len(epoch.record))
        if self._on:
            self.start()
        return epoch

    def start(self) -> None:
        """Begins the epoch after the latest; from now on each request begins the next epoch."""
        self._on = True
        number, samples = self._latest
        if not self._settings.workers or samples < PLAN_AHEAD:
            return
        if self._workers is None:
            if self._settings.cache is None:  # the way from that process to this one is a file
                folder = tempfile.TemporaryDirectory(prefix="echovlm-plan-")
                self._folder = Path(self._stack.enter_context(folder))
            fill = partial(_plan_in_worker, dataclasses.replace(self._with_cache(), workers=0))
            self._workers = Workers(fill, 1, {}, lambda n, part: f"the plan of epoch {n}")
            self._stack.callback(self._workers.close)
        coming: Future[None] = Future()
        self._coming[number + 1] = coming
        threading.Thread(
            target=_settle, args=(coming, self._workers, number + 1), daemon=True
        ).start()

    def close(self) -> None:
        self._stack.close()

    def _with_cache(self) -> Settings:
        return dataclasses.replace(self._settings, cache=self._settings.cache or self._folder)


def _plan_in_worker(settings: Settings, number: int, out: Batch, note: Any) -> None:
    make_epoch(open_source(settings), number)


def _settle(future: Future[None], workers: Workers, number: int) -> None:
    try:
        workers(number)
        future.set_result(None)
    except Exception as error:
        future.set_exception(error)
