"""Checkpoints of a training run: saved while it goes on, checked before a value is believed.

Orbax writes a state in the background, each process its own shards, into `<step>.unfinished`. Then
every file's digest is written, and only then the folder gets its name, `<step>`; older ones are
pruned after that. So a folder with a step's name was whole once, and its digests say whether it
still is. Orbax alone returns wrong numbers, without a word, for a bit that flipped on the disk.

Not Orbax's CheckpointManager, whose AsyncCheckpointer this is: it counts a step, and prunes others
for it, before there can be digests.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from echovlm_jax.errors import InputError
from echovlm_jax.progress import progress
from echovlm_jax.storage import digests
from echovlm_jax.storage.files import rename_folder
from echovlm_jax.storage.layout import EXTRA, OWN_MODEL, STATE, steps
from echovlm_jax.storage.lock import Lock

UNFINISHED, DELETED, BROKEN = ".unfinished", ".deleted", ".broken"

# What a kill leaves: a save of ours or of Orbax's that has no name yet, or a deletion that had
# begun.
_LEFT = re.compile(rf"[0-9]+({re.escape(UNFINISHED)}|{re.escape(DELETED)})(\.orbax-.*)?")
_PART = ".digests.{}.json"
# Orbax gives up after 20 minutes by default, and a slow disk takes longer than that.
_PATIENCE_SECONDS = 6 * 3600
# Small enough that most files are complete, and hashed, while others are being written.
_FILE_BYTES = 64 * 2**20


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
        self.folder = Path(os.path.abspath(folder))
        self._keep, self._keep_every = keep, keep_every
        self._first = jax.process_index() == 0
        self._saves, self._step = 0, -1
        self._saving: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._checked: dict[int, Any] = {}
        self._lock: Lock | None = None
        if self._first:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = Lock(self.folder)
                self._clear()
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
        self._saves, self._step = self._saves + 1, step
        work = self.folder / f"{step}{UNFINISHED}"
        own = f"{work.name}*/{STATE}*/ocdbt.process_{jax.process_index()}/d/*"
        watch = digests.Watch(lambda: self.folder.glob(own))
        watch.__enter__()
        try:
            arrays = ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=_FILE_BYTES)
            args = ocp.args.Composite(**{STATE: arrays, EXTRA: ocp.args.JsonSave(dict(extra))})
            self._orbax.save(work, args=args, force=True)
        except BaseException as error:
            watch.__exit__()
            self._give_up()
            self._raise(error)
        self._saving = threading.Thread(
            target=self._finish, args=(work, watch, model), name="checkpoint"
        )
        self._saving.start()
        if wait:
            self.wait()

    def check(self) -> None:
        """Raises, as `wait` does, if the save in the background has failed; never waits."""
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
        """The newest step whose checkpoint is whole, every byte of it checked; None without any.

        A broken one is named on standard error and set aside as `<step>.broken`.

        Raises:
          InputError: there are checkpoints, and all of them are broken.
        """
        self.wait()
        for step in reversed(steps(self.folder)):
            problems = self._problems(step)
            if not problems:
                return step
            self._set_aside(step, problems)
        if broken := sorted(path.name for path in self.folder.glob(f"*{BROKEN}*")):
            raise InputError(
                f"{self.folder}: no whole checkpoint is left ({', '.join(broken)}); delete the"
                " broken ones to start over"
            )
        return None

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint after checking every byte of it, where `latest` has not just done so.

        Args:
          step: of the checkpoint.
          like: the tree of jax.ShapeDtypeStruct, with shardings, to restore; they may be of
            another mesh than the state was saved on.

        Returns:
          (state, extra), as they were saved.

        Raises:
          InputError: there is no such checkpoint, it is broken, or it is of another tree, shape or
            dtype than `like`.
        """
        self.wait()
        path = self.folder / str(step)
        if not path.is_dir():
            raise InputError(f"{path}: no such checkpoint; there are {steps(self.folder)}")
        if self._checked.get(step) != digests.state(path) and (problems := self._problems(step)):
            raise InputError(f"{path}: {_told(problems)}; restore another step")
        stored: Any = self._orbax.metadata(path).item_metadata
        _compare(path, stored[STATE].tree, like)
        restore = ocp.args.PyTreeRestore(
            like, restore_args=ocp.checkpoint_utils.construct_restore_args(like)
        )
        args = ocp.args.Composite(**{STATE: restore, EXTRA: ocp.args.JsonRestore()})
        restored = self._orbax.restore(path, args=args)
        return restored[STATE], dict(restored[EXTRA])

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

    def _finish(self, work: Path, watch: digests.Watch, model: Path | None) -> None:
        """In the background: what is to be done once Orbax has the arrays."""
        try:
            try:
                self._orbax.wait_until_finished()
            finally:
                watch.__exit__()
            if model is not None and self._first:
                shutil.copytree(model, work / OWN_MODEL)
            self._write_digests(work, watch)
            if self._first:
                rename_folder(work, self.folder / str(self._step))
                self._prune()
            self._barrier("whole")
        except BaseException as error:
            self._failure = error
            self._give_up()

    def _write_digests(self, work: Path, watch: digests.Watch) -> None:
        """Each process hashes the shards that it wrote, the first one all the rest."""
        if not self._first:
            own = [
                path.relative_to(work).as_posix()
                for path in work.glob(f"{STATE}/ocdbt.process_{jax.process_index()}/**/*")
                if path.is_file()
            ]
            found = digests.of_files(work, own, watch.seen)
            part = work / _PART.format(jax.process_index())
            part.write_text(json.dumps(found))
        self._barrier("hashed")
        if self._first:
            known = {}
            for index in range(1, jax.process_count()):
                part = work / _PART.format(index)
                known |= json.loads(part.read_text())
                part.unlink()
            digests.write(work, seen=watch.seen, known=known)

    def _barrier(self, what: str) -> None:
        sync = ocp.multihost.get_barrier_sync_fn()
        sync(key=f"echovlm:{what}:{self._saves}", timeout_ms=_PATIENCE_SECONDS * 1000)

    def _prune(self) -> None:
        there = steps(self.folder)
        for step in there[: -self._keep]:
            if self._keep_every is None or step % self._keep_every:
                # Its name goes first: what a kill leaves of it is not taken for a checkpoint.
                gone = self.folder / f"{step}{DELETED}"
                os.rename(self.folder / str(step), gone)
                shutil.rmtree(gone)

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if _LEFT.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)

    def _give_up(self) -> None:
        """Frees what a failed save took of a disk that may be full."""
        if self._first:
            with contextlib.suppress(OSError):
                self._clear()

    def _problems(self, step: int) -> dict[str, str]:
        """What is broken in a checkpoint, each process reading its share of the files."""
        path = self.folder / str(step)
        before = digests.state(path)
        with progress(digests.nbytes(path), "B", f"check {path.name}") as tick:
            found = digests.check(
                path, tick=tick, part=jax.process_index(), parts=jax.process_count()
            )
        whole = not found
        if jax.process_count() > 1:
            whole = bool(np.all(multihost_utils.process_allgather(np.array(whole))))
        if whole:
            self._checked[step] = before
            return {}
        return found or {"files": "found broken by another process"}

    def _set_aside(self, step: int, problems: Mapping[str, str]) -> None:
        path = self.folder / str(step)
        if self._first:
            aside, count = self.folder / f"{step}{BROKEN}", 1
            while aside.exists():
                count += 1
                aside = self.folder / f"{step}{BROKEN}-{count}"
            try:
                os.rename(path, aside)
            except OSError as error:
                raise InputError(
                    f"{path}: {_told(problems)}, and can't be set aside ({error.strerror}); mend"
                    " that"
                ) from error
            _say(f"{path}: {_told(problems)}; set aside as {aside.name}")
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


def _compare(path: Path, stored: Any, like: Any) -> None:
    """Refuses a state of another tree, shape or dtype than asked for; Orbax would cast."""
    there, wanted = _described(stored), _described(like)
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise InputError(
                f"{path}: {name} is {there.get(name, 'missing')} there and"
                f" {wanted.get(name, 'missing')} in this run; go on with the configuration that it"
                " was saved with, or name another folder"
            )


def _described(tree: Any) -> dict[str, str]:
    """Each array's dtype and shape by its path, whatever kinds of nodes the tree has."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(leaf, "shape")
    }


def _refusal(error: BaseException) -> str | None:
    """Why a disk refused, on one line, where an error says so."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore raises ValueError, and has the system's error in its text.
    if found := re.search(r"\[os_error_code='(\d+)'", str(error)):
        return os.strerror(int(found[1]))
    return None


def _told(problems: Mapping[str, str]) -> str:
    return f"is broken: {digests.told(problems)}"


def _say(line: str) -> None:
    print(f"echovlm: {line}", file=sys.stderr, flush=True)
