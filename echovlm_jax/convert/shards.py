"""A source whose shards are deleted one by one, each once what was made of it is whole on the disk.

So a checkpoint passes through a disk that could not hold it twice. What a shard held is remembered
in the work folder, and in the end in conversion.json: the conversion can be gone on with, and be
recognised, without the shards.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from echovlm_jax.convert.job import Conversion
from echovlm_jax.convert.journal import REMEMBERED, Journal, work_folder
from echovlm_jax.convert.source import Gone, Source, Tensor, read_json, stamp
from echovlm_jax.errors import InputError
from echovlm_jax.storage.files import as_path, in_bucket, remove, sync_folder, write_json
from echovlm_jax.storage.layout import REPORT

KEY = "source"  # of conversion.json


def remembered(dst: Any) -> dict[str, Gone]:
    """The files of the source that a conversion to `dst` may have deleted, by name.

    Raises:
      InputError: what it noted of them is damaged.
    """
    target = as_path(dst).absolute()
    if not target.name or in_bucket(target):
        return {}
    noted = work_folder(target, ".partial") / REMEMBERED
    path = noted if noted.is_file() else target / REPORT
    found = read_json(path) if path.is_file() else {}
    if path != noted:
        found = found.get(KEY) if isinstance(found, dict) else None
    try:
        return {
            file: Gone(said["stamp"].encode("latin-1"), _tensors(file, said["tensors"]))
            for file, said in (found or {}).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(
            f"{path}: does not say what the source's shards held; delete {path.parent} and begin"
            " again with the whole checkpoint"
        ) from None


def _tensors(file: str, said: Mapping[str, Any]) -> dict[str, Tensor]:
    def unread(start: int, stop: int) -> np.ndarray:
        raise InputError(f"{file}: was deleted after use")

    return {
        name: Tensor(tuple(map(int, shape)), np.dtype(jnp.dtype(dtype)), (file, int(at)), unread)
        for name, (shape, dtype, at) in said.items()
    }


def check_may_delete(source: Source, dst: Any) -> None:
    """Refuses a source whose shards can't be deleted safely, before anything is done.

    Raises:
      InputError: it, or the target, is in a bucket; a weight is made of several tensors, which may
        lie in several shards; a shard is a link, has a second name, or is no safetensors file.
    """
    mend = "convert without --delete-source-shards"
    if source.quantized:
        raise InputError(f"{source.folder}: is quantized ({source.quantized}); {mend}")
    if in_bucket(source.folder) or in_bucket(as_path(dst)):
        raise InputError(f"{source.folder}: shards are deleted between local folders alone; {mend}")
    for path in source.files:
        if path.name in source.gone:
            continue
        if path.is_symlink():
            raise InputError(f"{path}: is a link, and deleting it would free nothing; {mend}")
        if path.stat().st_nlink > 1:
            raise InputError(
                f"{path}: has a second name (a hard link), which would keep it; {mend}"
            )
        if path.suffix != ".safetensors":
            raise InputError(f"{path}: is no safetensors file; {mend}")


class Shards:
    """Deletes the files of a source that a conversion has used up.

    Args:
      job: the conversion.
      journal: of what is finished.
    """

    def __init__(self, job: Conversion, journal: Journal) -> None:
        self._job, self._source, self._journal = job, job.source, journal
        self._of: dict[str, set[str]] = {path.name: set() for path in job.source.files}
        for name, slot in job.match.found.items():
            self._of[job.source.tensors[slot].order[0]].add(name)

    def delete_used(self, whole: Callable[[str], bool], name: str | None = None) -> None:
        """Deletes every file that is used up.

        Args:
          whole: whether a tensor that the journal has is on the disk as its digests say.
          name: the tensor that has just been finished: only its file is looked at.

        Raises:
          InputError: what was made of it is not on the disk as it should be; it is then kept.
          OSError: it can't be deleted.
        """
        for file, names in self._of.items():
            if file in self._source.gone or (name is not None and name not in names):
                continue
            if not names or not names <= self._journal.done.keys():
                continue
            path = self._source.folder / file
            self._journal.sync()
            if damaged := next((one for one in sorted(names) if not whole(one)), None):
                raise InputError(
                    f"{path}: is kept: {damaged}, made of it, is not on the disk as it was written;"
                    " check the disk and run the same command again"
                )
            kept = stamp(path)
            self._source.drop(file)  # an open file would keep its place on the disk
            remove(path)
            self._source.gone[file] = kept
            sync_folder(path.parent)

    def needed(self) -> int:
        """How many more bytes the disk must have free at some moment: what is made of a shard comes
        before the shard goes."""
        most = now = 0
        for file, names in sorted(self._of.items()):
            if file in self._source.gone:
                continue
            now += sum(self._job.nbytes(name) for name in names - self._journal.done.keys())
            most = max(most, now)
            now -= (self._source.folder / file).stat().st_size
        return most


def note(job: Conversion, path: Path) -> dict[str, Any]:
    """Writes down, durably, what every file of the source holds; returns it."""
    said: dict[str, Any] = {}
    for file in job.source.files:
        held = job.source.gone.get(file.name) or stamp(file)
        said[file.name] = {"stamp": held.decode("latin-1"), "tensors": {}}
    for name, tensor in job.source.tensors.items():
        file, at = tensor.order
        said[file]["tensors"][name] = [list(tensor.shape), tensor.dtype.name, at]
    write_json(path, said)
    sync_folder(path.parent)
    return said
