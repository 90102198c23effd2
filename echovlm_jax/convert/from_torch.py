"""A PyTorch checkpoint into a folder of ours: streaming, bounded in memory, resumable.

Values are decoded only for a change of dtype. Otherwise bytes are read, hashed and written: every
bit pattern is kept, NaN payloads too.
"""

import contextlib
import functools
import hashlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echovlm_jax.convert import few_bits, folder, shards, table
from echovlm_jax.convert import source as sources
from echovlm_jax.convert.job import Conversion
from echovlm_jax.convert.journal import (
    JOURNAL,
    MODEL,
    REMEMBERED,
    Journal,
    make_folder,
    work_folder,
)
from echovlm_jax.convert.peft import open_adapter
from echovlm_jax.convert.store import DataFiles
from echovlm_jax.errors import InputError
from echovlm_jax.model import param_specs
from echovlm_jax.progress import progress
from echovlm_jax.storage import digests
from echovlm_jax.storage import writer as store
from echovlm_jax.storage.arrays import reason
from echovlm_jax.storage.files import as_path, in_bucket, remove, rename_folder, write_json
from echovlm_jax.storage.verify import without_added

# What only suggests that weights are others: their bytes tell.
_STAMPS = ("weights", "adapter")
# Of conversion.json, and not of the report.
_OWN = ("identity", "sha256", "chunks", shards.KEY)
# Values on their way to the disk: enough to keep it busy while the next ones are read.
_IN_FLIGHT_BYTES = 256 * 2**20
_CHECKERS = 4


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: Any = None,
    adapter: str | os.PathLike[str] | None = None,
    quantize: str | None = None,
    delete_source_shards: bool = False,
) -> dict[str, Any]:
    """Converts a Hugging Face-form checkpoint to DST/{config.json, …, params/, conversion.json,
    XXH128SUMS}.

    Works in DST.partial and renames at the end. After a kill or an error, the same call resumes:
    the written tensors are compared with their digests first. If DST is this conversion already,
    and whole, its report is returned; if the source files' sizes or times differ, their bytes are
    compared.

    Args:
      src: a folder with config.json and weights, or one weight file in such a folder.
      dst: the folder to make.
      dtype: bfloat16, float32 or float16 to cast to; by default every bit stays.
      adapter: the folder of a PEFT adapter to merge in: updates are added, in float32, and what it
        has in full takes the source's place.
      quantize: "int8" or "int4": what `quantize.takes` says is rounded to few bits, from the values
        that the source has, or the merged ones. `dtype` is then of the rest.

    Returns:
      The report: tensors, bytes, seconds, peak_rss_bytes, missing, unexpected (both empty: either
      is refused), ignored, duplicates, dtype, resumed (tensors that an earlier run had finished);
      with `quantize`, quantized {kind: bytes} and quantize, the recipe in full; deleted, the
      source's files that are gone, where there are any; dequantized, how the source's weights were
      quantized, where they were.
      conversion.json has in addition sha256, by released tensor name, of the stored bytes, and
      chunks, XXH128 of each parameter's chunks; both are computed before these are written.

    Raises:
      InputError: the source is incomplete, damaged or not of its config.json; DST exists; no space.
    """
    wanted = folder.as_dtype(dtype)
    few_bits.check_kind(quantize)

    def make() -> Conversion:
        job = _prepare(src, wanted, adapter, quantize, shards.remembered(dst))
        if delete_source_shards:
            shards.check_may_delete(job.source, dst)
        return job

    return carry_out(make, dst, delete=delete_source_shards)


def carry_out(
    make: Callable[[], Conversion], dst: str | os.PathLike[str], *, delete: bool = False
) -> dict[str, Any]:
    """Makes a folder as `convert` does; `make` is called once `dst` has been checked. `delete`: see
    its delete_source_shards."""
    started = time.monotonic()
    target = as_path(dst).absolute()
    partial = work_folder(target, ".partial")
    unfinished = in_bucket(target) and (partial / JOURNAL).is_file()
    if not unfinished and not (target / folder.REPORT).is_file():
        folder.check_new(target)
    job = make()
    if finished := _finished(target, job):
        _drop_leftover(partial, job.identity)
        return finished
    if not unfinished:
        folder.check_new(target)
    made = make_folder(partial)
    # A bucket's folder has its name from the beginning, and is whole once it has XXH128SUMS.
    model = target if in_bucket(target) else partial / MODEL
    with Journal(partial / JOURNAL, job.identity) as journal:
        try:
            # Again: the last one to hold the lock may have made it.
            if model != target or not journal.done:
                folder.check_new(target)
            used = shards.Shards(job, journal) if delete else None
            _check_left(job, partial, journal, used)
            noted = None
            if used or job.source.gone:
                noted = shards.note(job, partial / REMEMBERED)
            resumed, known = _make_model(job, partial, model, journal, used)
        except store.LostChunksError:
            journal.discard()  # the journal promises what is gone
            raise
        except InputError:
            # Finished tensors may be hours of work, and a source that failed once may be read yet.
            if made and not journal.done:
                journal.discard()
            raise
        report = _report(job, resumed, time.monotonic() - started)
        of_tensors = {name: journal.done[name].split(" ", 1)[0] for name in job.slots}
        of_chunks = _by_parameter(job, journal)
        write_json(
            model / folder.REPORT,
            {
                **report,
                **{"identity": job.identity, "sha256": of_tensors, "chunks": of_chunks},
                **({shards.KEY: noted} if noted else {}),
            },
        )
        journal.check()
        digests.write(model, known=known)
        if model != target:
            rename_folder(model, target)
        journal.discard()
    return report


def _check_left(
    job: Conversion, partial: Path, journal: Journal, used: shards.Shards | None
) -> None:
    """Refuses a journal of other tensors, and a disk that can't take those that are left."""
    if odd := journal.done.keys() - job.slots.keys():
        raise InputError(
            f"{partial}: its {JOURNAL} names {table.quoted(min(odd))}, which is no tensor of this"
            " model; delete that folder to start over"
        )
    left = job.slots.keys() - journal.done.keys()
    needed = used.needed() if used else sum(map(job.nbytes, left))
    folder.check_space(partial, needed)


def _by_parameter(job: Conversion, journal: Journal) -> dict[str, list[str]]:
    """The digests of each stored array's chunks, in row-major order."""
    out: dict[str, list[str]] = {}
    for slot in sorted(job.slots.values(), key=lambda slot: slot.index):
        chunks = journal.done[slot.name].split(" ")[1:]
        for (array, _), chunk in zip(job.parts(slot.name), chunks, strict=True):
            out.setdefault(array, []).append(chunk)
    return out


def _make_model(
    job: Conversion, partial: Path, model: Path, journal: Journal, used: shards.Shards | None
) -> tuple[int, dict[str, str]]:
    """Everything of the model folder but its report. Returns how many tensors were there, and
    digests of files."""
    if not journal.done:
        remove(model)
    try:
        resumed, known = _write_params(job, model / folder.PARAMS, journal, used)
    except InputError:
        raise
    except ValueError as error:
        if reason(error).startswith("DATA_LOSS"):
            raise store.LostChunksError(
                f"{partial}: what had been written is damaged; run the same command again to start"
                " over"
            ) from error
        # TensorStore's way to say that the disk refused.
        raise InputError(
            f"{partial}: writing failed ({reason(error)}); free some space and run the same"
            " command again"
        ) from error
    dtype = folder.as_dtype(job.identity["dtype"])
    folder.copy_side_files(job.source.folder, model, dtype, job.config)
    return resumed, known


def _prepare(
    src: str | os.PathLike[str],
    dtype: np.dtype | None,
    adapter: str | os.PathLike[str] | None = None,
    quantize: str | None = None,
    gone: Mapping[str, sources.Gone] | None = None,
) -> Conversion:
    source, model = folder.open_checkpoint(src, once=True, gone=gone)
    slots = table.slots(model)
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    match = table.match(slots, shapes, str(source.folder))
    dtypes = folder.leaf_dtypes(source, slots, match, dtype)
    folder.check_duplicates(source, match)
    identity = identity_of(source, dtype)
    added = None if adapter is None else open_adapter(adapter, model)
    if added:
        identity["adapter"] = added.fingerprint
    form = None
    if quantize:
        form = few_bits.FewBits.of(quantize, dtypes[few_bits.EMBEDDING].name)
        identity["quantize"] = form.identity
    specs = param_specs(model)
    return Conversion(source, slots, match, dtypes, specs, identity, adapter=added, quantized=form)


def identity_of(source: sources.Source, dtype: np.dtype | None) -> dict[str, Any]:
    """The identity of a conversion: its source's weights and other files, and its dtype."""
    beside = folder.side_files(source.folder)
    return {
        "weights": source.fingerprint(),
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in beside},
        "dtype": dtype.name if dtype else None,
        "layout": 2,
    }


def _finished(target: Path, job: Conversion) -> dict[str, Any] | None:
    """The report of a conversion that is there already.

    Raises:
      InputError: it is another conversion, or damaged.
    """
    path = target / folder.REPORT
    if not path.is_file():
        return None
    report = sources.read_json(path)
    there = report.get("identity") if isinstance(report, dict) else None
    mend = "delete it or choose another place"
    if not isinstance(there, dict) or "files" not in there:
        raise InputError(f"{target}: exists; {mend}: it doesn't say what it was made of")
    for key in job.identity | there:
        wanted = job.identity.get(key)
        if there.get(key) != wanted and key not in _STAMPS:
            what = key
            if isinstance(wanted, dict):
                old = there.get(key) or {}
                what = min(n for n in wanted | old if wanted.get(n) != old.get(n))
            raise InputError(f"{target}: exists; {mend}: it was made with another {what}")
    with progress(digests.nbytes(target), "B", "check") as tick:
        problems, _ = without_added(digests.check(target, tick=tick))
    if problems:
        raise InputError(f"{target}: is broken: {digests.told(problems)}; {mend}")
    if there != job.identity and (other := _other_weights(job, report)):
        raise InputError(f"{target}: exists; {mend}: it was made of other weights ({other})")
    return {key: value for key, value in report.items() if key not in _OWN}


def _other_weights(job: Conversion, report: dict[str, Any]) -> str | None:
    """A tensor that would be converted to other bytes than a report tells of; all are read."""
    with progress(sum(map(job.nbytes, job.slots)), "B", "compare") as tick:
        digest = hashlib.sha256()
        for piece in job.pieces(set()):
            digest.update(piece.values.reshape(-1).view(np.uint8).data)
            tick(piece.values.nbytes)
            if piece.last:
                if report["sha256"].get(piece.name) != digest.hexdigest():
                    return piece.name
                digest = hashlib.sha256()
    return None


def _drop_leftover(partial: Path, identity: dict[str, Any]) -> None:
    """Removes the work folder that a kill after the final rename left."""
    if (partial / JOURNAL).is_file():
        with contextlib.suppress(InputError), Journal(partial / JOURNAL, identity) as journal:
            journal.discard()


def _report(job: Conversion, resumed: int, seconds: float) -> dict[str, Any]:
    form = job.quantized
    few = {path for path in job.dtypes if job.form(path)}
    names = {dtype.name for path, dtype in job.dtypes.items() if path not in few}
    in_few = sum(job.nbytes(slot.name) for slot in job.slots.values() if slot.path in few)
    quantized = {"quantized": {form.kind: in_few}, "quantize": form.stated} if form else {}
    return {
        "tensors": len(job.slots),
        "bytes": sum(map(job.nbytes, job.slots)),
        "seconds": round(seconds, 3),
        "peak_rss_bytes": folder.peak_rss_bytes(),
        "missing": [],
        "unexpected": [],
        "ignored": job.match.ignored,
        "duplicates": job.match.duplicates,
        "dtype": "+".join(sorted(names | ({form.kind} if form else set()))),
        "resumed": resumed,
        **({"deleted": sorted(job.source.gone)} if job.source.gone else {}),
        **({"dequantized": job.source.quantized} if job.source.quantized else {}),
        **quantized,
    }


def _write_params(
    job: Conversion, target: Path, journal: Journal, used: shards.Shards | None
) -> tuple[int, dict[str, str]]:
    """Streams every tensor that the journal lacks, in the order of the source's files. Returns how
    many it had, and digests of files by name in the model folder."""
    writer = store.Writer(target, job.arrays())
    whole = functools.partial(_is_whole, job, writer, journal)
    _forget_damaged(job, whole, journal)
    if used:
        used.delete_used(whole)
    resumed = len(journal.done)
    pending: deque[_Chunk] = deque()
    chunks: dict[str, list[str]] = {}
    in_flight = unseen = 0

    def settle(tick: Callable[[int], object]) -> int:
        nonlocal unseen
        chunk = pending.popleft()
        chunk.written.result()
        chunk.hashed.result()
        chunks.setdefault(chunk.name, []).append(chunk.own.result())
        if chunk.last:
            journal.add(chunk.name, " ".join([chunk.digest.hexdigest(), *chunks.pop(chunk.name)]))
            if used:
                used.delete_used(whole, chunk.name)
        tick(chunk.nbytes)
        unseen += chunk.nbytes
        if unseen > 2 * _IN_FLIGHT_BYTES:  # so all that was on its way at the last look is written
            files.look()
            unseen = 0
        return chunk.nbytes

    total = sum(map(job.nbytes, job.slots))
    try:
        # One thread each: a tensor's pieces are hashed in order.
        with (
            progress(total, "B", "convert") as tick,
            ThreadPoolExecutor(1) as hasher,
            ThreadPoolExecutor(1) as other,
            ThreadPoolExecutor(1) as third,
        ):
            files = DataFiles(target, third)
            tick(sum(map(job.nbytes, journal.done)))
            for chunk in _chunks(job, writer, hasher, other, set(journal.done)):
                pending.append(chunk)
                in_flight += chunk.nbytes
                while in_flight > _IN_FLIGHT_BYTES:
                    in_flight -= settle(tick)
            while pending:
                settle(tick)
    finally:
        # After an error: nobody may write into a folder that is being given up.
        for chunk in pending:
            chunk.written.exception()
    writer.finish()
    return resumed, files.digests(target.parent)


def _is_whole(job: Conversion, writer: store.Writer, journal: Journal, name: str) -> bool:
    """Whether a tensor is on the disk as the journal says. Raises LostChunksError where it can't be
    read."""
    found = [digests.of_array(writer.read(*part)) for part in job.parts(name)]
    return found == journal.done[name].split(" ")[1:]


def _forget_damaged(job: Conversion, whole: Callable[[str], bool], journal: Journal) -> None:
    """Compares what the journal says is written with its digests; what differs is done again.

    Raises:
      LostChunksError: it can't be read.
    """

    def damaged(name: str) -> bool:
        bad = not whole(name)
        tick(job.nbytes(name))
        return bad

    names = list(journal.done)
    total = sum(map(job.nbytes, names))
    with progress(total, "B", "check") as tick, ThreadPoolExecutor(_CHECKERS) as pool:
        for name, bad in zip(names, pool.map(damaged, names), strict=True):
            if bad:
                del journal.done[name]
    if lost := len(names) - len(journal.done):
        print(
            f"echovlm: {lost} tensors changed on the disk since they were written; they are"
            " converted again",
            file=sys.stderr,
        )


@dataclass(frozen=True)
class _Chunk:
    """A piece of a tensor on its way: being written and being hashed."""

    name: str
    nbytes: int
    written: Any
    hashed: Future[None]
    own: Future[str]
    digest: Any
    last: bool


def _chunks(
    job: Conversion,
    writer: store.Writer,
    hasher: ThreadPoolExecutor,
    other: ThreadPoolExecutor,
    done: set[str],
) -> Iterator[_Chunk]:
    digest = hashlib.sha256()
    for name, array, index, values, last in job.pieces(done):
        hashed = hasher.submit(digest.update, values.reshape(-1).view(np.uint8).data)
        own = other.submit(digests.of_array, values)
        written = writer.write(array, index, values)
        yield _Chunk(name, values.nbytes, written, hashed, own, digest, last)
        if last:
            digest = hashlib.sha256()
