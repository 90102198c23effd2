"""`data build` and `data validate`: official JSON and image files to a dataset's folder.

Works in OUT.partial beside the target, part by part, and renames at the end. The same call
resumes after a kill: complete parts are kept, unless they were made of other records, pictures or
options, or left records out (the reason may have been mended since).
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from echovlm_jax.data import dealing, folder, organs, parts, survey
from echovlm_jax.data.dealing import Runner
from echovlm_jax.data.disk import writing
from echovlm_jax.data.groups import SPLITS
from echovlm_jax.data.media import NOTES
from echovlm_jax.data.parts import Done, Part
from echovlm_jax.data.sources import Sources, changed, compile_pattern, digest_of, read_sources
from echovlm_jax.errors import InputError
from echovlm_jax.processing.burned_in import Choice, engine
from echovlm_jax.processing.dicom import Crop
from echovlm_jax.processing.files import allowed_links, shown
from echovlm_jax.progress import progress
from echovlm_jax.storage.files import remove
from echovlm_jax.storage.lock import Lock

LOCK, MADE = "lock", "dataset"
SHARD_RECORDS = 256  # at least: see `dealing.MAX_SHARDS`
_EXAMPLES = 20  # quarantined records that `validate` shows


class Options(NamedTuple):
    """The settings that the result depends on, besides the files.

    Attributes:
      validation, test: the shares of the groups that go to these splits.
      num_frames: a loop is sampled to so many frames.
      crop: crops of DICOM frames to their ultrasound regions; "require" leaves out the others.
      organs: a file {source: organ}, for records that don't say their own.
      group_pattern: a regular expression whose first group names the patient, in a record's id or
        else in its images' paths.
      allow_links: a folder that links among the images may lead to.
      burned_in: treatment of text in the pixels, "report", "mask" or "refuse"; None: only headers
        and what is drawn outside the ultrasound regions are counted.
    """

    validation: float = 0.05
    test: float = 0.05
    num_frames: int = 16
    crop: Crop = False
    organs: Path | None = None
    group_pattern: str | None = None
    allow_links: Path | None = None
    burned_in: Choice | None = None


DEFAULTS = Options()


def build(
    sources: Sequence[str | Path],
    images: str | Path,
    out: str | Path,
    options: Options = DEFAULTS,
    *,
    workers: int = 1,
    runner: Runner | None = None,
) -> dict[str, Any]:
    """Makes a dataset's folder.

    Args:
      sources: official JSON files.
      images: the folder that the records' image paths are relative to, and don't leave.
      out: the folder to make; it must not exist.
      workers: processes.
      runner: another place for the parts (see `beam.py`), instead of `workers`.

    Returns:
      records, kept, quarantined {reason: count}: records = kept + the sum of the counts; splits
      and organs {name: records kept}, bytes, out; groups, ungrouped, unnamed, largest_group as
      `groups.group` counts them; near_duplicates, as there; a count of pictures for each of
      `media.NOTES`; ignored_keys {key: entries that have it}, what records say and nobody reads;
      warnings, lines for people.

    Raises:
      InputError: a source is no JSON list, a folder is missing, OUT exists, or nothing was kept.
    """
    target = Path(os.path.abspath(out))
    _check_new(target)
    salt, shares = survey.new_salt(), (options.validation, options.test)
    found, plan = _prepare(sources, images, options, salt)
    work = target.with_name(f"{target.name}.partial")
    run = runner or (lambda *job: in_processes(*job, workers=workers))
    needed = [len(found.rows) * survey.LOOK.itemsize]  # bytes, at least
    with _work_folder(work), writing(work, lambda: _still_needed(work, needed[0])):
        counts, needed[0] = dealing.deal(work, found, plan, shares, salt, run, SHARD_RECORDS)
        _drop_useless(work, plan)
        with progress(len(found.rows), "record", "build") as tick:
            for count in run(parts.write_part, str(work), range(len(plan["parts"]))):
                tick(count)
        result = _finish(work, plan, counts) | {"ignored_keys": found.ignored}
        for path, digest in zip(found.files, found.digests, strict=True):
            if digest_of(path) != digest:
                raise changed(path)
        _check_new(target)
        os.replace(work / MADE, target)
        _sync(target.parent)
        _discard(work)
    return {**result, "out": str(target), "warnings": dealing.warnings(result, found)}


def validate(
    sources: Sequence[str | Path],
    images: str | Path,
    options: Options = DEFAULTS,
    *,
    workers: int = 1,
) -> dict[str, Any]:
    """What `build` would keep and leave out, without writing a dataset.

    Returns:
      records, kept, quarantined, groups and so on to warnings as `build`; examples, the first
      records left out; ok, whether none is.
    """
    salt, shares = survey.new_salt(), (options.validation, options.test)
    found, plan = _prepare(sources, images, options, salt)
    counts, notes, examples = Counter[str](), Counter[str](), []
    with tempfile.TemporaryDirectory() as temporary, writing(Path(temporary)):
        work = Path(temporary)
        run = lambda *job: in_processes(*job, workers=workers)  # noqa: E731
        grouped, _ = dealing.deal(work, found, plan, shares, salt, run, SHARD_RECORDS)
        numbers = range(len(plan["parts"]))
        with progress(len(numbers), "part", "validate") as tick:
            for lines, noted in in_processes(parts.check_part, temporary, numbers, workers=workers):
                notes.update(noted)
                counts.update(line["reason"] for line in lines)
                examples = sorted(examples + lines, key=itemgetter("source", "number"))[:_EXAMPLES]
                tick(1)
    return {
        "ok": not counts,
        "records": len(found.rows),
        "kept": len(found.rows) - counts.total(),
        "quarantined": dict(sorted(counts.items())),
        **grouped,
        **_noted(notes, counts, options.burned_in),
        "ignored_keys": found.ignored,
        "examples": examples,
        "warnings": dealing.warnings({"records": len(found.rows), **grouped}, found),
    }


def in_processes(
    job: Callable[[str, int], Any], work: str, numbers: Sequence[int], *, workers: int
) -> Iterator[Any]:
    """Runs the parts in processes of their own, or in this one where that would not pay."""
    workers = min(workers, len(numbers))
    if workers <= 1:
        yield from (job(work, number) for number in numbers)
        return
    # Fresh interpreters: a fork would copy whatever threads this process has.
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_end_with_parent
    ) as pool:
        running = {pool.submit(job, work, number): number for number in numbers}
        try:
            for future in as_completed(running):
                yield future.result()
        except BrokenProcessPool:
            raise InputError(
                f"{shown(work)}: a process died while it read images (killed, or out of memory);"
                " run the same command again, with fewer --workers if memory was short"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone: killed, it could not say so."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _prepare(
    sources: Sequence[str | Path], images: str | Path, options: Options, salt: bytes
) -> tuple[Sources, dict[str, Any]]:
    """The rows, and the plan: all that the jobs need to know, but the parts."""
    root = Path(images).resolve()
    if not root.is_dir():
        raise InputError(f"{shown(images)}: no such folder; give the one that image paths begin in")
    if options.num_frames < 1:
        raise InputError(f"num_frames must be at least 1, found {options.num_frames}")
    validation, test = options.validation, options.test
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise InputError("the shares of validation and test must be at least 0, together below 1")
    pattern = compile_pattern(options.group_pattern) if options.group_pattern is not None else None
    found = read_sources([Path(path) for path in sources], pattern=pattern, salt=salt)
    given = organs.read_mapping(options.organs, found.stems) if options.organs else {}
    plan = {
        "version": folder.VERSION,
        "files": [str(path) for path in found.files],
        "digests": list(found.digests),
        "stems": list(found.stems),
        "images": str(root),
        "links": [str(folder) for folder in allowed_links(options.allow_links)],
        "organs": {stem: given.get(stem) or organs.organ_of_file(stem) for stem in found.stems},
        "num_frames": options.num_frames,
        "crop": options.crop,
        "burned_in": options.burned_in,
        "ocr": engine() if options.burned_in else None,  # another one finds other text
        "options": json.loads(json.dumps(options._asdict(), default=str)),
    }
    plan["key"] = folder.digest(json.dumps(plan, sort_keys=True).encode())
    return found, plan


def _still_needed(work: Path, total: int) -> int:
    """About how many bytes: of the parts that are not made yet, and of all lines once more."""
    made, lines = (
        sum(path.stat().st_size for path in work.glob(f"part-*{ending}"))
        for ending in ("", ".jsonl")
    )
    return max(total - made, 0) + lines


def _finish(work: Path, plan: dict[str, Any], counts: dict[str, Any]) -> dict[str, Any]:
    """The parts put together, in work/dataset."""
    made = work / MADE
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    done = [_done(work, Part(*part)) for part in plan["parts"]]
    kept, quarantined, notes = Counter[str](), Counter[str](), Counter[str]()
    for each in done:
        notes.update(each.notes)
        kept.update(each.organs)
        quarantined.update(each.quarantined)
    records = Part(*plan["parts"][-1]).stop
    if kept.total() + quarantined.total() != records:
        raise AssertionError("the parts don't add up to the input")
    if not kept:
        _discard(work)  # nothing in it is worth going on with
        reasons = ", ".join(f"{count} {reason}" for reason, count in quarantined.most_common())
        raise InputError(
            f"{shown(plan['images'])}: no record could be kept ({reasons}); `data validate` says"
            " which and why"
        )
    names = sorted(kept)
    splits = {}
    for split in SPLITS:
        shards = [each for each in done if each.part.split == split and each.organs]
        if shards:
            splits[split] = _finish_split(work, made, split, shards, names)
    _join([work / each.part.name("quarantine") for each in done], made / folder.QUARANTINE)
    result = {
        "records": records,
        "kept": kept.total(),
        "quarantined": dict(sorted(quarantined.items())),
        "splits": {split: len_of(entry) for split, entry in splits.items()},
        "organs": dict(sorted(kept.items())),
        "bytes": sum(shard["bytes"] for entry in splits.values() for shard in entry["shards"]),
        **counts,
        **_noted(notes, quarantined, plan["burned_in"]),
    }
    manifest = {"version": folder.VERSION, "organs": names, "splits": splits, "counts": result}
    manifest["num_frames"] = plan["num_frames"]
    (made / folder.MANIFEST).write_bytes(folder.manifest_bytes(manifest))
    _write_tfds(made, splits)
    for path in made.iterdir():
        _sync(path)
    return result


def _noted(
    notes: Counter[str], quarantined: Counter[str], looked: Choice | None
) -> dict[str, int | None]:
    """Pictures by note; None of text that nobody looked for. What could not be cropped counts
    whether it was kept or left out."""
    counts: dict[str, int | None] = {name: notes[name] for name in NOTES}
    if looked is None:
        counts |= dict.fromkeys(("text_found", "text_unchecked", "masked"))
    return {**counts, "not_cropped": notes["not_cropped"] + quarantined["not cropped"]}


def len_of(entry: dict[str, Any]) -> int:
    """The records of a split, from its entry in the manifest."""
    return sum(shard["records"] for shard in entry["shards"])


def _done(work: Path, part: Part) -> Done:
    found = parts.read_done(work, part)
    if found is None:
        raise InputError(
            f"{shown(work)}: part {part.number} is missing; run the same command again"
        )
    return found


def _finish_split(
    work: Path, made: Path, split: str, shards: list[Done], names: list[str]
) -> dict[str, Any]:
    """Names the shards, joins their lines and writes the index; returns the manifest's entry."""
    lines = made / folder.records_name(split)
    _join([work / each.part.name("jsonl") for each in shards], lines)
    organ_of = {name: n for n, name in enumerate(names)}
    index = np.zeros(sum(sum(each.organs.values()) for each in shards) + 1, folder.INDEX)
    content, offset = hashlib.blake2b(digest_size=16), 0
    content.update(json.dumps([folder.VERSION, split, names], ensure_ascii=False).encode())
    with open(lines, "rb") as file:
        for n, line in enumerate(file):
            index[n] = (offset, zlib.crc32(line), organ_of[json.loads(line)["organ"]], 0)
            offset += len(line)
            content.update(line)
    index[-1]["offset"] = offset
    (made / folder.index_name(split)).write_bytes(index.tobytes())
    entries = []
    for n, each in enumerate(shards):
        name = folder.shard_name(split, n, len(shards))
        # A link, not a move: the parts stay until the end, and a kill here costs nothing.
        os.link(work / each.part.name("array_record"), made / name)
        entries.append({"name": name, "records": sum(each.organs.values()), "bytes": each.bytes})
    return {
        "fingerprint": content.hexdigest(),
        "index": folder.digest(index.tobytes()),
        "shards": entries,
    }


def _write_tfds(made: Path, splits: dict[str, Any]) -> None:
    """dataset_info.json and features.json, by TFDS itself."""
    from tensorflow_datasets.core import dataset_info, file_adapters, naming
    from tensorflow_datasets.core import splits as tfds_splits
    from tensorflow_datasets.core.utils.version import Version

    format = file_adapters.FileFormat.ARRAY_RECORD
    identity = dataset_info.DatasetIdentity(
        name=folder.NAME,
        version=Version(folder.VERSION),
        data_dir=str(made),
        module_name="echovlm_jax.data.build",
    )
    info = dataset_info.DatasetInfo(
        builder=identity,
        features=folder.features(),
        description="Ultrasound exams for EchoVLM: encoded pictures, conversations and reports.",
    )
    info.set_file_format(format)
    template = {"dataset_name": folder.NAME, "data_dir": made, "filetype_suffix": format.value}
    info.set_splits(
        tfds_splits.SplitDict(
            [
                tfds_splits.SplitInfo(
                    name=split,
                    shard_lengths=[shard["records"] for shard in entry["shards"]],
                    num_bytes=sum(shard["bytes"] for shard in entry["shards"]),
                    filename_template=naming.ShardedFileTemplate(split=split, **template),
                )
                for split, entry in splits.items()
            ]
        )
    )
    info.write_to_directory(made)


def _join(pieces: list[Path], whole: Path) -> None:
    with open(whole, "wb") as out:
        for piece in pieces:
            with open(piece, "rb") as file:
                shutil.copyfileobj(file, out, 2**20)


@contextlib.contextmanager
def _work_folder(work: Path) -> Iterator[None]:
    """The work folder, locked; an error that leaves nothing to resume removes it."""
    if work.is_symlink() or (work.exists() and not (work / LOCK).is_file()):
        raise InputError(
            f"{shown(work)}: is no unfinished work of ours, but its name is needed; move it away"
        )
    try:
        work.mkdir(parents=True, exist_ok=True)
        (work / LOCK).touch()  # there has to be something to hold
    except OSError as error:
        raise InputError(
            f"{shown(work)}: can't be made ({error.strerror}); choose another --out"
        ) from None
    with Lock(work / LOCK, name=work):
        yield


def _discard(work: Path) -> None:
    """Removes the work folder; its lock, which says that it is ours, last: a kill may come."""
    for path in work.iterdir():
        if path.name != LOCK:
            remove(path)
    shutil.rmtree(work)


def _drop_useless(work: Path, plan: dict[str, Any]) -> None:
    """Leaves only the parts that are of this plan and lost nothing."""
    names = set()
    for values in plan["parts"]:
        part = Part(*values)
        found = parts.read_done(work, part)
        if found is None or not found.quarantined:
            names.update(part.name(ending) for ending in parts.ENDINGS)
    for path in (*work.glob("part-*"), *work.glob("*.tmp")):
        if path.name not in names:
            path.unlink(missing_ok=True)


def _check_new(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise InputError(f"{shown(target)}: exists; choose another --out, or delete it first")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
