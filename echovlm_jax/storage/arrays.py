"""Stored arrays: any block can be read; each stored chunk is read once and checked.

`convert` makes the digests of chunks from its source's bytes, a training run from the bytes just
written. TensorStore reads whole chunks anyway, so a check costs one pass over memory.
"""

import functools
import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from echovlm_jax.storage import digests
from echovlm_jax.storage.bucket import BucketPath
from echovlm_jax.storage.files import in_bucket
from echovlm_jax.storage.layout import CHUNKS, STATE, TREE
from echovlm_jax.storage.verify import DamagedError, check_files

AGAIN = "convert again"
# The most that a host holds of an array on its way to devices, where one shard is not more.
_HOST_BYTES = 2**30
# Of chunks that a block took only a part of: the next block often takes the rest.
_KEPT_BYTES = 256 * 2**20
_NODES_BYTES = 64 * 2**20  # of a database's index
_THREADS = min(8, os.cpu_count() or 1)
_OBJECT_BYTES = 2**26  # of a bucket: they are in memory one by one
_REASON_CHARS = 200  # of an error's line

# One block of an array: a slice with start and stop for every axis.
Index = tuple[slice, ...]
# Takes values that belong into a block: its number, where in it, and the values.
Take = Callable[[int, Index, np.ndarray], object]


class Reader:
    """The arrays of a checkpoint folder that `convert` or Orbax wrote.

    `shapes` and `dtypes` are by path; `read(path, index)` gives one block of one array. Any number
    of threads may read.

    Args:
      folder: the database.
      parts: the beginnings of the paths to open.
      chunks: the digests of every array's chunks in row-major order, by `array_key`; None: values
        are not checked.
      check: a function called once, before the first block is read.
      mend: the advice at the end of an error.

    Raises:
      DamagedError: the folder holds no readable checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        parts: tuple[str, ...] = ("",),
        *,
        chunks: Mapping[str, Sequence[str]] | None = None,
        check: Callable[[], object] | None = None,
        mend: str = AGAIN,
    ) -> None:
        self._folder, self._chunks, self._mend = folder, chunks, mend
        self._check, self._checking = check, threading.Lock()
        self._kept: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}
        self._keeping = threading.Lock()
        try:
            metadata = json.loads((folder / TREE).read_text("utf-8"))
            keys = [
                "/".join(part["key"] for part in leaf["key_metadata"])
                for leaf in metadata["tree_metadata"].values()
                # An empty node of an optimizer's state has a name, and no array.
                if not leaf.get("value_metadata", {}).get("skip_deserialize")
            ]
            kind = "zarr3" if metadata.get("use_zarr3") else "zarr"
            database, context = kvstore(folder, create=False), _context()
            opened = {
                key: ts.open(
                    {
                        "driver": kind,
                        "kvstore": {**database, "path": f"{array_key(key)}/"},
                        "fill_missing_data_reads": False,
                        "recheck_cached_data": "open",
                    },
                    open=True,
                    read=True,
                    context=context,
                )
                for key in keys
                if key.startswith(parts)
            }
            self._stores = {path: future.result() for path, future in opened.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(f"not a readable checkpoint ({reason(error)})") from None
        self.shapes = {path: tuple(store.shape) for path, store in self._stores.items()}
        self.dtypes = {path: store.dtype.numpy_dtype for path, store in self._stores.items()}

        self._steps = {path: _chunk_steps(store) for path, store in self._stores.items()}
        if chunks is not None:
            for path in self.shapes:
                if len(chunks.get(array_key(path), ())) != math.prod(self._counts(path)):
                    raise self._damaged(f"{path} is not cut as its digests say")

    def read(self, path: str, index: Index) -> np.ndarray:
        """One block.

        Raises:
          DamagedError: the stored data is lost or damaged.
        """
        [out] = gather(functools.partial(self.read_blocks, path), [index], self.dtypes[path])
        return out

    def read_blocks(self, path: str, indices: Sequence[Index], take: Take) -> None:
        """Reads several blocks, each stored chunk once however many of them need it.

        Args:
          path: the array.
          indices: the blocks.
          take: a function that gets every part of every block, from several threads.

        Raises:
          DamagedError: the stored data is lost or damaged.
        """
        with self._checking:
            if self._check is not None:
                self._check()
                self._check = None
        touched: dict[tuple[int, ...], tuple[Index, list[int]]] = {}
        for number, index in enumerate(indices):
            for place, chunk in _whole_chunks(index, self._steps[path], self.shapes[path]):
                touched.setdefault(place, (chunk, []))[1].append(number)

        def scatter(place: tuple[int, ...]) -> None:
            chunk, numbers = touched[place]
            shared = [_common(chunk, indices[number]) for number in numbers]
            values = self._chunk(path, place, chunk, keep=len(shared) == 1 and shared[0] != chunk)
            for number, common in zip(numbers, shared, strict=True):
                take(number, _within(common, indices[number]), values[_within(common, chunk)])

        if len(touched) == 1:
            scatter(*touched)
        else:
            list(_pool().map(scatter, sorted(touched)))

    def load(self, path: str, sharding: jax.sharding.Sharding | None) -> jax.Array:
        """A whole array on devices; see `to_devices`."""
        read = functools.partial(self.read_blocks, path)
        return to_devices(read, self.shapes[path], self.dtypes[path], sharding)

    def _chunk(self, path: str, place: tuple[int, ...], chunk: Index, *, keep: bool) -> np.ndarray:
        """The values of one chunk, compared with its digest."""
        with self._keeping:
            if (values := self._kept.get((path, place))) is not None:
                return values
        try:
            values = self._stores[path][chunk].read().result()
        except ValueError as error:
            raise self._damaged(f"{path} cannot be read ({reason(error)})") from None
        if self._chunks is not None:
            counts = self._counts(path)
            number = int(np.ravel_multi_index(place, counts)) if counts else 0
            if digests.of_array(values) != self._chunks[array_key(path)][number]:
                raise self._damaged(f"{path} differs from its digest")
        if keep:
            with self._keeping:
                self._kept[path, place] = values
                while sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
                    del self._kept[next(iter(self._kept))]
        return values

    def _counts(self, path: str) -> tuple[int, ...]:
        steps = zip(self.shapes[path], self._steps[path], strict=True)
        return tuple(-(-size // step) for size, step in steps)

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(self._folder, what, self._mend)


def open_state(checkpoint: Path, parts: tuple[str, ...] = ("",), *, mend: str) -> Reader:
    """Opens the arrays of a run's checkpoint; its small files are compared with their digests.

    A checkpoint without digests of chunks, which older runs made, is read whole first.

    Args:
      checkpoint: the folder of a step.
      parts: as in `Reader`.
      mend: as in `Reader`.

    Raises:
      DamagedError: a file is missing, unknown or changed.
    """
    check_files(checkpoint, mend, data=False)
    chunks = check = None
    if (checkpoint / CHUNKS).is_file():
        chunks = json.loads((checkpoint / CHUNKS).read_text("utf-8"))
    else:
        check = functools.partial(check_files, checkpoint, mend)
    return Reader(checkpoint / STATE, parts, chunks=chunks, check=check, mend=mend)


def digest_chunks(database: Path) -> dict[str, str]:
    """The digest of every chunk of uncompressed arrays in a database, by its key; all are read."""
    stored = ts.KvStore.open(kvstore(database, create=False), context=_context()).result()
    keys = [key for key in stored.list().result() if not key.endswith(b"/.zarray")]

    def digest(key: bytes) -> str:
        return digests.of_array(np.frombuffer(stored.read(key).result().value, np.uint8))

    found = zip(keys, _pool().map(digest, keys), strict=True)
    return {key.decode(): digest for key, digest in found}


def in_order(chunks: Mapping[str, str]) -> dict[str, list[str]]:
    """Each array's digests of chunks in row-major order, of what `digest_chunks` gave."""
    places: dict[str, dict[tuple[int, ...], str]] = {}
    for key, digest in chunks.items():
        array, _, place = key.rpartition("/")
        places.setdefault(array, {})[tuple(map(int, place.split(".")))] = digest
    return {array: [each[place] for place in sorted(each)] for array, each in places.items()}


def gather(
    read: Callable[[Sequence[Index], Take], object], indices: Sequence[Index], dtype: np.dtype
) -> list[np.ndarray]:
    """The blocks that a function like `Reader.read_blocks` of one path reads."""
    out = [np.empty(piece_shape(index), dtype) for index in indices]

    def take(number: int, where: Index, values: np.ndarray) -> None:
        out[number][where] = values

    read(indices, take)
    return out


def to_devices(
    read: Callable[[Sequence[Index], Take], object],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """An array on devices. The host holds 1 GiB of this process' shards at a time, or one shard.

    Args:
      read: as in `gather`.
      shape: the whole array's shape.
      dtype: the array's dtype.
      sharding: the layout over devices; by default all on the default device.
    """
    if sharding is None:
        sharding = default_sharding()
    # Devices that hold the same block share one read.
    blocks: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        index = index or (slice(None),) * len(shape)
        block = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        blocks.setdefault(block, []).append(device)
    size = dtype.itemsize * math.prod(sharding.shard_shape(shape))
    together = max(1, _HOST_BYTES // max(1, size))
    order, arrays = sorted(blocks), []  # neighbours, which share chunks, come together
    for start in range(0, len(order), together):
        group = order[start : start + together]
        values = gather(read, [tuple(slice(*ends) for ends in block) for block in group], dtype)
        for block, part in zip(group, values, strict=True):
            arrays += [jax.device_put(part, device) for device in blocks[block]]
        del values, part
        jax.block_until_ready(arrays)  # the host's copy is freed before the next read
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def default_sharding() -> jax.sharding.Sharding:
    """Whole on the default device."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    device = device if isinstance(device, jax.Device) else jax.devices()[0]
    return jax.sharding.SingleDeviceSharding(device)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, "arrays")


def _context() -> ts.Context:
    """A cache for databases' indices, and none for values."""
    limits = {"cache_pool": 0, "cache_pool#index": _NODES_BYTES}
    return ts.Context({name: {"total_bytes_limit": limit} for name, limit in limits.items()})


def _chunk_steps(store: ts.TensorStore) -> tuple[int, ...]:
    found = store.chunk_layout.read_chunk.shape or store.shape
    return tuple(int(size or 1) for size in found)


def _whole_chunks(
    index: Index, steps: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], Index]]:
    """The chunks that a block touches: each one's place among all, and its own block."""
    spans = [
        range(s.start // step, -(-s.stop // step)) for s, step in zip(index, steps, strict=True)
    ]
    for place in itertools.product(*spans):
        yield (
            place,
            tuple(
                slice(i * step, min((i + 1) * step, size))
                for i, step, size in zip(place, steps, shape, strict=True)
            ),
        )


def _within(part: Index, whole: Index) -> Index:
    """A block's place inside another that holds it."""
    return tuple(
        slice(a.start - b.start, a.stop - b.start) for a, b in zip(part, whole, strict=True)
    )


def inside(part: Index, whole: Index) -> Index:
    """Where a part of a block lies in the array; undoes `_within`."""
    return tuple(
        slice(b.start + a.start, b.start + a.stop) for a, b in zip(part, whole, strict=True)
    )


def _common(one: Index, other: Index) -> Index:
    """The intersection of two blocks."""
    return tuple(
        slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True)
    )


def piece_shape(piece: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in piece)


def base_kvstore(folder: Path) -> dict[str, Any]:
    """TensorStore's spec of a folder's files."""
    if isinstance(folder, BucketPath):
        return folder.kvstore()
    return {"driver": "file", "path": f"{folder.resolve()}/"}


def kvstore(folder: Path, *, create: bool) -> dict[str, Any]:
    """TensorStore's spec of an OCDBT database in a folder."""
    base = base_kvstore(folder)
    spec: dict[str, Any] = {"driver": "ocdbt", "base": base}
    if not create:
        spec |= {"cache_pool": "cache_pool#index"}  # of `_context`
    else:
        # The data files have random names and are found through the manifest only, so that they
        # need no rename; the manifest does. The rest is what Orbax asks for.
        local = {} if in_bucket(folder) else {"file_io_locking": {"mode": "non_atomic"}}
        spec |= {
            "base": {**base, **local},
            "manifest": base,
            "target_data_file_size": _OBJECT_BYTES if in_bucket(folder) else 2**31,
            "assume_config": True,
            "config": {
                "max_inline_value_bytes": 1024,
                "max_decoded_node_bytes": 100_000_000,
                "manifest_kind": "single",
            },
        }
    return spec


def array_key(path: str) -> str:
    return path.replace("/", ".")


def reason(error: Exception) -> str:
    """An error of TensorStore's on one line, cut between its clauses where it is long."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    # The request follows in brackets, as JSON.
    clauses = line.split(" [tensorstore_spec=")[0].split(": ")
    text = clauses[0]
    for clause in clauses[1:]:
        if len(text) + len(clause) > _REASON_CHARS:
            break
        text += f": {clause}"
    return text
