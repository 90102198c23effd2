"""A file of prompts answered to a file of answers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from echovlm_jax.config import ModelConfig
from echovlm_jax.errors import InputError
from echovlm_jax.generate.decode import Inputs, check_new_tokens
from echovlm_jax.ops.sampling import check_sampling
from echovlm_jax.processing.files import allowed_links, locate, shown
from echovlm_jax.progress import progress


class Model(Protocol):
    """What `generate_file` asks of a model; `load.Model` is one."""

    config: ModelConfig

    @property
    def processor(self) -> Any: ...

    def prepare(
        self, images: Any, prompt: str, *, system: str | None = None, max_new_tokens: int
    ) -> Inputs: ...

    def answer(self, inputs: Sequence[Inputs], **sampling: Any) -> list[dict[str, Any]]: ...


def generate_file(
    model: Model,
    batch: str | Path,
    out: str | Path,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 512,
    allow_links: Path | None = None,
    **sampling: Any,
) -> dict[str, int]:
    """Answers the records of a file, several at a time; a run that was stopped goes on.

    A line of `batch` is `{"id", "images", "prompt"}`, and optionally `"system"`; the paths of its
    images are relative to the file's own folder, or absolute, and may not leave it. A line of
    `out` is `{"id", "text", "prompt_tokens", "new_tokens"}`, or `{"id", "error"}` for a record that
    can't be used, while the others go on (an unreadable line n goes by the id "line n"). Lines are
    written as batches end. Records whose id `out` already has are left alone, failed ones too:
    delete their lines to try again.

    Args:
      model: answers.
      batch: the records.
      out: where the answers go; made or continued.
      batch_size: records answered at a time.
      max_new_tokens: for each answer.
      allow_links: a folder that links in the file's own may lead to.
      **sampling: as in `generate`. With a seed, a record's answer depends on its line number and
        not on which others share its batch.

    Returns:
      `done` and `failed`: how many of the file's records `out` now answers, and how many of
      them failed.

    Raises:
      InputError: a file can't be used as such, two records have one id, or a setting is wrong.
    """
    batch, out = Path(batch), Path(out)
    _ = model.processor  # made now: a folder without tokenizer files is not the records' fault
    # A wrong setting is refused before anything is written, and not once a record.
    check_new_tokens(model.config, max_new_tokens)
    check_sampling(**sampling)
    records = _read_records(batch)
    if out.exists() and out.samefile(batch):
        raise InputError(f"{shown(out)}: --out must be another file than --batch")
    written = _read_answers(out)
    counts = {"done": 0, "failed": 0}
    for record in records:
        if record["id"] in written:
            counts["failed" if written[record["id"]] else "done"] += 1
    todo = [(row, record) for row, record in enumerate(records) if record["id"] not in written]
    # Its folder as it is named: the file itself may be a link, as in a cache of downloads.
    folders = [Path(os.path.abspath(batch)).parent.resolve(), *allowed_links(allow_links)]
    ready: list[tuple[int, Any, Inputs]] = []
    full = False  # whether a program for batch_size rows exists already
    # An id may hold half of a surrogate pair: as JSON had it escaped, so it goes back.
    encoding: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
    with open(out, "a", **encoding) as file, progress(len(todo), "record", "answer") as tick:

        def write(answers: list[dict[str, Any]]) -> None:
            file.write("".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers))
            file.flush()
            counts["failed" if "error" in answers[0] else "done"] += len(answers)
            tick(len(answers))

        for last, (row, record) in _with_last(todo):
            try:
                images, prompt, system = _read_record(record, folders)
                inputs = model.prepare(images, prompt, system=system, max_new_tokens=max_new_tokens)
                ready.append((row, record["id"], inputs))
            except InputError as error:
                write([{"id": record["id"], "error": " ".join(str(error).split())}])
            if ready and (last or len(ready) == batch_size):
                full |= len(ready) == batch_size
                # The last few are filled up where that saves compiling for another batch size.
                rows = ready + ready[-1:] * (batch_size - len(ready) if full else 0)
                answers = model.answer(
                    [inputs for _, _, inputs in rows],
                    rows=[row for row, _, _ in rows],
                    max_new_tokens=max_new_tokens,
                    **sampling,
                )
                keys = ("text", "prompt_tokens", "new_tokens")
                write(
                    [
                        {"id": name} | {key: answer[key] for key in keys}
                        for (_, name, _), answer in zip(ready, answers, strict=False)
                    ]
                )
                ready = []
    return counts


def _with_last(items: Sequence[Any]) -> Iterator[tuple[bool, Any]]:
    return ((i == len(items) - 1, item) for i, item in enumerate(items))


def _read_lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{shown(path)}: can't be read ({error.strerror})") from None


def _read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a batch file, each with an id; what else they hold is looked at later."""
    records: dict[str | int, dict[str, Any]] = {}
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or type(record.get("id")) not in (str, int):
            record = {"id": f"line {number}", "broken": True}
        name = record["id"]
        if name in records:
            raise InputError(
                f"{shown(path)}: line {number}: id {name!r} is there twice; rename one"
            )
        records[name] = record
    return list(records.values())


def _read_record(
    record: Mapping[str, Any], folders: list[Path]
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


def _read_answers(path: Path) -> dict[str | int, bool]:
    """Which ids an output file has, and whether they failed; cuts off a half-written last line."""
    if not path.exists():
        return {}
    *lines, rest = _read_lines(path)
    out: dict[str | int, bool] = {}
    try:
        for line in lines:
            record = json.loads(line)
            out[record["id"]] = "error" in record
        begun = b'{"id": '
        if not (rest.startswith(begun) or begun.startswith(rest)):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{shown(path)}: exists, and holds no answers to go on from") from None
    if rest:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - len(rest))
    return out
