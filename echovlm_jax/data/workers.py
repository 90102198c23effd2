"""Processes that fill arrays for this one: jobs in, shared memory out, no death unnoticed.

Grain's own worker processes won't do (0.2.18): one that exits with 0 is waited for without end, a
crash is reported without the record, each imports JAX (a second and 200 MB, before any data), and
arrays travel through /dev/shm, of which a container has 64 MB by default. So Grain keeps the order,
the prefetch and the threads, and a thread that wants a row asks a process here for it.

A worker is a fresh interpreter, never a fork: JAX has threads in this process. It neither imports
JAX nor runs the main module again, so a script needs no `if __name__ == "__main__"`.
"""

import contextlib
import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from echovlm_jax.errors import InputError
from echovlm_jax.storage import retry

# The arrays that a worker fills, by name: shape and dtype.
Layout = Mapping[str, tuple[tuple[int, ...], Any]]
Arrays = dict[str, np.ndarray]
# A worker's task: (job, arrays to fill, note); it calls note(n) when the n-th part of a job begins.
Fill = Callable[[Any, Arrays, Callable[[int], None]], None]

_SLOTS = 2  # a worker fills the next row while this process copies the last one
_HEAD = 64  # bytes in front of the slots: the note
_CHILD = (
    "import sys; sys.path[:] = {path!r}; from echovlm_jax.data.workers import serve; serve({fd})"
)


# until: grain 0.3
class WorkerDied(RuntimeError):
    """A worker process ended: killed, crashed, or out by itself. The message names the record."""


class WorkersClosed(RuntimeError):
    """A job was given after `close`."""


class Workers:
    """A pool of processes. Jobs may come from several threads at once.

    Args:
      fill: the function of each job; it pickles, or is a partial of one that does.
      count: processes, started at once.
      layout: the arrays that a job fills, all of them: the memory holds an earlier job's values.
      name: (job, n) → what the n-th part of a job is called in errors; n is −1 before the first.
    """

    def __init__(
        self, fill: Fill, count: int, layout: Layout, name: Callable[[Any, int], str]
    ) -> None:
        self._name = name
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        # Also at the interpreter's end, and where the pool is dropped without a close.
        self.close = weakref.finalize(self, _stop, self._workers, self._idle)
        for number in range(count):
            worker = _Worker(number, fill, layout)
            self._workers.append(worker)
            self._idle.put(worker)

    def __call__(self, job: Any, out: Mapping[str, np.ndarray]) -> None:
        """Runs a job and copies what it filled into `out`; waits for a worker that is idle.

        Raises:
          InputError: the job raised one; the message begins with the name of its part.
          WorkerDied: this job's worker died, or another one before it.
          RuntimeError: the job raised something else.
        """
        worker = self._idle.get()
        if worker is None:
            self._idle.put(None)  # for the next who waits
            raise self._failure or WorkersClosed("the data workers are closed")
        slot = worker.slots.get()
        try:
            reply = worker.run(job, slot)
        except (EOFError, OSError):
            raise self._died(worker, job) from None
        self._idle.put(worker)
        if reply is None:
            for name, array in out.items():
                np.copyto(array, slot[name])
        worker.slots.put(slot)
        if reply is not None:
            kind, text, part = reply
            if kind == "input":
                raise InputError(f"{self._name(job, part)}: {text}")
            raise RuntimeError(f"{self._name(job, part)}: a data worker failed:\n{text}")

    def check(self) -> None:
        """Raises WorkerDied where a worker has died, even before its row is needed."""
        if self._failure is not None:
            raise self._failure

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def _died(self, worker: "_Worker", job: Any) -> Exception:
        if not self.close.alive:
            return WorkersClosed("the data workers are closed")
        how = _how_it_ended(worker.process)
        failure = WorkerDied(
            f"data worker {worker.number} (process {worker.process.pid}) {how} while it worked on"
            f" {self._name(job, worker.note())}; if it is that record's fault, leave the record"
            " out, and if memory ran out, use fewer data_workers"
        )
        with self._lock:
            self._failure = self._failure or failure
        self._idle.put(None)  # all who wait for a worker hear of it
        return self._failure


class _Worker:
    """One process, the socket to it, and the memory shared with it."""

    def __init__(self, number: int, fill: Fill, layout: Layout) -> None:
        self.number = number
        size = _HEAD + _SLOTS * _size(layout)
        with _memory(size) as fd:
            self._memory = mmap.mmap(fd, size)
            ours, its = socket.socketpair()
            with its:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", _CHILD.format(path=sys.path, fd=fd)],
                    stdin=its.fileno(),
                    stdout=2,  # what a library prints there must not get into a result's JSON
                    pass_fds=[fd],
                    start_new_session=True,  # Ctrl-C is for this process, which closes them
                )
        self._connection = Connection(ours.detach())
        self.slots: queue.SimpleQueue[Arrays] = queue.SimpleQueue()
        self._places = {}
        for place, slot in enumerate(_slots(self._memory, layout)):
            self._places[id(slot)] = place
            self.slots.put(slot)
        self._set_note(-1)
        with contextlib.suppress(OSError):  # dead already: the first job will say so
            self._connection.send((fill, dict(layout)))

    def run(self, job: Any, slot: Arrays) -> tuple[str, str, int] | None:
        self._set_note(-1)
        self._connection.send((job, self._places[id(slot)]))
        reply, tried_again = self._connection.recv()
        retry.count(tried_again)
        return reply

    def note(self) -> int:
        return int(np.frombuffer(self._memory, np.int64, 1)[0])

    def _set_note(self, part: int) -> None:
        np.frombuffer(self._memory, np.int64, 1)[0] = part


def _stop(workers: Sequence[_Worker], idle: queue.SimpleQueue[_Worker | None]) -> None:
    idle.put(None)
    for worker in workers:
        worker.process.kill()  # it has nothing to lose
    for worker in workers:
        worker.process.wait()


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        return "closed its connection"
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


@contextlib.contextmanager
def _memory(size: int) -> Iterator[int]:
    """A descriptor of memory that two processes can map. memfd: no limit of /dev/shm applies."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("echovlm-data")
        try:
            os.ftruncate(fd, size)
            yield fd
        finally:
            os.close(fd)
    else:
        with tempfile.TemporaryFile() as file:
            file.truncate(size)
            yield file.fileno()


def _size(layout: Layout) -> int:
    return sum(_bytes(*one) for one in layout.values())


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return -(-size // 64) * 64  # each array begins on a cache line


def _slots(memory: mmap.mmap, layout: Layout) -> list[Arrays]:
    slots, at = [], _HEAD
    for _ in range(_SLOTS):
        slot = {}
        for name, (shape, dtype) in layout.items():
            count = int(np.prod(shape))
            slot[name] = np.frombuffer(memory, dtype, count, at).reshape(shape)
            at += _bytes(shape, dtype)
        slots.append(slot)
    return slots


def serve(fd: int) -> None:
    """The worker's side: runs jobs until the other side is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    connection = Connection(os.dup(0))
    with open(os.devnull) as null:  # what this process starts must not hold the connection open
        os.dup2(null.fileno(), 0)
    with contextlib.suppress(EOFError, OSError):
        fill, layout = connection.recv()
        memory = mmap.mmap(fd, _HEAD + _SLOTS * _size(layout))
        slots = _slots(memory, layout)
        head = np.frombuffer(memory, np.int64, 1)

        def note(part: int) -> None:
            head[0] = part

        while True:
            job, place = connection.recv()
            before = retry.counted()
            reply = _run(fill, job, slots[place], note, head)
            connection.send((reply, retry.counted() - before))


def _end_with(parent: int) -> None:
    """Ends this process once its parent is gone: a job that never returns hears of nothing."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run(
    fill: Fill, job: Any, out: Arrays, note: Callable[[int], None], head: np.ndarray
) -> tuple[str, str, int] | None:
    try:
        fill(job, out, note)
    except InputError as error:
        return "input", str(error), int(head[0])
    except Exception:
        return "defect", traceback.format_exc(), int(head[0])
    return None
