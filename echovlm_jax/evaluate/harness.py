"""A model over a split of a dataset: predictions beside references, and the tables made of them.

The work goes window by window of `batch_size` exams. A window's samples of one kind are a batch,
always the same one, whatever was done before; its lines are written when all its batches are there.
So a stopped run resumes to the same file, byte for byte.
"""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echovlm_jax.data.dataset import Dataset, open_dataset
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.answers import read_answer
from echovlm_jax.evaluate.folder import (
    BERTSCORE,
    FIGURES,
    PREDICTIONS,
    SETTINGS,
    with_bertscore,
)
from echovlm_jax.evaluate.samples import NO_LIMIT, Limits, Sample, inputs_of, make_samples
from echovlm_jax.evaluate.summary import KINDS, NO_BERTSCORE, summarise, undecided
from echovlm_jax.load import load_model
from echovlm_jax.processing.files import read_json_if_there, shown
from echovlm_jax.progress import progress as progress_bar
from echovlm_jax.storage.files import Lines, as_path, make_folder, write_json
from echovlm_jax.storage.layout import run_step, training_settings
from echovlm_jax.storage.lock import Lock

# A label, a letter or a word: what comes after so many tokens is no part of the answer.
SHORT = 64
_MEDIA_BYTES = 2**28  # of decoded images kept for an exam's other questions
_NAMES_ONLY = ("model", "data")  # settings that may differ: the fingerprints tell


@dataclass(frozen=True)
class EvalOptions:
    """What an evaluation's predictions depend on, besides the model and the data.

    Attributes:
      split: one of the dataset.
      tasks: some of "report", "diagnosis" and "vqa".
      limit: number of exams, from the first; None = all.
      images: "given"; "blind": none are shown; "swapped": those of an exam of another organ;
        "shuffled": those of another exam of the same organ, where it has one.
      seed: seed of wordings, languages, swaps and resamples.
      language: "zh" or "en" only; None = each exam's own, by seed where it has both.
      batch_size: exams asked about at a time.
      max_new_tokens: limit of a report; other answers end at SHORT tokens at the latest.
      max_image_patches: limit of an image, in place of the model's own; None = as its files say:
        of a training run, as in training.
      quantize: "int8", "int4" or "w8a8", see `load_model`; None = as stored.

    Raises:
      InputError: a number is below 1. The others are checked where they are used.
    """

    split: str = "test"
    tasks: Sequence[str] = KINDS
    limit: int | None = None
    images: str = "given"
    seed: int = 0
    language: str | None = None
    batch_size: int = 16
    max_new_tokens: int = 512
    max_image_patches: int | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_image_patches"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} must be at least 1, found {value}")


def evaluate(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    options: EvalOptions | None = None,
    *,
    bertscore: str | Path | None = None,
    report: bool = True,
    progress: Callable[[int, int], object] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Asks a model about every exam of a split and scores its answers; greedy decoding.

    `out` gets settings.json, predictions.jsonl (a line for each sample, in the order of the split),
    metrics.json and report.html. A call with the same settings resumes a stopped one.

    Args:
      model: a MODEL folder; of a training run, images get as large as they did in training.
      data: a dataset's folder, or "phantom".
      out: a new folder, or one that an evaluation with the same settings began.
      options: EvalOptions; None = all defaults.
      changes: fields of `options` that are to be others, by name.
      bertscore: a local folder of a BERT-like model, for BERTScore.
      report: whether to write report.html.
      progress: callback, with the numbers of samples done and of all samples.

    Returns:
      overall, by_organ, by_task, signature, reasons, as in metrics.json; n, failed (samples without
      a prediction, scored as empty: most often too long for a row), failed_by_task, first_failure
      (why), undecided (answers that say nothing to the question, counted as wrong), out, settings.

    Raises:
      InputError: the model or data can't be used, a setting is out of range, or `out` holds
        something else.
    """
    options = dataclasses.replace(options or EvalOptions(), **changes)
    out = as_path(out)
    dataset = open_dataset(data, options.split)
    exams = make_samples(
        dataset,
        kinds=options.tasks,
        limit=options.limit,
        images=options.images,
        seed=options.seed,
        language=options.language,
    )
    if not any(exams):
        tasks = ", ".join(options.tasks)
        raise InputError(f"{shown(data)}: split {options.split!r} has no text for {tasks}")
    loaded = load_model(model, quantize=options.quantize)
    limits = limits_of(loaded, as_path(model), options.max_new_tokens, options.max_image_patches)
    settings: dict[str, Any] = {
        **{"model": str(model), "model_fingerprint": loaded.fingerprint},
        **{"data": str(data), "data_fingerprint": dataset.fingerprint},
        **dataclasses.asdict(options),
        **{"tasks": list(options.tasks), "sampling": "greedy"},
        # A run's rows, which are not among its model's files: an export of it has the same
        # fingerprint, and answers exams that are too long for them.
        **{"seq_len": limits.seq_len, "max_patches": limits.max_patches},
    }
    if out.exists() and not out.is_dir():
        raise InputError(f"{shown(out)}: is a file; name a new folder")
    make_folder(out)
    with Lock(out) as lock:
        _begin(out, settings)
        lines = _predict(loaded, dataset, exams, out, options, limits, progress)
        lock.check()
        return _finish(out, lines, settings, bertscore, report)


def _predict(
    loaded: Any,
    dataset: Dataset,
    exams: Sequence[Sequence[Sample]],
    out: Path,
    options: EvalOptions,
    limits: Limits,
    progress: Callable[[int, int], object] | None,
) -> list[dict[str, Any]]:
    """All lines of predictions.jsonl, those that are missing made now."""
    size = min(options.batch_size, len(exams))
    windows = [exams[i : i + size] for i in range(0, len(exams), size)]
    lines, todo, written = _done(out / PREDICTIONS, windows)
    total = sum(len(exam) for exam in exams)
    read = _reader(dataset)
    with (
        Lines(out / PREDICTIONS, written) as file,
        progress_bar(total, "sample", "evaluate") as tick,
    ):
        tick(len(lines))
        for window in windows[todo:]:
            made = _answer(loaded, dataset, read, window, size, limits, options.max_new_tokens)
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in made))
            lines += made
            tick(len(made))
            if progress is not None:
                progress(len(lines), total)
    return lines


def _finish(
    out: Path,
    lines: list[dict[str, Any]],
    settings: dict[str, Any],
    bertscore: str | Path | None,
    report: bool,
) -> dict[str, Any]:
    """Writes the tables and the report of all predictions."""
    reasons, signed = {"bertscore": NO_BERTSCORE}, {}
    if bertscore is not None:
        from echovlm_jax.evaluate.bertscore import bertscore as score

        texts = [line for line in lines if line["kind"] == "report"]
        found, signed = score(
            [line["reference"] for line in texts],
            [line["prediction"] for line in texts],
            bertscore,
        )
        values = dict(zip((line["id"] for line in texts), found, strict=True))
        write_json(out / BERTSCORE, values)
        reasons = {}
    result = summarise(with_bertscore(lines, out), int(settings["seed"]), reasons)
    result["signature"] |= signed
    failed = [line for line in lines if "error" in line]
    result |= {"n": len(lines), "failed": len(failed), "settings": settings}
    result["undecided"] = undecided(lines)
    result["failed_by_task"] = dict(Counter(line["task"] for line in failed))
    result["first_failure"] = failed[0]["error"] if failed else None
    write_json(out / FIGURES, result)
    if report:
        from echovlm_jax.evaluate.report import write_report

        write_report(out, title="Evaluation")
    return result | {"out": str(out)}


def _answer(
    model: Any,
    dataset: Dataset,
    read: Callable[[int], list[np.ndarray]],
    window: Sequence[Sequence[Sample]],
    size: int,
    limits: Limits,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """The lines of a window of exams, in order."""
    inputs: dict[str, Any] = {}
    texts: dict[str, str] = {}
    errors: dict[str, str] = {}
    samples = [sample for exam in window for sample in exam]
    for sample in samples:
        pixels = [] if sample.media is None else read(sample.media)
        record = None if sample.media is None else dataset.record(sample.media)
        try:
            inputs[sample.id] = inputs_of(model, sample, pixels, record, limits)
        except InputError as error:
            errors[sample.id] = " ".join(str(error).split())
    for kind in KINDS:
        batch = [s.id for s in samples if s.kind == kind and s.id in inputs]
        if not batch:
            continue
        new = max_new_tokens if kind == "report" else min(SHORT, max_new_tokens)
        # As many slots in every window: another number would be another program to compile.
        asked = enumerate(inputs[name] for name in batch)
        for number, answer in model.answer_each(asked, slots=size, max_new_tokens=new):
            texts[batch[number]] = answer["text"]
    return [_line(s, texts.get(s.id, ""), errors.get(s.id)) for s in samples]


def _line(sample: Sample, prediction: str, error: str | None) -> dict[str, Any]:
    extracted = correct = None
    if sample.answer is not None:
        extracted = read_answer(sample.task, prediction, sample.question, sample.labels)
        correct = extracted == sample.answer
    line: dict[str, Any] = {
        **{"id": sample.id, "record": sample.record, "organ": sample.organ},
        **{"task": sample.task, "kind": sample.kind, "language": sample.language},
        **{"question": sample.question, "reference": sample.reference, "prediction": prediction},
        **{"answer": sample.answer, "extracted": extracted, "correct": correct},
    }
    return line if error is None else line | {"error": error}


def limits_of(model: Any, folder: Path, new: int, max_image_patches: int | None) -> Limits:
    """How large exams may get: as in the training run that the folder is of, where it is one."""
    room = model.config.text.max_position_embeddings - new
    if room < 1:
        raise InputError(
            f"max_new_tokens {new} leaves no room for a prompt below this model's"
            f" max_position_embeddings {model.config.text.max_position_embeddings}"
        )
    step = run_step(folder)
    run = training_settings(*step) if step else {}
    of_run = run.get("max_image_patches", NO_LIMIT)
    return Limits(
        seq_len=min(room, int(run.get("seq_len", room))),
        max_patches=int(run.get("max_patches", NO_LIMIT)),
        max_image_patches=int(of_run if max_image_patches is None else max_image_patches),
    )


def _begin(out: Path, settings: Mapping[str, Any]) -> None:
    """Marks a new folder, or checks that it was begun with the same settings."""
    begun = read_json_if_there(out / SETTINGS)
    if begun is None:
        if any(out.iterdir()):
            raise InputError(f"{shown(out)}: is not empty and no evaluation's; name a new folder")
        write_json(out / SETTINGS, settings)
        return
    for key in {**settings, **begun}:
        if key not in _NAMES_ONLY and begun.get(key) != settings.get(key):
            raise InputError(
                f"{shown(out)}: was begun with {key} {begun.get(key)!r}, not"
                f" {settings.get(key)!r}; name a new folder"
            )


def _done(
    path: Path, windows: Sequence[Sequence[Sequence[Sample]]]
) -> tuple[list[dict[str, Any]], int, int]:
    """The lines of the windows that are whole, how many these are, and the lines' bytes."""
    if not path.exists():
        return [], 0, 0
    *whole, _ = path.read_bytes().split(b"\n")
    lines: list[dict[str, Any]] = []
    size = number = 0
    for window in windows:
        samples = [sample for exam in window for sample in exam]
        raw = whole[len(lines) : len(lines) + len(samples)]
        if len(raw) < len(samples):
            break
        lines += [_read_line(path, line, s) for line, s in zip(raw, samples, strict=True)]
        size += sum(len(line) + 1 for line in raw)
        number += 1
    return lines, number, size


def _read_line(path: Path, raw: bytes, sample: Sample) -> dict[str, Any]:
    try:
        line = json.loads(raw)
        said = line["prediction"]
        # Read anew: another version of this program may take the same words for another answer.
        if isinstance(said, str) and line == _line(sample, said, line.get("error")):
            return line
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise InputError(
        f"{shown(path)}: its line of {shown(sample.id)} is not what this evaluation would write of"
        " its prediction: it was changed, or other rules read it; name a new folder"
    )


def _reader(dataset: Dataset) -> Callable[[int], list[np.ndarray]]:
    """`dataset.media`, the last exams' kept: their other questions come soon."""
    kept: dict[int, list[np.ndarray]] = {}

    def read(number: int) -> list[np.ndarray]:
        if number not in kept:
            if sum(pixels.nbytes for media in kept.values() for pixels in media) > _MEDIA_BYTES:
                kept.clear()
            kept[number] = dataset.media(number)
        return kept[number]

    return functools.wraps(dataset.media)(read)
