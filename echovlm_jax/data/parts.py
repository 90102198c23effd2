"""The work of `data build`, cut into parts: a part makes one shard, in whatever process it runs.

A part finds all it needs in the work folder: a job is just a number. What it writes there
is the same whoever writes it, and appears under its name only when it is complete: a part may be
killed, run again, or run twice at once.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from echovlm_jax.data import folder
from echovlm_jax.data.disk import write_error
from echovlm_jax.data.groups import SPLITS
from echovlm_jax.data.media import read_medium
from echovlm_jax.data.official import inside, read_record, record_id
from echovlm_jax.data.quarantine import Refused
from echovlm_jax.data.record import Record
from echovlm_jax.data.sources import ROW, changed, read_rows
from echovlm_jax.data.survey import pictures_digest
from echovlm_jax.processing.files import shown

PLAN, ROWS = "plan.json", "rows.bin"
ENDINGS = ("array_record", "jsonl", "quarantine", "json")
MAX_FRAMES = 4096  # of all media of an exam together
MAX_EXAM_BYTES = 2**30  # protocol buffers end at 2 GiB
_WRITER = "group_size:1,uncompressed"  # random access; pictures don't shrink again


class Part(NamedTuple):
    """Records start … stop of the rows, all of one split. `key` is a digest of all that its result
    depends on: the records, their pictures and the options."""

    number: int
    split: str
    start: int
    stop: int
    key: str

    def name(self, ending: str) -> str:
        return f"part-{self.number:05d}-{self.key}.{ending}"


class Done(NamedTuple):
    """What became of a part."""

    part: Part
    organs: dict[str, int]  # records kept
    bytes: int  # of the shard
    quarantined: dict[str, int]
    notes: dict[str, int]  # pictures of which there is something to say: see `media.NOTES`


def cut(rows: np.ndarray, records: int, key: str) -> list[Part]:
    """The parts of rows that are sorted by split: at most `records` each. `key` is of what all of
    them depend on."""
    parts: list[Part] = []
    for n, split in enumerate(SPLITS):
        start, stop = np.searchsorted(rows["split"], [n, n + 1])
        for first in range(int(start), int(stop), records):
            last = min(first + records, int(stop))
            digest = hashlib.blake2b(rows[first:last].tobytes(), digest_size=16, key=key.encode())
            parts.append(Part(len(parts), split, first, last, digest.hexdigest()))
    return parts


def write_part(work: str, number: int) -> int:
    """Makes part `number` of the work folder, unless it is there. Returns its count of records."""
    plan = _plan(work)
    part = Part(*plan["parts"][number])
    if read_done(Path(work), part) is None:
        _write(Path(work), plan, part)
    return part.stop - part.start


def check_part(work: str, number: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """What would be quarantined of part `number`, and the notes on the rest; writes nothing."""
    plan = _plan(work)
    part = Part(*plan["parts"][number])
    left_out, notes = [], Counter[str]()
    for result in _results(Path(work), plan, part):
        if isinstance(result, dict):
            left_out.append(result)
        else:
            notes.update(result[2])
    return left_out, dict(notes)


def read_done(work: Path, part: Part) -> Done | None:
    """What became of a part; None where it isn't done, or a file of it is gone."""
    try:
        found = json.loads((work / part.name("json")).read_bytes())
        sizes = {ending: (work / part.name(ending)).stat().st_size for ending in ENDINGS}
        if sizes["array_record"] != found["bytes"]:
            return None
        return Done(part, found["organs"], found["bytes"], found["quarantined"], found["notes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plan(work: str) -> dict[str, Any]:
    path = Path(work) / PLAN
    return _read_plan(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _read_plan(path: Path, written: int) -> dict[str, Any]:
    return json.loads(path.read_bytes())


def _write(work: Path, plan: dict[str, Any], part: Part) -> None:
    """The shard, its lines, its share of the quarantine; last of all the word that it is done."""
    serializer, features = _serializer()
    organs, quarantined, noted = Counter[str](), Counter[str](), Counter[str]()
    with (
        _shard(work / part.name("array_record")) as shard,
        _file(work / part.name("jsonl")) as lines,
        _file(work / part.name("quarantine")) as left_out,
    ):
        for result in _results(work, plan, part):
            if isinstance(result, dict):
                quarantined[result["reason"]] += 1
                left_out.write(_json_line(result))
                continue
            record, images, notes = result
            example = features.encode_example(folder.example_of(record, images))
            # serialize_example would leave the order of the keys, so the bytes, to chance.
            # until: tensorflow-datasets 4.10
            stored = serializer.get_tf_example(example).SerializeToString(deterministic=True)
            with _array_record_writes(work):
                shard.write(stored)
            lines.write(_json_line(folder.line_of(record, stored)))
            organs[record.organ] += 1
            noted.update(notes)
    done = {
        "organs": dict(sorted(organs.items())),
        "bytes": (work / part.name("array_record")).stat().st_size,
        "quarantined": dict(sorted(quarantined.items())),
        "notes": dict(sorted(noted.items())),
    }
    with _file(work / part.name("json")) as file:
        file.write(_json_line(done))


def _results(
    work: Path, plan: dict[str, Any], part: Part
) -> Iterator[tuple[Record, list[bytes], list[str]] | dict[str, Any]]:
    """Each row of a part: the record, its pictures and the notes on them, or its line in the
    quarantine."""
    rows = np.memmap(work / ROWS, ROW, mode="r")[part.start : part.stop]
    for row, ending, raw in read_rows(rows, plan["files"]):
        stem, number = plan["stems"][int(row["source"])], int(row["number"])
        id = record_id(raw, number) + ending
        try:
            if row["twice"]:
                raise Refused("duplicate id", f"an earlier record has the id {id}; rename one")
            group = str(row["group"]) if row["group"] >= 0 else ""
            yield _make(raw, plan, f"{stem}/{id}", stem, group, row["pictures"].tobytes())
        except Refused as refused:
            yield {
                "id": shown(id)[:500],
                "source": stem,
                "number": number,
                "reason": refused.reason,
                "detail": shown(refused.detail)[:500],
            }


def _make(
    raw: Any, plan: dict[str, Any], id: str, stem: str, group: str, pictures: bytes
) -> tuple[Record, list[bytes], list[str]]:
    """One record, with its pictures and the notes on them. Raises Refused."""
    root, links = Path(plan["images"]), [Path(folder) for folder in plan["links"]]
    record, paths = read_record(raw, id=id, organ=plan["organs"][stem], source=stem, group=group)
    files = [inside(root, path, *links) for path in paths]  # all, before any is read
    media, images, notes, size = [], [], [], 0
    for path, file in zip(paths, files, strict=True):
        try:
            encoded = read_medium(
                file,
                num_frames=plan["num_frames"],
                crop=plan["crop"],
                burned_in=plan["burned_in"],
            )
        except Refused as refused:  # as the record names it: the list may leave this machine
            detail = refused.detail.replace(shown(file), shown(path))
            raise Refused(refused.reason, detail) from None
        media.append(encoded.medium)
        images += encoded.images
        notes += encoded.notes
        size += sum(map(len, encoded.images))
        if len(images) > MAX_FRAMES:
            raise Refused("too many images", f"more than {MAX_FRAMES} frames in one exam")
        if size > MAX_EXAM_BYTES:
            raise Refused("image too large", f"an exam of more than {MAX_EXAM_BYTES} bytes")
    # After they were read: a picture that is replaced at any time is noticed.
    if pictures_digest(files) != pictures:
        raise changed(root)
    return dataclasses.replace(record, media=tuple(media)), images, notes


@functools.cache
def _serializer() -> tuple[Any, Any]:
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = folder.features()
    return ExampleSerializer(features.get_serialized_info()), features


@contextlib.contextmanager
def _shard(path: Path) -> Iterator[Any]:
    """An ArrayRecord writer; the file gets its name when it is whole and on the disk."""
    from array_record.python.array_record_module import ArrayRecordWriter

    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    writer = ArrayRecordWriter(str(temporary), _WRITER)
    try:
        yield writer
        with _array_record_writes(path):
            writer.close()
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if writer.is_open():
            with contextlib.suppress(RuntimeError):
                writer.close()
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _array_record_writes(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError:  # its only word for a full disk
        # until: array_record 0.9
        raise write_error(path) from None


@contextlib.contextmanager
def _file(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when it is whole and on the disk."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _json_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
