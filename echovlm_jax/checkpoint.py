"""Checkpoints of a training run: saved while it goes on, checked before a value is believed.

Orbax writes a state in the background, each process its own shards, into `<step>.unfinished`. Then
each process reads back what it wrote, for the digests of all chunks and files, and only then the
folder gets its name, `<step>`; older ones are pruned after that. So a folder with a step's name was
whole once, and its digests say whether it still is. Restoring compares each chunk in memory, and
reads it once, where it is needed. Orbax alone returns wrong numbers, without a word, for a bit that
flipped on the disk.

Not Orbax's CheckpointManager, whose AsyncCheckpointer this is: it counts a step, and prunes others
for it, before there can be digests.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from echovlm_jax.errors import InputError
from echovlm_jax.progress import progress
from echovlm_jax.storage import arrays, digests
from echovlm_jax.storage import steps as keeping
from echovlm_jax.storage.files import (
    as_path,
    below,
    in_bucket,
    make_folder,
    remove,
    rename_folder,
    write_bytes,
    write_text,
)
from echovlm_jax.storage.layout import CHUNKS, EXTRA, EXTRA_FILE, OWN_MODEL, STATE, steps
from echovlm_jax.storage.lock import Lock
from echovlm_jax.storage.state import State, array_name
from echovlm_jax.storage.verify import DamagedError
from echovlm_jax.storage.writer import PROCESS

_Made = TypeVar("_Made")

# Orbax gives up after 20 minutes by default, and a slow disk takes longer than that.
_PATIENCE_SECONDS = 6 * 3600
# A chunk is read whole, whatever part of it is needed: as large as a disk streams well.
_CHUNK_BYTES = 16 * 2**20
# Several are hashed at once.
_FILE_BYTES = 256 * 2**20


def open_checkpoints(folder: Path, *, keep: int, keep_every: int | None = None) -> Checkpoints:
    """Opens a run's folder of checkpoints, makes it where it is missing, and clears away what a
    killed run left unfinished there.

    Args:
      folder: of all processes, on storage that they share; only one job may have it open.
      keep: how many of the newest checkpoints to keep.
      keep_every: also keep every checkpoint whose step is a multiple of this.

    Raises:
      InputError: another job has it open, or it can't be written.
    """
    return Checkpoints(folder, keep, keep_every)


class Checkpoints:
    """The checkpoints of one run; `open_checkpoints` makes it. All processes call all methods."""

    def __init__(self, folder: Path, keep: int, keep_every: int | None) -> None:
        self.folder = as_path(folder).absolute()
        self._keep, self._keep_every = keep, keep_every
        self._first = jax.process_index() == 0
        self._saves, self._step = 0, -1
        self._known: dict[str, str] = {}  # digests of files of the save in hand
        self._saving: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._lock: Lock | None = None
        if self._first:
            try:
                make_folder(self.folder)
                self._lock = Lock(self.folder)
                keeping.clear(self.folder)
            except OSError as error:
                raise InputError(f"{self.folder}: {error.strerror}; name another folder") from error
        ocp.multihost.sync_global_processes("echovlm: checkpoints are open")
        self._orbax = _orbax()

    def save(
        self,
        step: int,
        state: Any,
        extra: Mapping[str, Any],
        *,
        model: Path | None = None,
        wait: bool = False,
    ) -> None:
        """Saves in the background; returns once `state` may be changed or donated.

        A step that has a checkpoint keeps it: nothing is saved. Waits for the save before.

        Args:
          step: how many steps were made.
          state: any tree of jax.Array.
          extra: in JSON's types.
          model: the folder of the model's configuration and tokenizer, which are copied into the
            checkpoint; it must not change until the save is whole.
          wait: until it is whole.

        Raises:
          InputError: the save before could not be written.
        """
        self.wait()
        if step in steps(self.folder):
            return
        self._saves, self._step, self._known = self._saves + 1, step, {}
        work = keeping.unfinished(self.folder, step)
        try:
            begin = self._begin_in_bucket if in_bucket(self.folder) else self._begin_with_orbax
            write = begin(work, state, dict(extra))
        except BaseException as error:
            self._give_up()
            self._raise(error)
        self._saving = threading.Thread(
            target=self._finish, args=(work, write, model), name="checkpoint"
        )
        self._saving.start()
        if wait:
            self.wait()

    def check(self) -> None:
        """Raises, as `wait` does, if the save in the background has failed, and InputError if
        another process has taken over; never waits."""
        self._check(ask=False)
        if self._saving is not None and not self._saving.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits until the save in the background is whole and older ones are pruned.

        Raises:
          InputError: it could not be written; the checkpoints before it are as they were.
        """
        if self._saving is not None:
            self._saving.join()
            self._saving = None
            if (error := self._failure) is not None:
                self._failure = None
                self._raise(error)

    def latest(self) -> int | None:
        """The newest step whose checkpoint has all its files; None without any. The arrays are
        checked when they are read.

        A broken one is named on standard error and set aside as `<step>.broken`.

        Raises:
          InputError: there are checkpoints, and all of them are broken.
        """
        self.wait()
        for step in reversed(steps(self.folder)):
            try:
                self._together(step, functools.partial(self._open, step))
                return step
            except DamagedError as error:
                self._set_aside(step, error)
        if broken := keeping.broken(self.folder):
            raise InputError(
                f"{self.folder}: no whole checkpoint is left ({', '.join(broken)}); delete the"
                " broken ones to start over"
            )
        return None

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint, each process its shards, and checks what it reads.

        Args:
          step: of the checkpoint.
          like: the tree of jax.ShapeDtypeStruct, with shardings, to restore; they may be of
            another mesh than the state was saved on.

        Returns:
          (state, extra), as they were saved.

        Raises:
          DamagedError: it is broken.
          InputError: there is no such checkpoint, or it is of another tree, shape or dtype than
            `like`.
        """
        self.wait()
        path = self.folder / str(step)
        if step not in (there := steps(self.folder)):
            raise InputError(f"{path}: no such checkpoint; there are {there}")

        def read() -> tuple[Any, dict[str, Any]]:
            stored = self._open(step)
            leaves, structure = jax.tree_util.tree_flatten_with_path(like)
            wanted = {array_name(key): leaf for key, leaf in leaves}
            _compare(path, stored, wanted)
            size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in wanted.values())
            loaded = []
            with progress(size, "B", f"restore {step}") as tick:
                for name, leaf in wanted.items():
                    loaded.append(stored.load(name, leaf.sharding))
                    tick(loaded[-1].nbytes)
            extra = json.loads((path / EXTRA / EXTRA_FILE).read_text("utf-8"))
            return jax.tree.unflatten(structure, loaded), extra

        return self._together(step, read)

    def restore_latest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, extra) of the newest checkpoint that is whole, as `restore` gives them;
        None without any. A broken one is set aside, as `latest` does.

        Raises:
          InputError: as `latest` and `restore` do.
        """
        while (step := self.latest()) is not None:
            try:
                return step, *self.restore(step, like)
            except DamagedError as error:
                self._set_aside(step, error)
        return None

    def close(self) -> None:
        """Waits, raises as `wait` does, and lets another job have the folder."""
        try:
            self.wait()
        finally:
            self._orbax.close()
            if self._lock is not None:
                self._lock.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin_with_orbax(self, work: Path, state: Any, extra: Any) -> Callable[[], Any]:
        """Copies the state; what is returned writes it, in the background, and returns the chunks'
        digests."""
        cut = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), state)
        saved = ocp.args.PyTreeSave(state, cut, ocdbt_target_data_file_size=_FILE_BYTES)
        args = ocp.args.Composite(**{STATE: saved, EXTRA: ocp.args.JsonSave(extra)})
        self._orbax.save(work, args=args, force=True)

        def write() -> dict[str, str]:
            self._orbax.wait_until_finished()
            return arrays.digest_chunks(work / STATE / f"{PROCESS}{jax.process_index()}")

        return write

    def _begin_in_bucket(self, work: Path, state: Any, extra: Any) -> Callable[[], Any]:
        copied = State(state)
        check = functools.partial(self._check, ask=False)

        def write() -> dict[str, str]:
            if self._first:
                self._check()
                remove(work)  # what a killed run left, or a broken checkpoint of this step
            self._barrier("cleared")
            found = copied.write(work / STATE, jax.process_index(), check)
            self._barrier("written")
            if self._first:
                copied.finish(work / STATE, jax.process_count())
                self._write_small(work, f"{EXTRA}/{EXTRA_FILE}", json.dumps(extra).encode())
            return found

        return write

    def _finish(self, work: Path, write: Callable[[], Any], model: Path | None) -> None:
        """In the background: all that makes a checkpoint of a copy of the state."""
        try:
            chunks = write()
            if model is not None and self._first:
                for name in below(model):
                    self._write_small(work, f"{OWN_MODEL}/{name}", (model / name).read_bytes())
            self._write_digests(work, chunks)
            if self._first:
                if not in_bucket(work):
                    rename_folder(work, self.folder / str(self._step))
                keeping.prune(self.folder, self._keep, self._keep_every)
            self._barrier("whole")
        except BaseException as error:
            self._failure = error
            self._give_up()

    def _write_digests(self, work: Path, chunks: dict[str, str]) -> None:
        """Each process hashes the files that it wrote, the first one all the rest."""
        if not self._first:
            own = f"{STATE}/{PROCESS}{jax.process_index()}"
            names = [f"{own}/{name}" for name in below(work / own)]
            part = work / keeping.PART.format(jax.process_index())
            write_text(part, json.dumps([chunks, digests.of_files(work, names)]))
        self._barrier("hashed")
        if self._first:
            for index in range(1, jax.process_count()):
                part = work / keeping.PART.format(index)
                others, files = json.loads(part.read_text())
                chunks |= others
                self._known |= files
                part.unlink()
            ordered = arrays.in_order(chunks)
            arrays.Reader(work / STATE, chunks=ordered)  # there is one for each chunk
            self._write_small(work, CHUNKS, json.dumps(ordered).encode())
            self._check()
            digests.write(work, known=self._known)

    def _write_small(self, work: Path, name: str, data: bytes) -> None:
        """Writes a file, and notes the digest of what it is to hold: not of what a process that
        lost the lock may write there later."""
        make_folder((work / name).parent)
        write_bytes(work / name, data)
        self._known[name] = digests.of_bytes(data)

    def _check(self, *, ask: bool = True) -> None:
        if self._lock is not None:
            self._lock.check(ask=ask)

    def _barrier(self, what: str) -> None:
        sync = ocp.multihost.get_barrier_sync_fn()
        sync(key=f"echovlm:{what}:{self._saves}", timeout_ms=_PATIENCE_SECONDS * 1000)

    def _give_up(self) -> None:
        """Frees what a failed save took of a disk that may be full."""
        if self._first:
            with contextlib.suppress(OSError, InputError):
                self._check()  # who took over may be saving there
                keeping.clear(self.folder)

    def _open(self, step: int) -> arrays.Reader:
        return arrays.open_state(self.folder / str(step), mend="restore another step")

    def _together(self, step: int, make: Callable[[], _Made]) -> _Made:
        """What `make` gives, or DamagedError for all processes if one of them finds damage."""
        found: _Made | DamagedError
        try:
            found = make()
        except DamagedError as error:
            found = error
        whole = not isinstance(found, DamagedError)
        if jax.process_count() > 1:
            whole = bool(np.all(multihost_utils.process_allgather(np.array(whole))))
        if whole and not isinstance(found, DamagedError):
            return found
        if isinstance(found, DamagedError):
            raise found
        raise DamagedError(
            self.folder / str(step), "another process found damage", "restore another step"
        )

    def _set_aside(self, step: int, damage: DamagedError) -> None:
        path = self.folder / str(step)
        if self._first:
            try:
                told = keeping.set_aside(path)
            except OSError as error:
                raise InputError(
                    f"{path}: is broken: {damage.what}, and can't be set aside"
                    f" ({error.strerror}); mend that"
                ) from error
            _say(f"{path}: is broken: {damage.what}; {told}")
        ocp.multihost.sync_global_processes(f"echovlm: {step} is set aside")

    def _raise(self, error: BaseException) -> NoReturn:
        """A disk's refusal as an InputError; anything else is a defect and stays what it is."""
        if (reason := _refusal(error)) is None:
            raise error
        there = steps(self.folder)
        last = f"checkpoint {there[-1]} is intact" if there else "there is none before it"
        raise InputError(
            f"{self.folder / str(self._step)}: can't be saved ({reason}); {last}; mend that and run"
            " the same command again"
        ) from error


def _orbax() -> ocp.AsyncCheckpointer:
    hook = sys.unraisablehook
    if getattr(hook, "func", None) is not _without_late_writes:
        sys.unraisablehook = functools.partial(_without_late_writes, hook)
    handlers = {
        # Weights and moments are close to random: compressing takes longer than writing the little
        # that it saves.
        STATE: ocp.PyTreeCheckpointHandler(use_compression=False),
        EXTRA: ocp.JsonCheckpointHandler(),
    }
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(**handlers),
        async_options=ocp.AsyncOptions(timeout_secs=_PATIENCE_SECONDS),
    )


def _without_late_writes(hook: Callable[[Any], Any], told: Any) -> None:
    """After the first write that fails Orbax closes its event loop. What is still being written
    then complains of that, a traceback each, beside the one line of ours."""
    # until: orbax-checkpoint 0.13
    late = told.object is None and isinstance(told.exc_value, RuntimeError)
    if not (late and str(told.exc_value) == "Event loop is closed"):
        hook(told)


def _compare(path: Path, stored: arrays.Reader, like: Mapping[str, Any]) -> None:
    """Refuses a state of another tree, shape or dtype than asked for."""
    there = {name: _described(stored.dtypes[name], shape) for name, shape in stored.shapes.items()}
    wanted = {name: _described(leaf.dtype, leaf.shape) for name, leaf in like.items()}
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise InputError(
                f"{path}: {name} is {there.get(name, 'missing')} there and"
                f" {wanted.get(name, 'missing')} in this run; go on with the configuration that it"
                " was saved with, or name another folder"
            )


def _described(dtype: Any, shape: tuple[int, ...]) -> str:
    return f"{dtype}{list(shape)}"


def _refusal(error: BaseException) -> str | None:
    """Why a disk refused, on one line, where an error says so."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore raises ValueError, and has the system's error in its text.
    if found := re.search(r"\[os_error_code='(\d+)'", str(error)):
        return os.strerror(int(found[1]))
    return None


def _say(line: str) -> None:
    print(f"echovlm: {line}", file=sys.stderr, flush=True)
