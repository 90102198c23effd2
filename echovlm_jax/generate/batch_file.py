"""A file of prompts answered to a file of answers."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from echovlm_jax.config import ModelConfig
from echovlm_jax.errors import InputError
from echovlm_jax.generate.prompts import Inputs, check_new_tokens
from echovlm_jax.ops.sampling import SamplingOptions
from echovlm_jax.processing.files import allowed_links, locate, shown
from echovlm_jax.processing.volumes import picture_files
from echovlm_jax.progress import progress
from echovlm_jax.storage import digests
from echovlm_jax.storage.files import Lines, as_path, local_path
from echovlm_jax.storage.lock import Lock

# What an answer without sampling doesn't depend on.
_SAMPLED = ("temperature", "top_k", "top_p", "seed")


class Answerer(Protocol):
    """What `generate_file` asks of a model; `load.Model` is one."""

    config: ModelConfig

    @property
    def fingerprint(self) -> Any: ...  # a text

    @property
    def processor(self) -> Any: ...

    def prepare(
        self, images: Any, prompt: str, *, system: str | None = None, max_new_tokens: int
    ) -> Inputs: ...

    def answer_each(
        self, asked: Iterable[tuple[int, Inputs]], *, slots: int, **sampling: Any
    ) -> Iterator[tuple[int, dict[str, Any]]]: ...


def generate_file(
    model: Answerer,
    batch: str | Path,
    out: str | Path,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 512,
    allow_links: Path | None = None,
    **sampling: Any,
) -> dict[str, int]:
    """Answers the records of a file, several at a time; the same call resumes a stopped one.

    A line of `batch` is `{"id", "images", "prompt"}`, and optionally `"system"`; the paths of its
    images are relative to the file's own folder, or absolute, and may not leave it. A line of `out`
    is
    `{"id", "text", "prompt_tokens", "new_tokens", "fingerprint"}`, or `{"id", "error",
    "fingerprint"}` for a record that can't be used; the others are answered (the id of an
    unreadable line n is "line n"). Lines are written as answers end, and the next record takes the
    place of one that did. Records whose id
    `out` already has are skipped, failed ones too: delete their lines to try again. A line's
    fingerprint is of the model, the prompts, the images' bytes and the settings: if one differs
    from what is asked now, nothing is written. Only one process can write into `out`.

    Args:
      model: the model that answers.
      batch: the records.
      out: the file of answers, new or resumed.
      batch_size: records answered at a time.
      max_new_tokens: limit of each answer.
      allow_links: a folder that links in the file's own may lead to.
      **sampling: fields of `SamplingOptions`. A record's draws depend on its line number and
        not on which others share its batch.

    Returns:
      `done` and `failed`: how many of the file's records `out` now answers, and how many of
      them failed.

    Raises:
      InputError: a file can't be used as such, two records have one id, a setting is wrong, or
        `out` holds answers to something else.
    """
    batch, out = local_path(batch), as_path(out)
    _ = model.processor  # made now: a folder without tokenizer files is not the records' fault
    # A wrong setting is refused before anything is written, and not once a record.
    check_new_tokens(model.config, max_new_tokens)
    settings = {**asdict(SamplingOptions(**sampling)), "max_new_tokens": max_new_tokens}
    records = _read_records(batch)
    if out.exists() and out.samefile(batch):
        raise InputError(f"{shown(out)}: --out must be another file than --batch")
    # Its folder as it is named: the file itself may be a link, as in a cache of downloads.
    folders = [Path(os.path.abspath(batch)).parent.resolve(), *allowed_links(allow_links)]
    asked = _Asked(model.fingerprint, folders, settings)
    Lines(out).close()  # there has to be something to hold
    with Lock(out) as lock, _none_if_empty(out):
        written, size = _read_answers(out)
        counts = {"done": 0, "failed": 0}
        for row, record in enumerate(records):
            if line := written.get(str(record["id"])):
                _check_asked(out, line, record, row, asked)
                counts["failed" if "error" in line else "done"] += 1
        todo = [
            (row, record) for row, record in enumerate(records) if str(record["id"]) not in written
        ]
        # By the file and not by what is left: a run that was stopped goes on as it began.
        sampling |= {"slots": min(batch_size, len(records)), "max_new_tokens": max_new_tokens}
        with Lines(out, size) as file:

            def write(line: str) -> None:
                lock.check()
                file.write(line)

            _answer(model, write, todo, asked, counts, sampling)
    return counts


@contextlib.contextmanager
def _none_if_empty(out: Path) -> Iterator[None]:
    """After an error, takes away the file that was made to be held."""
    try:
        yield
    except BaseException:
        if out.is_file() and not out.read_bytes():
            out.unlink()
        raise


def _answer(
    model: Answerer,
    send: Callable[[str], object],
    todo: Sequence[tuple[int, dict[str, Any]]],
    asked: "_Asked",
    counts: dict[str, int],
    settings: Mapping[str, Any],
) -> None:
    """Sends the answers of the records in `todo`, each with its row; counts them."""
    begun: dict[int, dict[str, Any]] = {}  # row -> what its line says beside the answer
    with progress(len(todo), "record", "answer") as tick:

        def write(line: dict[str, Any]) -> None:
            send(json.dumps(line, ensure_ascii=False) + "\n")
            counts["failed" if "error" in line else "done"] += 1
            tick(1)

        def prompts() -> Iterator[tuple[int, Inputs]]:
            for row, record in todo:
                try:
                    images, prompt, system = _read_record(record, asked.folders)
                    new = settings["max_new_tokens"]
                    inputs = model.prepare(images, prompt, system=system, max_new_tokens=new)
                    begun[row] = {"id": record["id"], "fingerprint": asked.of(record, row)}
                except InputError as error:
                    line = {"id": record["id"], "error": " ".join(str(error).split())}
                    write(line | {"fingerprint": asked.of(record, row, failed=True)})
                else:
                    yield row, inputs

        for row, answer in model.answer_each(prompts(), **settings):
            own = begun.pop(row)
            said = {key: answer[key] for key in ("text", "prompt_tokens", "new_tokens")}
            write({"id": own["id"], **said, "fingerprint": own["fingerprint"]})


class _Asked:
    """What decides the answers: each record's goes into its line, as a digest.

    Args:
      model: its fingerprint.
      folders: the folder that images are in, and those that links in it may lead to.
      settings: of the sampling.
    """

    def __init__(self, model: str, folders: Sequence[Path], settings: Mapping[str, Any]) -> None:
        self.folders, self._model = folders, model
        self._sampled = bool(settings["temperature"])
        unused = () if self._sampled else _SAMPLED
        self._settings = {key: value for key, value in settings.items() if key not in unused}

    def of(self, record: Mapping[str, Any], row: int, *, failed: bool = False) -> str:
        """The digest; of a record that `failed`, without what its images hold.

        Raises:
          InputError: the record, or one of its images, can't be read.
        """
        if failed:
            return digests.of_json([self._model, record, self._settings])
        images, prompt, system = _read_record(record, self.folders)
        try:
            pictures = [digests.of_file(file) for image in images for file in picture_files(image)]
        except OSError as error:
            raise InputError(f"image {error.filename}: can't be read ({error.strerror})") from None
        # Where something is drawn, the draw goes by the row.
        own = [prompt, system, pictures, row if self._sampled else None]
        return digests.of_json([self._model, own, self._settings])


def _check_asked(
    out: Path, line: Mapping[str, Any], record: Mapping[str, Any], row: int, asked: "_Asked"
) -> None:
    """Raises InputError where a line answers something else than what is asked now."""
    try:
        if line.get("fingerprint") == asked.of(record, row, failed="error" in line):
            return
        why = "is the answer of another model, or to another prompt, image or setting"
    except InputError as error:
        why = f"can't be compared with what is asked: {' '.join(str(error).split())}"
    if "fingerprint" not in line:
        why = "doesn't say what it answers (it has no fingerprint)"
    raise InputError(f"{shown(out)}: the line of {line['id']!r} {why}; name another file")


def _read_lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{shown(path)}: can't be read ({error.strerror})") from None


def _read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a batch file, each with an id; what else they hold is looked at later."""
    records: dict[str, dict[str, Any]] = {}  # 1 and "1" are one id, as `score` pairs them
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or type(record.get("id")) not in (str, int):
            record = {"id": f"line {number}", "broken": True}
        name = str(record["id"])
        if name in records:
            raise InputError(
                f"{shown(path)}: line {number}: id {name!r} is there twice; rename one"
            )
        records[name] = record
    return list(records.values())


def _read_record(
    record: Mapping[str, Any], folders: Sequence[Path]
) -> tuple[list[Path], str, str | None]:
    """Images, prompt and system prompt. Raises InputError."""
    if record.get("broken"):
        raise InputError('is not a JSON object with an "id"')
    images, prompt, system = record.get("images"), record.get("prompt"), record.get("system")
    if isinstance(images, str):
        images = [images]
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise InputError('"images" must be a list of paths; [] for none')
    if not isinstance(prompt, str) or not isinstance(system, str | None):
        raise InputError('"prompt" must be a text, and so must "system" where it is given')
    paths: list[Path] = []
    for image in images:
        try:
            paths.append(locate(image, *folders))
        except InputError as error:
            raise InputError(f"image {error}") from None
    return paths, prompt, system


def _read_answers(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The lines of an output file by id, and their size without a half-written last one."""
    *lines, rest = _read_lines(path)
    out: dict[str, dict[str, Any]] = {}
    try:
        for line in lines:
            record = json.loads(line)
            out[str(record["id"])] = record | {}
        begun = b'{"id": '
        if not (rest.startswith(begun) or begun.startswith(rest)):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{shown(path)}: exists, and holds no answers to go on from") from None
    return out, sum(len(line) + 1 for line in lines)
