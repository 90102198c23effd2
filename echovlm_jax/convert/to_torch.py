"""A folder of ours back into a Hugging Face-form checkpoint, under the released tensor names."""

import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from echovlm_jax.convert import folder, safetensors, table
from echovlm_jax.convert.journal import JOURNAL, MODEL, Journal, make_folder, work_folder
from echovlm_jax.convert.source import INDEX, SINGLE
from echovlm_jax.convert.store import ahead
from echovlm_jax.errors import InputError
from echovlm_jax.progress import progress
from echovlm_jax.storage import writer as store
from echovlm_jax.storage.files import as_path, in_bucket, remove, rename_folder, write_json
from echovlm_jax.storage.files import make_folder as make_folder_at

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_OBJECT_BYTES = 2**29  # of a shard in a bucket: it is in memory until it is sent
_READ_AHEAD = 3


def export(
    model: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    max_shard_size: str | int = "5GB",
    merge_lora: bool = False,
) -> dict[str, Any]:
    """Writes safetensors (one file, or shards with an index), config.json and the side files.

    Every tensor is checked against the digest that the conversion recorded. Works in
    DST.exporting, under a lock, and renames at the end. After a kill, the export starts over. A
    training run's low-rank updates are added to its weights.

    Args:
      model: a MODEL folder.
      dst: the folder to make.
      max_shard_size: a shard's limit, e.g. "5GB" or "500MB"; a larger tensor gets its own shard.
      merge_lora: refuse a model that has no low-rank updates to add.

    Returns:
      The report: tensors, bytes, seconds, peak_rss_bytes.

    Raises:
      InputError: no model there, damaged data, DST exists, no space, a bad size.
    """
    started = time.monotonic()
    limit = parse_size(max_shard_size)
    target = as_path(dst).absolute()
    if not in_bucket(target):
        folder.check_new(target)
    else:
        limit = min(limit, _OBJECT_BYTES)
    opened = folder.open_model(model)
    if merge_lora and not getattr(opened, "updated", None):
        raise InputError(f"{model}: has no low-rank updates to merge; leave --merge-lora out")
    tensors = _tensors(opened)
    total = sum(_nbytes(opened, slot) for slot in tensors.values())

    def write(made: Path) -> None:
        _write_shards(opened, tensors, made, limit, total)
        folder.copy_side_files(opened.folder, made)

    make_folder_whole(dst, total, write)
    return {
        "tensors": len(tensors),
        "bytes": total,
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": folder.peak_rss_bytes(),
    }


def make_folder_whole(
    dst: str | os.PathLike[str], size: int, write: Callable[[Path], None]
) -> None:
    """Makes the folder `dst` of what `write` puts into one, of about `size` bytes, or nothing."""
    target = as_path(dst).absolute()
    work = work_folder(target, ".exporting")
    # In a bucket, a killed export's files are below `target` itself.
    unfinished = in_bucket(target) and (work / JOURNAL).is_file()
    if not unfinished:
        folder.check_new(target)
    make_folder(work)
    with Journal(work / JOURNAL, {"export": 1}) as journal:
        made = target if in_bucket(target) else work / MODEL
        done = False
        try:
            if not unfinished:
                folder.check_new(target)  # again: the last one to hold the lock may have made it
            remove(made)
            make_folder_at(made)
            folder.check_space(work, size)
            write(made)
            journal.check()
            if made != target:
                rename_folder(made, target)
            done = True
        except OSError as error:
            raise InputError(
                f"{target}: cannot be written ({error.strerror}); check the disk"
            ) from error
        finally:
            journal.discard(None if done else made)


def parse_size(text: str | int) -> int:
    """ "5GB" → 5·10⁹, "2GiB" → 2·2³⁰. Raises InputError for what is not a size above 0."""
    # So few digits that no float overflows.
    found = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)\s*", str(text))
    size = int(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0
    if size < 1:
        raise InputError(
            f"max shard size {table.quoted(text)} is not a size; write it like 5GB or 500MB"
        )
    return size


def _tensors(model: folder.StoredModel) -> dict[str, table.Slot]:
    """Every tensor to write; a repeated lm_head points to the embedding's values."""
    slots = table.slots(model.config)
    return {**slots, **{name: slots[original] for name, original in model.duplicates.items()}}


def _nbytes(model: folder.StoredModel, slot: table.Slot) -> int:
    return slot.size * model.dtypes[slot.path].itemsize


def _shards(
    model: folder.StoredModel, tensors: dict[str, table.Slot], limit: int
) -> list[dict[str, table.Slot]]:
    shards: list[dict[str, table.Slot]] = [{}]
    size = 0
    for name, slot in tensors.items():
        if shards[-1] and size + _nbytes(model, slot) > limit:
            shards.append({})
            size = 0
        shards[-1][name] = slot
        size += _nbytes(model, slot)
    return shards


def _write_shards(
    model: folder.StoredModel,
    tensors: dict[str, table.Slot],
    work: Path,
    limit: int,
    total: int,
) -> None:
    def values(name: str) -> Iterator[np.ndarray]:
        slot = tensors[name]
        digest = hashlib.sha256()
        for piece in _read_ahead(model, slot, pool):
            hashed = hasher.submit(digest.update, piece.reshape(-1).view(np.uint8).data)
            yield piece
            hashed.result()
            tick(piece.nbytes)
        recorded = model.digests.get(slot.name, digest.hexdigest())
        if recorded != digest.hexdigest():
            raise InputError(
                f"{model.folder}: {slot.name} differs from its digest in {folder.REPORT}; the"
                " folder is damaged: convert again"
            )

    shards = _shards(model, tensors, limit)
    weight_map: dict[str, str] = {}
    with (
        progress(total, "B", "export") as tick,
        ThreadPoolExecutor(_READ_AHEAD) as pool,
        ThreadPoolExecutor(1) as hasher,
    ):
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = SINGLE if len(shards) == 1 else file
            header = {n: (slot.shape, model.dtypes[slot.path]) for n, slot in shard.items()}
            safetensors.write_file(work / file, header, values)
            weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(work / INDEX, index)


def _read_ahead(
    model: folder.StoredModel, slot: table.Slot, pool: ThreadPoolExecutor
) -> Iterator[np.ndarray]:
    """A tensor's pieces in order, a few of them being read while one is used."""
    lead = tuple(slice(i, i + 1) for i in slot.index)
    cuts = [(*lead, *cut) for cut in store.pieces(slot.part, model.dtypes[slot.path].itemsize)]
    return ahead(pool, functools.partial(model.read, slot.path), cuts, _READ_AHEAD)
