"""Saving a training state into a bucket, in place of Orbax, which has no s3://."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from echovlm_jax.storage import digests
from echovlm_jax.storage.arrays import array_key
from echovlm_jax.storage.writer import CHUNK_BYTES, Writer

_IN_FLIGHT = 16  # chunks that are being sent


class _Shard(NamedTuple):
    path: str
    start: tuple[int, ...]
    values: np.ndarray


class State:
    """A copy of the shards that this process writes: the first of each array's equal shards.

    Args:
      tree: the state, of jax.Array; it may be changed or donated afterwards.
    """

    def __init__(self, tree: Any) -> None:
        leaves = [
            (array_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        ]
        self._arrays = {
            name: (
                leaf.shape,
                np.dtype(leaf.dtype),
                _chunk_shape(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize),
            )
            for name, leaf in leaves
        }
        own = [
            (name, leaf.shape, shard)
            for name, leaf in leaves
            for shard in leaf.addressable_shards
            if shard.replica_id == 0
        ]
        for *_, shard in own:
            shard.data.copy_to_host_async()
        self._shards = [
            _Shard(name, _start(shard.index, shape), np.array(shard.data))
            for name, shape, shard in own
        ]

    def write(self, folder: Path, process: int, check: Callable[[], object]) -> dict[str, str]:
        """Writes the shards.

        Args:
          folder: of the database.
          process: see `Writer`.
          check: called before each chunk; what it raises ends this.

        Returns:
          the digest of every chunk by its key, made of what is in memory.

        Raises:
          ValueError: as TensorStore does.
        """
        writer = Writer(folder, self._arrays, process)
        found, sent = {}, deque()
        for path, index, values in self._chunks():
            check()
            chunk = self._arrays[path][2]
            place = [str(s.start // n) for s, n in zip(index, chunk, strict=True)] or ["0"]
            found[f"{array_key(path)}/{'.'.join(place)}"] = digests.of_array(values)
            sent.append(writer.write(path, index, values))
            if len(sent) > _IN_FLIGHT:
                sent.popleft().result()
        for future in sent:
            future.result()
        return found

    def finish(self, folder: Path, processes: int) -> None:
        """Merges the databases of all processes into one; called by one of them."""
        Writer(folder, self._arrays).finish(processes)

    def _chunks(self) -> Iterator[tuple[str, tuple[slice, ...], np.ndarray]]:
        for path, start, values in self._shards:
            chunk = self._arrays[path][2]
            counts = [size // step for size, step in zip(values.shape, chunk, strict=True)]
            for place in np.ndindex(*counts):
                own = tuple(
                    slice(i * step, (i + 1) * step) for i, step in zip(place, chunk, strict=True)
                )
                index = tuple(
                    slice(first + s.start, first + s.stop)
                    for first, s in zip(start, own, strict=True)
                )
                yield path, index, values[own]


def array_name(path: Any) -> str:
    """An array's path in a tree of any nodes, as Orbax stores it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _start(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(s.indices(size)[0] for s, size in zip(index, shape, strict=True))


def _chunk_shape(shard: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The largest chunk that divides a shard into equal ones: no two processes share one."""
    chunk = list(shard)
    for axis, size in enumerate(shard):
        rest = math.prod(shard[axis + 1 :]) * itemsize
        if rest <= CHUNK_BYTES:
            most = max(1, CHUNK_BYTES // max(rest, 1))
            chunk[axis] = next(n for n in range(min(most, size), 0, -1) if size % n == 0)
            break
        chunk[axis] = 1
    return tuple(chunk)
