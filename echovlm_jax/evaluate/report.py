"""The HTML report of an evaluation: one file that needs nothing else, written from its folder."""

import base64
import datetime
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from echovlm_jax.data.dataset import Dataset, open_dataset
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.cases import Case, Chosen, choose, marked, thumbnails
from echovlm_jax.evaluate.figures import heatmaps, training
from echovlm_jax.evaluate.folder import FIGURES, PREDICTIONS, REPORT
from echovlm_jax.evaluate.results import (
    NAMES,
    attributes,
    chance,
    differences,
    headline,
    organ_figures,
    tables,
)
from echovlm_jax.evaluate.runs import json_lines, read_run
from echovlm_jax.processing.files import read_json, shown
from echovlm_jax.storage.files import as_path, write_text
from echovlm_jax.storage.layout import CHECKPOINTS

PAGE = Path(__file__).parent / "page"

IMAGE_NOTES = {
    "blind": "The model was shown no image: this is a control.",
    "swapped": "The model was shown the images of another organ's exam: this is a control.",
    "shuffled": "The model was shown the images of another exam of the organ: this is a control.",
}
_LONGEST = 4000  # characters of a text that is shown
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def write_report(
    out: Path,
    *,
    title: str,
    runs: Sequence[Path] = (),
    compared: Mapping[str, Path] | None = None,
    extra_cases: Sequence[Case] = (),
) -> Path:
    """Writes OUT/report.html, readable without a network; what there is nothing to say of is left
    out. The same folder gives the same page.

    Args:
      out: a folder that `evaluate` left: metrics.json, predictions.jsonl. Images come from the
        dataset that its settings name, where that can be read.
      runs: folders of training runs, in the order in which they went on from each other.
      compared: other evaluations by name, of the same samples: controls, other models.
      extra_cases: shown apart, with their notes.

    Returns:
      the path of the page.

    Raises:
      InputError: a file is missing or not what was written, another evaluation is of other samples,
        or the page can't be written.
    """
    out = as_path(out)
    others = {name: as_path(folder) for name, folder in (compared or {}).items()}
    content = {"title": title, "extra": [_extra(case) for case in extra_cases]}
    content |= _results(out, others) | _training([as_path(folder) for folder in runs])
    html = _environment().get_template(REPORT).render(content, **_page_parts())
    path = out / REPORT
    try:
        write_text(path, html)
    except OSError as error:
        raise InputError(f"{shown(path)}: can't be written ({error.strerror})") from None
    return path


def _results(out: Path, compared: Mapping[str, Path]) -> dict[str, Any]:
    """What the page says of the evaluation itself."""
    found, others = read_result(out), {n: read_result(path) for n, path in compared.items()}
    metrics, predictions, settings = (found[k] for k in ("metrics", "predictions", "settings"))
    dataset, why_no_images = _dataset(settings)
    chosen = choose(predictions)
    level = chance(predictions, dataset)
    reasons = metrics.get("reasons") or metrics["overall"].get("reasons") or {}
    return {
        "about": _about(out, settings, predictions),
        "control": IMAGE_NOTES.get(str(settings.get("images"))),
        "synthetic": _synthetic(dataset, chosen),
        "headline": headline(found, others, level),
        "series": ["this model", *others],
        "by_organ": organ_figures(found, others, level),
        "tables": tables(metrics),
        "facts": attributes(metrics),
        "differences": differences(out, compared),
        "cases": [_case(one, dataset) for one in chosen],
        "shown": (len({one.record for one in chosen}), len(_exams(predictions))),
        "organs": list(dict.fromkeys(one.organ for one in chosen)),
        "ranks": list(dict.fromkeys(one.rank for one in chosen)),
        "no_images": why_no_images,
        "signature": _flat(metrics.get("signature")),
        "settings": _flat(settings),
        "reasons": {NAMES.get(str(m), str(m)): str(why) for m, why in reasons.items()},
    }


def _training(folders: Sequence[Path]) -> dict[str, Any]:
    """What it says of the runs; the latest mixture of experts first."""
    runs = [read_run(folder) for folder in folders]
    return {
        "training": training(runs),
        "skipped": [(run.name, run.skipped) for run in runs if run.skipped],
        "heat": [(run.name, maps) for run in reversed(runs) if (maps := heatmaps(run))],
    }


def read_result(folder: Path) -> dict[str, Any]:
    """`metrics`, `settings` and `predictions` of an evaluation's folder.

    Raises:
      InputError: one is missing or of another form.
    """
    folder = as_path(folder)
    metrics = read_json(folder / FIGURES)
    for key in ("overall", "by_organ", "by_task"):
        if not isinstance(metrics.get(key), dict):
            raise InputError(f"{shown(folder / FIGURES)}: has no {key}; evaluate again")
    settings = metrics.get("settings")
    predictions = list(json_lines(folder / PREDICTIONS))
    wanted = {"record": int, "organ": str, "task": str, "kind": str}
    wanted |= {"reference": str, "prediction": str, "question": str}
    for number, line in enumerate(predictions, 1):
        for key, kind in wanted.items():
            if not isinstance(line.get(key), kind):
                raise InputError(
                    f"{shown(folder / PREDICTIONS)}: line {number} has no {key}; evaluate again"
                )
        for key in ("id", "language", "answer", "extracted", "correct", "error"):
            line.setdefault(key, None)
    return {
        "metrics": metrics,
        "settings": settings if isinstance(settings, dict) else {},
        "predictions": predictions,
    }


def _environment() -> jinja2.Environment:
    """Everything that is printed is escaped: predictions are whatever a model says."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        finalize=_printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "signed": _signed, "cut": _cut, "pc": _percent}
    return environment


def _printable(value: Any) -> Any:
    """Text that HTML and UTF-8 can hold: control characters and halves of pairs become U+FFFD."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return _UNPRINTABLE.sub("\ufffd", value)
    return value


def _page_parts() -> dict[str, str]:
    """The style and the script, and the policy under which a browser loads and runs nothing else,
    whatever a text may smuggle in."""
    style, script = ((PAGE / name).read_text("utf-8") for name in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    policy += f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return {"style": style, "script": script, "policy": policy}


def _number(value: Any, digits: int = 1) -> str:
    real = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.{digits}f}" if real else "–"


def _signed(value: Any) -> str:
    return _number(value) if not value or value < 0.05 else "+" + _number(value)


def _percent(value: float) -> str:
    """A place on an axis from 0 to 100."""
    return f"{min(max(value, 0.0), 100.0):.2f}"


def _cut(text: str) -> str:
    more = len(text) - _LONGEST
    return text if more <= 0 else f"{text[:_LONGEST]} … ({more:,} more characters)"


def _about(out: Path, settings: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict:
    """What the page's first lines say; paths by their ends alone."""
    try:
        at = (out / PREDICTIONS if (out / PREDICTIONS).exists() else out / FIGURES).stat().st_mtime
        date = datetime.datetime.fromtimestamp(at, datetime.UTC).date().isoformat()
    except (OSError, AttributeError):  # a bucket's objects tell no time
        date = ""
    return {
        "model": _name(settings.get("model")),
        "data": _name(settings.get("data")),
        "split": str(settings.get("split") or ""),
        "date": date,
        "exams": len(_exams(lines)),
        "samples": len(lines),
        "organs": len({line["organ"] for line in lines}),
    }


def _exams(predictions: Sequence[Mapping[str, Any]]) -> set[int]:
    return {line["record"] for line in predictions}


def _name(path: Any) -> str:
    """The last part of a path; of a run's checkpoint RUN/checkpoints/STEP three."""
    parts = Path(str(path or "")).parts
    return "/".join(parts[-3:] if parts[-2:-1] == (CHECKPOINTS,) else parts[-1:])


def _flat(value: Any) -> list[tuple[str, str]]:
    """Nested settings as lines; whole paths stay on the machine that they are of."""
    if not isinstance(value, Mapping):
        return []
    out = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            out += [(f"{key}.{name}", text) for name, text in _flat(item)]
        elif isinstance(item, list):
            out.append((str(key), ", ".join(map(str, item))))
        else:
            is_path = isinstance(item, str) and Path(item).is_absolute()
            out.append((str(key), _name(item) if is_path else str(item)))
    return out


def _dataset(settings: Mapping[str, Any]) -> tuple[Dataset | None, str]:
    """The dataset that was evaluated, or None and why."""
    if not settings.get("data"):
        return None, "the evaluation's settings name no dataset"
    try:
        return open_dataset(str(settings["data"]), str(settings.get("split") or "train")), ""
    except InputError:
        return None, "the dataset could not be read where this page was made"


def _synthetic(dataset: Dataset | None, chosen: Sequence[Chosen]) -> str:
    """ "all", "some" or "none" of the exams shown."""
    if dataset is None:
        return "none"
    found = {dataset.record(o.record).synthetic for o in chosen if 0 <= o.record < len(dataset)}
    return {(True,): "all", (False, True): "some"}.get(tuple(sorted(found)), "none")


def _case(one: Chosen, dataset: Dataset | None) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    total = 0
    if dataset is not None and 0 <= one.record < len(dataset):
        try:
            pixels = dataset.media(one.record)
            images, total = thumbnails(pixels), len(pixels)
        except InputError:
            pass  # a damaged exam: its texts are worth showing
    sample_id = str(one.samples[0].get("id") or one.record)
    return {
        "organ": one.organ,
        "rank": one.rank,
        "score": one.score,
        "scored": "report" if one.samples[0]["kind"] == "report" else "answers",
        "id": sample_id.removesuffix("/" + str(one.samples[0]["task"])),
        "images": images,
        "hidden_images": total - len(images),
        "reports": [_texts(line) for line in one.samples if line["kind"] == "report"],
        "answers": [line for line in one.samples if line["kind"] != "report"],
    }


def _texts(line: Mapping[str, Any]) -> dict[str, Any]:
    reference, prediction = marked(_cut(line["reference"]), _cut(line["prediction"]))
    return {
        "task": line.get("task", ""),
        "language": line["language"] if line.get("language") in ("zh", "en") else "",
        "question": line["question"],
        "error": line.get("error"),
        "reference": reference,
        "prediction": prediction,
    }


def _extra(case: Case) -> dict[str, Any]:
    line = {"question": case.question, "reference": case.reference, "prediction": case.prediction}
    images = thumbnails(case.images)
    texts = _texts(line)
    if not case.reference:  # nothing to differ from
        texts["prediction"] = [piece._replace(marked=False) for piece in texts["prediction"]]
    hidden = len(case.images) - len(images)
    return {"name": case.name, "note": case.note, "images": images, "hidden_images": hidden} | texts
