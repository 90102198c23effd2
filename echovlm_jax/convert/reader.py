"""Reads the parameters that `store` or Orbax wrote, a block at a time, compared with their digests.

The digests are of chunks, made while a model is converted from the bytes that its source held, so
whatever happened to a chunk since is found. A chunk is read whole anyway: checking adds a pass over
memory, which several threads share.
"""

from __future__ import annotations

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

import numpy as np
import tensorstore as ts

from echovlm_jax.errors import InputError
from echovlm_jax.storage import digests
from echovlm_jax.storage.layout import TREE

AGAIN = "convert again"
_CACHE_BYTES = 256 * 2**20
_THREADS = min(8, os.cpu_count() or 1)
_REASON_CHARS = 200  # of an error's line


class Reader:
    """The parameters of a checkpoint folder that this module or Orbax wrote.

    `shapes` and `dtypes` are by path; `read(path, index)` gives one block of one parameter. Where
    `parts` are given, only arrays whose path begins with one of them are opened. Where `check` is
    given, it is called once, before the first block is read.

    Where `chunks` has the digest of every chunk of every parameter, in row-major order, values are
    compared with them in the very memory that they are handed out in.

    Raises InputError where the folder holds no readable checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        parts: tuple[str, ...] = ("",),
        *,
        chunks: Mapping[str, Sequence[str]] | None = None,
        check: Callable[[], object] | None = None,
    ) -> None:
        self._folder, self._chunks = folder, chunks
        self._check, self._checking = check, threading.Lock()
        try:
            metadata = json.loads((folder / TREE).read_text("utf-8"))
            keys = [
                "/".join(part["key"] for part in leaf["key_metadata"])
                for leaf in metadata["tree_metadata"].values()
                # An empty node of an optimizer's state has a name, and no array.
                if not leaf.get("value_metadata", {}).get("skip_deserialize")
            ]
            kind = "zarr3" if metadata.get("use_zarr3") else "zarr"
            database = kvstore(folder, create=False)
            context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
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
            raise InputError(
                f"{folder}: not a readable checkpoint ({reason(error)}); convert again"
            ) from None
        self.shapes = {path: tuple(store.shape) for path, store in self._stores.items()}
        self.dtypes = {path: store.dtype.numpy_dtype for path, store in self._stores.items()}

        self._steps = {path: _chunk_steps(store) for path, store in self._stores.items()}
        if chunks is not None:
            for path, shape in self.shapes.items():
                counts = (-(-n // step) for n, step in zip(shape, self._steps[path], strict=True))
                if len(chunks.get(path, ())) != math.prod(counts):
                    raise InputError(f"{folder}: {path} is not cut as its digests say; {AGAIN}")

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """One block: a slice with start and stop for every axis. Any number of threads may read.

        Raises:
          InputError: the stored data is lost or damaged.
        """
        with self._checking:
            if self._check is not None:
                self._check()
                self._check = None
        if self._chunks is None:
            return self._read(path, index)
        cuts = list(_whole_chunks(index, self._steps[path], self.shapes[path]))
        if len(cuts) == 1 and cuts[0][1] == index:
            return self._checked(path, *cuts[0])
        if _is_hull(cuts, index):
            # One read for all; each chunk is contiguous in what it gives.
            out = self._read(path, index)
            each = [(place, out[_within(chunk, index)]) for place, chunk in cuts]
            list(_pool().map(lambda one: self._compare(path, *one), each))
            return out
        out = np.empty(piece_shape(index), self.dtypes[path])

        def take(cut: tuple[tuple[int, ...], tuple[slice, ...]]) -> None:
            common = tuple(_common(a, b) for a, b in zip(cut[1], index, strict=True))
            out[_within(common, index)] = self._checked(path, *cut)[_within(common, cut[1])]

        list(_pool().map(take, cuts))
        return out

    def _read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        try:
            return self._stores[path][index].read().result()
        except ValueError as error:
            raise InputError(
                f"{self._folder}: {path} cannot be read ({reason(error)}); {AGAIN}"
            ) from None

    def _checked(self, path: str, place: tuple[int, ...], chunk: tuple[slice, ...]) -> np.ndarray:
        values = self._read(path, chunk)
        self._compare(path, place, values)
        return values

    def _compare(self, path: str, place: tuple[int, ...], values: np.ndarray) -> None:
        assert self._chunks is not None
        counts = [-(-n // s) for n, s in zip(self.shapes[path], self._steps[path], strict=True)]
        number = int(np.ravel_multi_index(place, counts)) if counts else 0
        if digests.of_array(values) != self._chunks[path][number]:
            raise InputError(f"{self._folder}: {path} differs from its digest; {AGAIN}")


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, "digests")


def _chunk_steps(store: ts.TensorStore) -> tuple[int, ...]:
    found = store.chunk_layout.read_chunk.shape or store.shape
    return tuple(int(size or 1) for size in found)


def _whole_chunks(
    index: tuple[slice, ...], steps: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
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


def _is_hull(cuts: Sequence[tuple[Any, tuple[slice, ...]]], index: tuple[slice, ...]) -> bool:
    """Whether a block begins and ends where the chunks that it touches do."""
    first, last = cuts[0][1], cuts[-1][1]
    ends = zip(first, last, index, strict=True)
    return all(a.start == s.start and b.stop == s.stop for a, b, s in ends)


def _within(part: tuple[slice, ...], whole: tuple[slice, ...]) -> tuple[slice, ...]:
    """A block's place inside another that holds it."""
    return tuple(
        slice(a.start - b.start, a.stop - b.start) for a, b in zip(part, whole, strict=True)
    )


def _common(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))


def piece_shape(piece: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in piece)


def kvstore(folder: Path, *, create: bool) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{folder.resolve()}/"}
    spec: dict[str, Any] = {"driver": "ocdbt", "base": base}
    if create:
        # The data files have random names and are found through the manifest only, so that they
        # need no rename; the manifest does. The rest is what Orbax asks for.
        spec |= {
            "base": {**base, "file_io_locking": {"mode": "non_atomic"}},
            "manifest": base,
            "target_data_file_size": 2**31,
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
    # What was asked for follows in brackets, as JSON.
    clauses = line.split(" [tensorstore_spec=")[0].split(": ")
    text = clauses[0]
    for clause in clauses[1:]:
        if len(text) + len(clause) > _REASON_CHARS:
            break
        text += f": {clause}"
    return text
