"""Watches a job's processes while they train: the one that is lost, hangs or is slow is named.

Every few seconds a thread of each process tells JAX's coordinator how far it is, and reads what the
others told. The loop only notes what it does, and waits for nothing. Lost is a process that is no
longer heard of: killed, stopped, or cut off. One that lives hangs where a step takes too long. Who
sees that first tells all; each process then ends with one line, and the exit code LOST. Where one
fails by itself, the others end with its exit code: what fails again is not worth another try.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax._src import distributed  # the coordinator's client, which nothing public gives
from jax.experimental import multihost_utils

from echovlm_jax.errors import InputError
from echovlm_jax.storage import retry

_Batch = TypeVar("_Batch")

LOST = os.EX_UNAVAILABLE  # 69
# In beats, of 1/25 of the heartbeat each. JAX itself takes a process for lost half a heartbeat
# after its death at the earliest, and then ends all: what is known by then can be said.
_BEATS, _SILENT, _WINDOW = 25, 8, 12
_DATA, _STEP, _ELSE = "waits for its data", "computes", "saves, evaluates or logs"
_START_MS = 3_600_000  # for the slowest process to come as far as the first
_UNTIMED = 2  # the first steps load programs, and choose among kernels
_SLOW = 0.2  # of a step's time, more than the others
_runs = itertools.count()


class Watch:
    """A context manager. What is not entered watches nothing, and only counts.

    Args:
      heartbeat: seconds after which JAX takes a process of the job for lost.
      step_timeout: seconds for a step and the wait for its data, each, or ten times the longest
        step so far if that is more; 0: no limit. The first two steps, compiling, evaluating and
        saving have none.
      exit_code: that of a process which ends with an exception.
    """

    def __init__(
        self,
        heartbeat: float = 100.0,
        step_timeout: float = 0.0,
        exit_code: Callable[[Exception], int] = lambda error: 1,
    ) -> None:
        self._exit_code = exit_code
        self._beat, self._limit = heartbeat / _BEATS, step_timeout
        self._now: tuple[str, int, float] = (_ELSE, 0, 0.0)  # what, in which step, since when
        self._began = self._longest = 0.0
        # Seconds of its own: for data, which the loop counts, and standing still, the watch.
        self._waited = self._stalled = 0.0
        self._steps = 0  # made by this process
        self._told: dict[int, dict[str, Any]] = {}  # of each process, what it told last
        self._silent: dict[int, int] = {}  # for how many beats it has told nothing new
        self._slow: list[int] = []
        self._mark: tuple[float, dict[int, dict[str, Any]]] = (0.0, {})
        self._asleep: float | None = None  # since when its thread waits for the next beat
        self._stood = 0.0  # how much longer than that it last waited
        self._heard = 0.0
        self._index, self._client = 0, None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def next(self, batches: Iterator[_Batch], step: int | None = None) -> _Batch:
        """The next batch: of the step after `step` steps, which begins, or of an evaluation."""
        self._began = time.monotonic()
        at = self._now[1] if step is None else step + 1
        self._now = (_DATA, at, self._began)
        batch = next(batches)
        now = time.monotonic()
        self._waited += now - self._began
        self._now = (_ELSE if step is None else _STEP, at, now)
        return batch

    def made(self, step: int) -> int:
        """Notes that so many steps are made, and returns that."""
        now = time.monotonic()
        self._steps += 1
        if self._steps > _UNTIMED:
            self._longest = max(self._longest, now - self._began)
        self._now = (_ELSE, step, now)
        return step

    def retries(self) -> int:
        """How many reads and requests all processes have made again, as far as they have told."""
        others = (told["retries"] for i, told in self._told.items() if i != self._index)
        return retry.counted() + sum(others)

    def __enter__(self) -> Watch:
        self._index = jax.process_index()
        self._client = distributed.global_state.client if jax.process_count() > 1 else None
        self._place = f"echovlm/watch/{next(_runs)}"
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        if self._client is not None:
            self._tell()
            self._client.wait_at_barrier(self._place, _START_MS)
            self._exchange()  # now it knows all hosts
            self._restore = _at_abort(self._abort)
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        assert self._thread is not None
        if error is not None and self._client is not None:
            text = " ".join(str(error).split()) if isinstance(error, InputError) else kind.__name__
            if isinstance(error, Exception) and not isinstance(error, InputError | OSError):
                # A collective fails where another process dies, and says no more than that.
                seconds = (_SILENT + 4) * self._beat
                _say(f"{self._name()} fails: {text}; waits {seconds:.0f} s for word of another one")
                self._thread.join(seconds)
            code = self._exit_code(error) if isinstance(error, Exception) else 1
            self._accuse(self._index, f"failed: {text}", code)
            until = time.monotonic() + 3 * self._beat
            # Its end is that of the coordinator: the others have to read first, or to end.
            while self._index == 0 and time.monotonic() < until and not self._others_are_done():
                time.sleep(self._beat / 10)
        self._ended.set()
        self._thread.join()
        if self._client is not None:
            self._restore()
            with contextlib.suppress(RuntimeError):
                self._tell(done=True)

    def _run(self) -> None:
        for beat in itertools.count(1):
            self._asleep = before = time.monotonic()
            if self._ended.wait(self._beat):
                return
            self._asleep = None
            self._stood = time.monotonic() - before - self._beat
            self._stalled += max(0.0, self._stood)
            try:
                verdict = self._exchange()
            except RuntimeError:  # JAX ends this process if that lasts: `_abort`
                continue
            if verdict is not None:
                self._leave(verdict)
                continue
            if (found := self._judge()) is not None:
                self._accuse(*found)
            elif self._index == 0 and beat % _WINDOW == 0:
                self._compare()

    def _exchange(self) -> dict[str, Any] | None:
        """Tells, reads what all have told, and returns what ends the job, if anything does."""
        self._tell()
        if self._client is None:
            return None
        found = {
            key.rpartition("/")[2]: json.loads(value)
            for key, value in self._client.key_value_dir_get(self._place)
        }
        verdict = found.pop("verdict", None)
        told = {int(key): value for key, value in found.items()}
        self._silent = {
            # Beats of this thread, no seconds: what was stopped itself suspects nobody.
            i: self._silent.get(i, 0) + 1 if told[i] == self._told.get(i) else 0
            for i in told
            if i != self._index and not told[i]["done"]
        }
        self._told, self._heard = told, time.monotonic()
        return verdict

    def _tell(self, done: bool = False) -> None:
        what, step, since = self._now
        now = time.monotonic()
        limit = max(self._limit, 10 * self._longest) if self._limit else float("inf")
        own = {
            "host": socket.gethostname(),
            "doing": what,
            "step": step,
            "seconds": now - since,
            "late": what != _ELSE and self._steps >= _UNTIMED and now - since > limit,
            "own": self._waited + self._stalled,
            "retries": retry.counted(),
            "done": done,
        }
        self._told = {**self._told, self._index: own}
        if self._client is not None:
            place = f"{self._place}/{self._index}"
            self._client.key_value_set(place, json.dumps(own), allow_overwrite=True)

    def _judge(self) -> tuple[int, str] | None:
        """(process, what is wrong with it), if anything is."""
        for i, beats in self._silent.items():
            if beats >= _SILENT:
                return i, f"is lost: not heard of for {beats * self._beat:.0f} s"
        late = {i: told for i, told in self._told.items() if told["late"]}
        if not late:
            return None
        # Data is each one's own; who is behind in steps, which all make together, is waited for.
        waits = [i for i, told in late.items() if told["doing"] == _DATA]
        i = min(waits or self._told, key=lambda i: (self._told[i]["step"], i in late))
        told, seconds = self._told[i], max(told["seconds"] for told in late.values())
        if waits:
            return i, f"hangs: it waits {told['seconds']:.0f} s for the data of step {told['step']}"
        if i in late:
            how = "as all do: it is the devices, or what joins them"
        else:
            how = f"where it {told['doing']}; others wait for it"
        return i, f"hangs in step {told['step']} for {seconds:.0f} s, {how}"

    def _accuse(self, process: int, text: str, code: int = LOST) -> None:
        """Tells all what ends the job. The first who does is right: the rest are its results."""
        verdict = {"process": process, "line": f"{self._name(process)} {text}", "code": code}
        if self._client is None:
            self._leave(verdict)
            return
        with contextlib.suppress(RuntimeError):  # it has been told already, or nobody listens
            self._client.key_value_set(f"{self._place}/verdict", json.dumps(verdict))

    def _leave(self, verdict: dict[str, Any]) -> None:
        """Ends this process, unless it ends by its own failure meanwhile."""
        failed = verdict["code"] != LOST
        if failed and verdict["process"] == self._index:
            return
        mend = "run the same command again, it goes on from the newest checkpoint"
        _say(f"{verdict['line']}; all processes end{'' if failed else f': {mend}'}")
        if verdict["process"] == self._index:
            faulthandler.dump_traceback(file=sys.stderr)
        if not self._ended.wait(self._beat * (3 if self._index == 0 else failed)):
            os._exit(verdict["code"])

    def _abort(self) -> None:
        """JAX aborts a process that lost its coordinator, or that this one has given up: says which
        process that is, and ends. Returns where something else aborts this process."""
        now, late = time.monotonic(), 3 * self._beat
        silent = [i for i, beats in self._silent.items() if beats >= _SILENT // 2]
        stood = self._stood if self._asleep is None else now - self._asleep
        if stood > late:
            culprit, text = self._index, f"stood still for {stood:.0f} s, and is lost to the others"
        elif self._index and (now - self._heard > late or not _answers()):
            culprit, text = 0, "is lost: the job's coordinator, which is in it, does not answer"
        elif silent:
            culprit, text = silent[0], "is lost"
        else:
            return
        _say(f"{self._name(culprit)} {text}; this process ends: run the same command again")
        os._exit(LOST)

    def _compare(self) -> None:
        """Names processes that need much more time of their own for a step than the others."""
        now, (since, before) = time.monotonic(), self._mark
        told = {i: one for i, one in self._told.items() if not one["done"]}
        steps = {i: told[i]["step"] - before[i]["step"] for i in told if i in before}
        if len(steps) == len(told) and min(steps.values()) < 3:
            return
        self._mark = now, told
        if len(steps) < len(told) or len(told) < 2:
            return
        own = {i: (told[i]["own"] - before[i]["own"]) / count for i, count in steps.items()}
        step = (now - since) / max(steps.values())
        others = {i: statistics.median([own[j] for j in own if j != i]) for i in own}
        slow = [i for i in own if own[i] - others[i] > _SLOW * step]
        for i in slow:
            if i not in self._slow:
                _say(
                    f"{self._name(i)} is slow: of a step's {step:.2f} s it waits for its data, or"
                    f" stands still, {own[i]:.2f} s; the others {others[i]:.2f} s"
                )
        self._slow = slow

    def _others_are_done(self) -> bool:
        return all(told["done"] for i, told in self._told.items() if i != self._index)

    def _name(self, process: int | None = None) -> str:
        process = self._index if process is None else process
        host = self._told.get(process, {}).get("host", "of an unknown host")
        return f"process {process} ({host})"


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Any]:
    """Yields `stop`: called after each step with its number, whether the run is to end there.

    Processes of one job have to end after the same step: JAX's own notice finds one. A process by
    itself listens for SIGTERM.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def _answers() -> bool:
    """Whether anybody listens where the coordinator is."""
    host, _, port = (distributed.global_state.coordinator_address or "").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        return True
    except (OSError, ValueError):
        return False


def _at_abort(call: Any) -> Any:
    """Has `call` run where this process aborts, in whichever thread; returns what undoes that.

    JAX calls abort() in a thread of its own, as soon as the coordinator's connection breaks. A
    handler of Python's would run later, in the main thread: never.
    """
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    handler = kind(lambda number: call())
    set_handler = ctypes.CDLL(None).signal
    set_handler.restype, set_handler.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    before = set_handler(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))

    def undo(kept: Any = handler) -> None:  # `kept`: or the function would be freed
        set_handler(signal.SIGABRT, before)

    return undo


def _say(line: str) -> None:
    print(f"echovlm: {line}", file=sys.stderr, flush=True)
