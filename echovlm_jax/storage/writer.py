"""Writes arrays chunk by chunk, here or in a bucket, as a checkpoint that Orbax restores.

Orbax's own save holds whole arrays, and has no s3://. Here each array is a zarr array inside one
OCDBT database, as Orbax lays it out, but written through TensorStore, uncompressed: weights are
close to random, and a byte copy needs no decoder.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from echovlm_jax.errors import InputError
from echovlm_jax.storage.arrays import array_key, base_kvstore, kvstore, reason
from echovlm_jax.storage.files import below, make_folder, remove, write_text
from echovlm_jax.storage.layout import TREE

# Large enough that a disk streams; small enough that a shard's reader fetches little it doesn't
# need, and that the allocator reuses the memory.
CHUNK_BYTES = 16 * 2**20
# Orbax's layout of each process's data, which its readers reach through the merged database.
PROCESS = "ocdbt.process_"


def chunk_shape(part: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The chunk of an array of shape `part`: as many of the last axes whole as fit CHUNK_BYTES.

    A chunk is contiguous in row-major order. The first axis that does not fit is cut evenly, so
    that the last chunk, which is stored padded, wastes next to nothing.
    """
    chunk = list(part)
    for axis, size in enumerate(part):
        rest = math.prod(part[axis + 1 :]) * itemsize
        if rest <= CHUNK_BYTES:
            count = -(-size // max(1, CHUNK_BYTES // max(rest, 1)))
            chunk[axis] = -(-size // max(count, 1)) or 1
            break
        chunk[axis] = 1
    return tuple(chunk)


def pieces(part: tuple[int, ...], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """The chunks of an array of shape `part` as indices, in row-major order."""
    chunk = chunk_shape(part, itemsize)
    counts = [-(-size // step) for size, step in zip(part, chunk, strict=True)]
    for place in np.ndindex(*counts):
        yield tuple(
            slice(i * step, min((i + 1) * step, size))
            for i, step, size in zip(place, chunk, part, strict=True)
        )


class LostChunksError(InputError):
    """Chunks whose writing had been confirmed are gone."""


class Writer:
    """Writes parameters into `folder`; a confirmed `write` is durable and survives a kill.

    Args:
      folder: a new folder, or that of a killed Writer of the same arrays.
      arrays: path → (shape, dtype, shape of a chunk).
      process: the number of a job's process; each has a database of its own.
    """

    def __init__(
        self,
        folder: Path,
        arrays: Mapping[str, tuple[tuple[int, ...], np.dtype, tuple[int, ...]]],
        process: int = 0,
    ) -> None:
        self._folder = folder
        self._arrays = dict(arrays)
        make_folder(folder / f"{PROCESS}{process}")
        database = kvstore(folder / f"{PROCESS}{process}", create=True)
        context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        opened = {
            path: ts.open(
                {
                    "driver": "zarr",
                    "kvstore": {**database, "path": f"{array_key(path)}/"},
                    "metadata": {
                        "shape": shape,
                        "chunks": chunk,
                        "compressor": None,
                        "dtype": _zarr_dtype(dtype),
                    },
                    # Zeros are data: an absent chunk must mean a lost one.
                    "store_data_equal_to_fill_value": True,
                },
                open=True,
                create=True,
                context=context,
            )
            for path, (shape, dtype, chunk) in self._arrays.items()
        }
        self._stores = {path: future.result() for path, future in opened.items()}

    def write(self, path: str, index: tuple[int | slice, ...], values: np.ndarray) -> ts.Future:
        """Begins to write one chunk. `values` must not change any more.

        The future is done when the values are durable.
        """
        target = self._stores[path][index]
        commit = target.write(values, can_reference_source_data_indefinitely=True).commit
        commit.force()
        return commit

    def read(self, path: str, index: tuple[int | slice, ...]) -> np.ndarray:
        """A chunk's stored values; zeros where there are none.

        Raises:
          LostChunksError: it can't be read.
        """
        try:
            return self._stores[path][index].read().result()
        except ValueError as error:
            raise LostChunksError(
                f"{self._folder}: what had been written can't be read ({reason(error)}); run the"
                " same command again to start over"
            ) from None

    def finish(self, processes: int = 1) -> None:
        """Makes a checkpoint that Orbax restores of the written arrays. May be run again.

        Args:
          processes: the number of processes that wrote; all have ended, and one calls this.

        Raises:
          LostChunksError: chunks that were written are gone.
        """
        self._stores = {}
        for left in ("manifest.ocdbt", "d"):
            remove(self._folder / left)
        # Orbax's own last step: the merged database refers to the processes' data files.
        context = ts.Context()  # the same for all, or TensorStore would copy the data
        parts = [self._folder / f"{PROCESS}{number}" for number in range(processes)]
        *written, merged = (
            ts.KvStore.open(kvstore(folder, create=True), context=context).result()
            for folder in (*parts, self._folder)
        )
        found = {key for part in written for key in part.list().result()}
        if lost := self._keys() - len(found):
            raise LostChunksError(
                f"{self._folder}: {lost} chunks are lost; run the same command again to start over"
            )
        with ts.Transaction(atomic=True) as transaction:
            for part in written:
                part.experimental_copy_range_to(merged.with_transaction(transaction)).result()
        self._drop_unreferenced(parts)
        for name, content in _orbax_files(self._arrays).items():
            target = self._folder / name
            make_folder(target.parent)
            write_text(target, json.dumps(content))

    def _keys(self) -> int:
        """The number of keys of the complete database: chunks, and each array's metadata."""
        return sum(
            1 + math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))
            for shape, _, chunk in self._arrays.values()
        )

    def _drop_unreferenced(self, parts: list[Path]) -> None:
        """Removes the data files of unfinished writes."""
        used = _data_files(self._folder)
        for part in parts:
            used |= {f"{part.name}/{name}" for name in _data_files(part)}
            for name in below(part / "d"):
                if f"{part.name}/d/{name}" not in used:
                    (part / "d" / name).unlink()


def _data_files(database: Path) -> set[str]:
    """The files that the newest version of an OCDBT database needs, by name below it."""
    base = ts.KvStore.open(base_kvstore(database)).result()
    files: set[str] = set()
    nodes = [ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]]
    while nodes:
        references = [nodes.pop()]
        for entry in ts.ocdbt.dump(base, references[0]).result()["entries"]:
            if "location" in entry:
                nodes.append(entry["location"])
            elif "indirect_value" in entry:
                references.append(entry["indirect_value"])
        for reference in references:
            # "<kind>:<folder>:<file>:<offset>:<length>", percent-encoded.
            _, folder, file, _, _ = reference.split(":")
            files.add(unquote(folder) + unquote(file))
    return files


def _zarr_dtype(dtype: np.dtype) -> str:
    # Dtypes that numpy doesn't know have their names.
    return str(dtype) if dtype in (jnp.bfloat16, jnp.int4) else np.dtype(dtype).str


def _orbax_files(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata beside the database, in the form that Orbax reads."""
    tree = {}
    for path, (shape, _, _) in arrays.items():
        keys = path.split("/")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {
                # Not "jax.Array": with that, a restore without a target asks for the devices of
                # the machine that saved.
                "value_type": "np.ndarray",
                "skip_deserialize": False,
                "write_shape": list(shape),
            },
        }
    now = time.time_ns()
    return {
        TREE: {
            "tree_metadata": tree,
            "use_ocdbt": True,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        },
        "_CHECKPOINT_METADATA": {
            "item_handlers": "orbax.checkpoint._src.handlers.standard_checkpoint_handler"
            ".StandardCheckpointHandler",
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": now,
            "commit_timestamp_nsecs": now,
            "custom_metadata": {},
        },
        "array_metadatas/process_0": {
            "array_metadatas": [
                {
                    "array_metadata": {
                        "param_name": array_key(path),
                        "write_shape": list(shape),
                        "chunk_shape": list(chunk),
                        "ext_metadata": None,
                    }
                }
                for path, (shape, _, chunk) in arrays.items()
            ]
        },
    }
