"""Processes that fill arrays of this one: jobs in, values in shared memory, no death unnoticed.

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
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from echovlm_jax.errors import InputError
from echovlm_jax.storage import retry

# The arrays that a worker fills, by name: shape and dtype.
Layout = Mapping[str, tuple[tuple[int, ...], Any]]
Arrays = dict[str, np.ndarray]
# A worker's task: (job, arrays to fill, note); it calls note(n) when the n-th part of a job begins.
Fill = Callable[[Any, Arrays, Callable[[int], None]], None]

_CHILD = (
    "import sys; sys.path[:] = {path!r}; from echovlm_jax.data.workers import serve;"
    " serve({fd}, {number})"
)


class Shared(NamedTuple):
    """Arrays that the workers see too, and what this process forks. Their memory is used again once
    nobody has a view of it."""

    arrays: Arrays
    offset: int  # where they begin in the workers' file


class _Block(NamedTuple):
    """Memory of one layout, in a piece of the file that this process maps."""

    offset: int
    piece: mmap.mmap
    at: int  # where it begins in the piece
    size: int


class _Free(list[_Block]):
    """Blocks that nobody has a view of; beyond a few their pages go back to the system."""

    keep = 8

    def append(self, block: _Block) -> None:
        if len(self) >= self.keep:
            _empty(block)
        super().append(block)

    def close(self) -> None:
        self.keep = 0
        for block in self[:]:
            _empty(block)


def _empty(block: _Block) -> None:
    with contextlib.suppress(AttributeError, OSError):  # not every system or file can
        block.piece.madvise(mmap.MADV_REMOVE, block.at, block.size)


class _Lease(np.ndarray):
    """Memory until its last view is dropped: a view of a subclass keeps this very object, where one
    of a plain array keeps only what lies under it."""


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
      layout: the arrays of `share`; a job fills all of them, or all of their row: the memory holds
        an earlier job's values.
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
        self._layout, self._size = layout, _pages(sum(_bytes(*one) for one in layout.values()))
        self._free = _Free()
        self._end, self._count = _pages(8 * count), 0  # the notes are in front
        self._fd = _file(self._end)
        # Also at the interpreter's end, and where the pool is dropped without a close.
        self.close = weakref.finalize(self, _stop, self._workers, self._idle, self._free)
        # Not by `close`: a thread may be in `share`. What is shared stays while it has a view.
        weakref.finalize(self, os.close, self._fd).atexit = False
        for number in range(count):
            worker = _Worker(number, fill, layout, self._fd)
            self._workers.append(worker)
            self._idle.put(worker)

    def share(self) -> Shared:
        """New arrays of the layout, for `__call__` to fill. Raises WorkersClosed."""
        with self._lock:
            if not self.close.alive:
                raise WorkersClosed("the data workers are closed")
            if not self._free:
                self._grow()
            block = self._free.pop()
        lease = np.frombuffer(block.piece, np.uint8, block.size, block.at).view(_Lease)
        weakref.finalize(lease, self._free.append, block).atexit = False
        return Shared(_arrays(lease, self._layout), block.offset)

    def _grow(self) -> None:
        """Twice the blocks: each piece that is mapped holds a descriptor."""
        self._count = max(2, 2 * self._count)
        begin, size = self._end, self._count * self._size
        self._end += size
        os.ftruncate(self._fd, self._end)
        piece = mmap.mmap(self._fd, size, offset=begin)
        for at in range(0, size, self._size):
            list.append(self._free, _Block(begin + at, piece, at, self._size))

    def __call__(self, job: Any, shared: Shared | None = None, row: int | None = None) -> None:
        """Runs a job, which fills what is shared, or one row of it; waits for an idle worker.

        Raises:
          InputError: the job raised one; the message begins with the name of its part.
          WorkerDied: this job's worker died, or another one before it.
          RuntimeError: the job raised something else.
        """
        worker = self._idle.get()
        if worker is None:
            self._idle.put(None)  # for the next who waits
            raise self._failure or WorkersClosed("the data workers are closed")
        try:
            reply = worker.run(job, shared.offset if shared else None, row)
        except (EOFError, OSError):
            raise self._died(worker, job) from None
        self._idle.put(worker)
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
    """One process, and the socket to it."""

    def __init__(self, number: int, fill: Fill, layout: Layout, fd: int) -> None:
        self.number = number
        self._note = np.frombuffer(mmap.mmap(fd, 8 * (number + 1)), np.int64)[number:]
        ours, its = socket.socketpair()
        with its:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CHILD.format(path=sys.path, fd=fd, number=number)],
                stdin=its.fileno(),
                stdout=2,  # what a library prints there must not get into a result's JSON
                pass_fds=[fd],
                start_new_session=True,  # Ctrl-C is for this process, which closes them
            )
        self._connection = Connection(ours.detach())
        self._note[0] = -1
        with contextlib.suppress(OSError):  # dead already: the first job will say so
            self._connection.send((fill, dict(layout)))

    def run(self, job: Any, offset: int | None, row: int | None) -> tuple[str, str, int] | None:
        self._note[0] = -1
        self._connection.send((job, offset, row))
        reply, tried_again = self._connection.recv()
        retry.count(tried_again)
        return reply

    def note(self) -> int:
        return int(self._note[0])


def _stop(workers: Sequence[_Worker], idle: queue.SimpleQueue[_Worker | None], free: _Free) -> None:
    idle.put(None)
    free.close()
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


def _file(size: int) -> int:
    """A descriptor of memory that processes can map. memfd: no limit of /dev/shm applies."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("echovlm-data")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


def _pages(size: int) -> int:
    """Bytes rounded up to whole pages, at least one."""
    return max(1, -(-size // mmap.ALLOCATIONGRANULARITY)) * mmap.ALLOCATIONGRANULARITY


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return -(-size // 64) * 64  # each array begins on a cache line


def _arrays(memory: np.ndarray, layout: Layout) -> Arrays:
    """The arrays of a layout in uint8 [bytes]."""
    arrays, at = {}, 0
    for name, (shape, dtype) in layout.items():
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        arrays[name] = memory[at : at + size].view(dtype).reshape(shape).view(np.ndarray)
        at += _bytes(shape, dtype)
    return arrays


def serve(fd: int, number: int) -> None:
    """The worker's side: runs jobs until the other side is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    connection = Connection(os.dup(0))
    with open(os.devnull) as null:  # what this process starts must not hold the connection open
        os.dup2(null.fileno(), 0)
    with contextlib.suppress(EOFError, OSError):
        fill, layout = connection.recv()
        size = _pages(sum(_bytes(*one) for one in layout.values()))
        head = np.frombuffer(mmap.mmap(fd, 8 * (number + 1)), np.int64)[number:]
        memory = np.empty(0, np.uint8)  # the whole file; its pieces double, so it seldom grows

        def note(part: int) -> None:
            head[0] = part

        while True:
            job, offset, row = connection.recv()
            before = retry.counted()
            out = {}
            if offset is not None:
                if offset + size > len(memory):
                    memory = np.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), np.uint8)
                out = _arrays(memory[offset : offset + size], layout)
            if row is not None:
                out = {name: array[row] for name, array in out.items()}
            reply = _run(fill, job, out, note, head)
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
