"""The plan of an epoch: the content of every row of every batch. A data position is a step.

An epoch's plan is the same on every machine, whatever the number of processes and workers, so each
process makes it for itself and takes its rows of it; nothing is exchanged.
"""

import threading
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from echovlm_jax.data import epoch_cache
from echovlm_jax.data.examples import (
    REASONS,
    Example,
    NoExample,
    Source,
    conversation,
    measured,
    open_source,
)
from echovlm_jax.data.fit import Need
from echovlm_jax.data.keys import mix, number
from echovlm_jax.data.mixing import Draws, epoch_draws, ratios
from echovlm_jax.data.packing import WINDOW, Rows, pack
from echovlm_jax.data.record import LANGUAGES, Turn
from echovlm_jax.data.settings import Settings
from echovlm_jax.data.tasks import TASKS
from echovlm_jax.data.workers import Workers
from echovlm_jax.errors import InputError
from echovlm_jax.processing.files import shown

_SAMPLE, _ROWS = 3, 4  # what a key is for; mixing has 1 and 2
_CHUNK = 1024  # samples that a worker measures at a time
_TRIES = 16  # keys tried for a sample, until its words are unlike the exam's other samples'
_STEP = 128  # budgets that are advised are multiples of it: attention's blocks are
_SWAPS = 1000  # rows tried for one that holds an exam a second time in its batch


class Epoch(NamedTuple):
    """One epoch: M samples, and K that were left out. Row r holds the samples with the numbers
    `samples[offsets[r] : offsets[r + 1]]`; the last rows may hold none."""

    record: np.ndarray  # int32 [M], the number in the dataset
    repeat: np.ndarray  # int32 [M], how often this epoch drew the exam before
    key: np.ndarray  # uint64 [M], of which the sample is made
    tokens: np.ndarray  # int32 [M]
    patches: np.ndarray  # int32 [M]
    task: np.ndarray  # int8 [M], of tasks.TASKS
    language: np.ndarray  # int8 [M], of record.LANGUAGES
    shrunk: np.ndarray  # int32 [M]: media made smaller so that the sample fits a row
    samples: np.ndarray  # int32 [M]
    offsets: np.ndarray  # int64 [rows + 1], rows a multiple of the global batch size
    lost_record: np.ndarray  # int32 [K]
    lost_reason: np.ndarray  # int8 [K], of examples.REASONS
    lost_task: np.ndarray  # int8 [K], of tasks.TASKS; -1: none was drawn
    lost_need: np.ndarray  # int64 [K, 2]: budgets that it would fit, as fit.Need; 0: of no avail
    clashes: np.ndarray  # int64 []: samples whose exam their batch holds already

    @property
    def dropped(self) -> dict[str, int]:
        """How many samples were left out, by reason."""
        counts = np.bincount(self.lost_reason, minlength=len(REASONS))
        return {reason: int(n) for reason, n in zip(REASONS, counts, strict=True) if n}


class Sample(NamedTuple):
    """One sample of a row, for `examples.example`, and its lengths."""

    record: int
    key: int
    tokens: int
    patches: int


class Epochs:
    """A run's plan, made epoch by epoch as it is asked for. Threads may share it.

    To know in which epoch a step is, all epochs before it have to be planned, since they differ in
    length; with `Settings.cache` that happens once for all runs.
    """

    def __init__(self, source: Source, make: Callable[[Source, int], Epoch] | None = None) -> None:
        self.source = source
        self._make = make or make_epoch
        self._lock = threading.RLock()
        self._epochs: dict[int, Epoch] = {}  # the last two
        self._ends: list[int] = []  # the step at which each epoch ends

    def epoch(self, number: int) -> Epoch:
        with self._lock:
            if number not in self._epochs:
                for old in sorted(self._epochs)[:-1]:
                    del self._epochs[old]
                self._epochs[number] = self._make(self.source, number)
            return self._epochs[number]

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch that a step (a global batch) is in, and its number there; both from 0."""
        size = self.source.settings.global_batch_size
        with self._lock:
            while not self._ends or self._ends[-1] <= step:
                rows = len(self.epoch(len(self._ends)).offsets) - 1
                self._ends.append((self._ends[-1] if self._ends else 0) + rows // size)
            epoch = int(np.searchsorted(self._ends, step, side="right"))
            return epoch, step - (self._ends[epoch - 1] if epoch else 0)

    def row(self, step: int, row: int) -> list[Sample]:
        """The content of a row of a step's global batch, in order; empty for an empty row."""
        number, batch = self.locate(step)
        epoch = self.epoch(number)
        at = batch * self.source.settings.global_batch_size + row
        return [
            Sample(*(int(a[i]) for a in (epoch.record, epoch.key, epoch.tokens, epoch.patches)))
            for i in epoch.samples[epoch.offsets[at] : epoch.offsets[at + 1]]
        ]


def make_epoch(
    source: Source, epoch: int, check: Callable[[Epoch], None] = lambda planned: None
) -> Epoch:
    """Plans one epoch, or reads its plan from the cache.

    Args:
      check: a check of the plan; if it raises, nothing is cached.

    Raises:
      InputError: the mixture doesn't fit the data, nothing of the data fits a row, or the cache
        folder can't be used.
    """
    settings = source.settings
    if settings.cache is None:
        planned = _plan(source, epoch)
        check(planned)
        return planned
    name = f"{epoch_cache.fingerprint(source)}-{epoch}"
    found = epoch_cache.read(settings.cache, name, Epoch._fields)
    planned = _plan(source, epoch) if found is None else Epoch(**found)
    check(planned)
    if found is None:
        epoch_cache.write(settings.cache, name, planned._asdict())
    return planned


def make_beginning(source: Source) -> Epoch:
    """The plan of the first samples of the first epoch, as many as are packed together: how full
    rows get, without measuring all of the data.

    Raises:
      InputError: as `make_epoch`.
    """
    return _plan(source, 0, WINDOW)


def mend(settings: Settings, needs: np.ndarray) -> str:
    """The configuration keys and values with which samples of these needs fit unchanged.

    Args:
      needs: int [K, 2], as `Epoch.lost_need`.

    Returns:
      "--config.seq_len=1280 --config.max_patches=640"; empty where no budget is what is wrong.
    """
    changes = []
    for key, least in zip(Need._fields, needs.max(axis=0, initial=0).tolist(), strict=True):
        if least > getattr(settings, key):
            changes.append(f"--config.{key}={-(-least // _STEP) * _STEP}")
    return " ".join(changes)


def _plan(source: Source, epoch: int, most: int | None = None) -> Epoch:
    settings, dataset = source.settings, source.dataset
    counts = [len(peers) for peers in source.peers]
    ratio = ratios(
        counts,
        dataset.organ_names,
        temperature=settings.mix_temperature,
        weights=dict(settings.organ_weights) if settings.organ_weights else None,
    )
    draws = epoch_draws(dataset.organs, ratio, seed=settings.seed, epoch=epoch)
    draws = Draws(*(column[:most] for column in draws))
    keys = mix(settings.seed, _SAMPLE, epoch, draws.record, draws.repeat)
    made = measure(source, draws.record, keys)
    kept = made["reason"] < 0
    if not kept.any():
        counted = Counter(REASONS[i] for i in made["reason"])
        budgets = mend(settings, made["need"])
        raise InputError(
            f"data {shown(settings.data)}: none of its {len(kept)} samples can be used"
            f" ({', '.join(f'{reason}: {n}' for reason, n in counted.items())});"
            f" {f'give rows room with {budgets}' if budgets else 'mend the data'}"
        )
    record, tokens, patches = (a[kept] for a in (draws.record, made["tokens"], made["patches"]))
    rows = pack(
        tokens,
        patches,
        settings.seq_len,
        settings.max_patches,
        key=int(mix(settings.seed, _ROWS, epoch)),
        groups=record,
    )
    rows, clashes = spread_repeats(rows, record, settings.global_batch_size)
    return Epoch(
        record=record,
        repeat=draws.repeat[kept],
        key=made["key"][kept],
        tokens=tokens,
        patches=patches,
        task=made["task"][kept],
        language=made["language"][kept],
        shrunk=made["shrunk"][kept],
        samples=rows.samples,
        offsets=rows.offsets,
        lost_record=draws.record[~kept],
        lost_reason=made["reason"][~kept],
        lost_task=made["task"][~kept],
        lost_need=made["need"][~kept],
        clashes=np.asarray(clashes, np.int64),
    )


def measure(source: Source, records: np.ndarray, keys: np.ndarray) -> dict[str, np.ndarray]:
    """What each sample will be: its final key, its lengths, or why there is none.

    Args:
      records: int [M], numbers in the dataset; keys: uint64 [M], the ones to try first.

    Returns:
      key uint64; tokens, patches, shrunk int32; task, language, reason int8 (−1: none), [M] each;
      need int64 [M, 2], of those that are too long. A sample without a task has task −1.
    """
    # An exam's samples lie next to each other: one who makes a sample knows the others.
    order = np.lexsort((np.arange(len(records)), records))
    records, keys = records[order], keys[order]
    firsts = np.flatnonzero(np.diff(records, prepend=-1))
    cuts = np.arange(0, len(records), _CHUNK)
    cuts = np.unique(np.append(firsts[np.searchsorted(firsts, cuts, side="right") - 1], len(order)))
    jobs = [(records[a:b], keys[a:b]) for a, b in pairwise(cuts)]
    workers = min(source.settings.workers, len(jobs) // 4)  # starting one takes a second
    if workers > 1:
        parts = _measure_in_workers(source, jobs, workers)
    else:
        parts = [_measure_chunk(source, *job, lambda n: None) for job in jobs]
    out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name, values in out.items():
        back = np.empty_like(values)
        back[order] = values
        out[name] = back
    return out


_COLUMNS: Mapping[str, Any] = {
    "key": np.uint64,
    "tokens": np.int32,
    "patches": np.int32,
    "task": np.int8,
    "language": np.int8,
    "shrunk": np.int32,
    "reason": np.int8,
}
_NEED = len(Need._fields)


def _columns(count: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each array that measuring fills."""
    return {name: ((count,), dtype) for name, dtype in _COLUMNS.items()} | {
        "need": ((count, _NEED), np.int64)
    }


def _measure_in_workers(
    source: Source, jobs: Sequence[tuple[np.ndarray, np.ndarray]], count: int
) -> list[dict[str, np.ndarray]]:
    capacity = max(len(records) for records, _ in jobs)
    layout = _columns(capacity)

    def name(job: tuple[np.ndarray, np.ndarray], part: int) -> str:
        records, _ = job
        if part < 0:
            return f"records {records[0]} to {records[-1]}"
        return f"record {source.dataset.record(int(records[part])).id}"

    workers = Workers(partial(_fill, source.settings), count, layout, name)

    def run(job: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
        shared = workers.share()
        workers(job, shared)
        return {name: values[: len(job[0])].copy() for name, values in shared.arrays.items()}

    try:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(run, jobs))
    finally:
        workers.close()


_opened = lru_cache(maxsize=1)(open_source)  # in a worker: opened for its first chunk


def _fill(settings: Settings, job: Any, out: Mapping[str, np.ndarray], note: Any) -> None:
    records, keys = job
    for name, values in _measure_chunk(_opened(settings), records, keys, note).items():
        out[name][: len(values)] = values


def _measure_chunk(
    source: Source, records: np.ndarray, keys: np.ndarray, note: Any
) -> dict[str, np.ndarray]:
    """`measure` of samples that are sorted by record. `note` hears which one is begun."""
    out = {name: np.zeros(*of) for name, of in _columns(len(records)).items()}
    seen: set[tuple[Turn, ...]] = set()  # of this record's samples so far
    for i, (record, first) in enumerate(zip(records.tolist(), keys.tolist(), strict=True)):
        note(i)
        if i and record != records[i - 1]:
            seen.clear()
        key, found = _choose(source, record, first, seen)
        if isinstance(found, NoExample):
            out["reason"][i] = REASONS.index(found.reason)
            out["task"][i] = -1 if found.task is None else TASKS.index(found.task)
            out["need"][i] = found.need or 0
            continue
        seen.add(found.turns)
        task, language = TASKS.index(found.task), LANGUAGES.index(found.language)
        row = (key, found.tokens, found.patches, task, language, found.shrunk, -1)
        for name, value in zip(_COLUMNS, row, strict=True):
            out[name][i] = value
    return out


def _choose(
    source: Source, record: int, first: int, seen: Container[tuple[Turn, ...]]
) -> tuple[int, Example | NoExample]:
    """A key and what it makes: `first`'s sample, or the reason why there is none.

    Where that was `seen` already, a key that sets the same task in other words is looked for.
    Never one that sets another task: those that fit would stand in for those that don't, and
    nobody would know.
    """
    try:
        made = measured(source, record, conversation(source, record, first))
    except NoExample as error:
        return first, error
    if made.turns not in seen:
        return first, made
    for attempt in range(1, _TRIES):
        key = number(first, attempt)
        try:
            found = conversation(source, record, key)
            if found.task == made.task and found.turns not in seen:
                return key, measured(source, record, found)
        except NoExample:
            continue
    return first, made


def spread_repeats(rows: Rows, record: np.ndarray, batch_size: int) -> tuple[Rows, int]:
    """Rows in whole batches, with no exam twice in a batch where that can be had by swapping rows.

    Args:
      rows: R rows; record: int [M], each sample's exam.

    Returns:
      the rows, with empty ones at the end up to a multiple of `batch_size`; and the number of
      samples whose exam their batch holds already.
    """
    count = len(rows.offsets) - 1
    lengths = np.diff(rows.offsets)
    often = np.bincount(record)[record] > 1  # per sample: its exam comes up again
    row_of = np.repeat(np.arange(count), lengths)
    # Of each row, the exams that matter: only those that come up again can clash.
    held: list[list[int]] = [[] for _ in range(count)]
    at = np.flatnonzero(often[rows.samples])
    for row, exam in zip(row_of[at].tolist(), record[rows.samples[at]].tolist(), strict=True):
        held[row].append(exam)
    order = list(range(count))  # the row that stands at each place
    batches = [Counter[int]() for _ in range(-(-count // batch_size))]
    for place in range(count):
        batches[place // batch_size].update(held[place])
    for place in range(count):
        if any(batches[place // batch_size][exam] > 1 for exam in held[order[place]]):
            _swap_away(place, order, held, batches, batch_size)
    clashes = sum(n - 1 for batch in batches for n in batch.values() if n > 1)
    starts = rows.offsets[:-1]
    moved = [rows.samples[starts[r] : starts[r] + lengths[r]] for r in order]
    samples = np.concatenate(moved) if moved else rows.samples
    full = np.zeros(len(batches) * batch_size, np.int64)
    full[:count] = lengths[order]
    return Rows(samples, np.concatenate([[0], np.cumsum(full)])), clashes


def _swap_away(
    place: int,
    order: list[int],
    held: Sequence[Sequence[int]],
    batches: Sequence[Counter[int]],
    batch_size: int,
) -> None:
    """Swaps a row with the next one after it, cyclically, that leaves neither batch with a clash
    of theirs; where none does, leaves it."""
    here, mine = batches[place // batch_size], held[order[place]]
    for step in range(1, min(len(order), _SWAPS)):
        other = (place + step) % len(order)
        there, its = batches[other // batch_size], held[order[other]]
        if there is here:
            continue
        if all(there[e] - its.count(e) == 0 for e in mine) and all(
            here[e] - mine.count(e) == 0 for e in its
        ):
            here.subtract(mine)
            there.subtract(its)
            here.update(its)
            there.update(mine)
            order[place], order[other] = order[other], order[place]
            return
