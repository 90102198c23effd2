"""Where a run's wall time goes: one stopwatch that is always in exactly one part.

JAX's dispatch is asynchronous: while the host waits for a batch, the devices still compute the step
before. That wait costs nothing, and is a step's time; `data_wait` is what is left of it once the
devices had finished. When they finish is seen by a thread that waits for them, so that the loop
never does.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

# start: from `train` being called until the first batch is asked for, restoring included, compiling
# not. step: the loop, where it is in no other part. evaluation: with its program's first compiling.
# save: what of it the loop waits for. lost: from the checkpoint that a later try went on from, to
# the last sign of the try that made it. between: from that until the later try began. other: what
# comes after the loop.
PARTS = ("start", "compile", "data_wait", "step", "evaluation", "save", "other", "lost", "between")

_Made = TypeVar("_Made")


class Clock:
    """The wall time of a run, over all its tries, in PARTS; it begins when it is made."""

    def __init__(self) -> None:
        self._began, self._since = time.time(), time.perf_counter()
        self._part = "start"
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._waited = 0.0  # for data, in this try and process
        self._asked = 0.0  # when the batch of the step in hand was asked for
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._steps, self._step_seconds = 0, list[float]()
        self._done = self._since  # when the devices last finished a step

    def resume(self, kept: Mapping[str, Any], last_sign: float, *, whole: bool) -> None:
        """Goes on from what `kept` gave at the checkpoint that this try goes on from.

        All that came after that is lost or between tries; nothing where the run was `whole`: no
        step was left to make, whatever the time since then.

        Args:
          last_sign: the time (seconds since 1970) of the last line of the tries before.
        """
        for part, seconds in kept["seconds"].items():
            self._seconds[part] += seconds
        if not whole:
            last_sign = max(last_sign, kept["time"])
            self._seconds["lost"] += max(0.0, min(last_sign, self._began) - kept["time"])
            self._seconds["between"] += max(0.0, self._began - last_sign)

    def kept(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        self.enter(self._part)
        return {"time": time.time(), "seconds": dict(self._seconds)}

    def enter(self, part: str) -> str:
        """Time counts for `part` from now on; returns the part before."""
        now, before = time.perf_counter(), self._part
        self._seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    @contextlib.contextmanager
    def during(self, part: str) -> Iterator[None]:
        """What is done in here counts for `part`."""
        before = self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def data_wait(self, make: Callable[[], _Made]) -> _Made:
        """`make()`, a step's batch; then comes the step."""
        self.enter("data_wait")
        self._asked = self._since
        batch = make()
        self.enter("step")
        # All that were begun are finished: since then the devices had nothing to do.
        idle = len(self._step_seconds) == self._steps
        waited = max(0.0, self._since - max(self._asked, self._done)) if idle else 0.0
        hidden = self._since - self._asked - waited
        self._seconds["data_wait"] -= hidden
        self._seconds["step"] += hidden
        self._waited += waited
        return batch

    def watch(self, metrics: Any) -> None:
        """Notes when the devices will have finished the step that was just begun.

        Args:
          metrics: arrays that the step computes.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="clock", daemon=True)
            self._thread.start()
        self._steps += 1
        self._queue.put((self._asked, metrics))

    def _watch(self) -> None:
        while (begun := self._queue.get()) is not None:
            asked, metrics = begun
            with contextlib.suppress(Exception):  # the loop reads them too, and tells
                jax.block_until_ready(metrics)
            now = time.perf_counter()
            seconds, self._done = now - max(asked, self._done), now
            self._step_seconds.append(seconds)

    def stop(self) -> None:
        """The loop is over: no more steps come."""
        self.enter("other")
        self._queue.put(None)

    def goodput(self) -> dict[str, float]:
        """Seconds of the run until now by part, `wall`, their sum, and `goodput`, the share of it
        that went into steps which count."""
        self.enter(self._part)
        wall = sum(self._seconds.values())
        return {"goodput": self._seconds["step"] / wall, "wall": wall, **self._seconds}

    def report(self) -> dict[str, Any]:
        """`goodput` and, of this try, `step_seconds`: p50, p90, p99 and max of a step's seconds, a
        wait for its data included. Of a job of several processes also `straggler`: the process that
        waited longest for data, its seconds, and the median process's. They all call this."""
        found: dict[str, Any] = self.goodput()
        if self._thread is not None:
            self._thread.join()
        if self._step_seconds:
            p50, p90, p99, most = np.percentile(self._step_seconds, (50, 90, 99, 100)).tolist()
            found["step_seconds"] = {"p50": p50, "p90": p90, "p99": p99, "max": most}
        if jax.process_count() > 1:
            waits = np.ravel(multihost_utils.process_allgather(np.float32(self._waited)))
            slowest, median = int(np.argmax(waits)), float(np.median(waits))
            found["straggler"] = {
                "process": slowest, "data_wait": float(waits[slowest]), "median": median
            }  # fmt: skip
        return found
