"""What a model is asked in an evaluation: each exam's prompts, as training composes them."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from echovlm_jax.data import keys
from echovlm_jax.data.dataset import Dataset
from echovlm_jax.data.encode import IGNORED, encode
from echovlm_jax.data.examples import other_record, peers_of
from echovlm_jax.data.fit import Grid, cut, fit, seconds_of, training_images
from echovlm_jax.data.record import LANGUAGES, Record, Turn
from echovlm_jax.data.tasks import compose
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.answers import label, options_of, read_answer
from echovlm_jax.evaluate.summary import KINDS

IMAGES = ("given", "blind", "swapped", "shuffled")
# The tasks of each kind, the first that an exam has texts for: an exam without a whole report is
# asked for its findings, or else for its caption.
_TASKS: dict[str, tuple[dict[str, float], ...]] = {
    "report": ({"report": 1.0}, {"findings": 1.0}, {"caption": 1.0}),
    "diagnosis": ({"diagnosis": 1.0},),
    "vqa": ({"choice": 1.0, "choice_restate": 1.0, "judge": 1.0},),
}


class Sample(NamedTuple):
    """A question about an exam, and what is right."""

    id: str
    record: int  # whose question it is
    media: int | None  # whose images are shown; None: no images
    organ: str
    task: str  # of data.tasks
    kind: str  # of KINDS
    language: str
    turns: tuple[Turn, ...]  # system?, user, assistant: the reference
    labels: tuple[str, ...]  # of a diagnosis: those that the organ's exams have in this language
    answer: str | None

    @property
    def question(self) -> str:
        return self.turns[-2].text

    @property
    def reference(self) -> str:
        return self.turns[-1].text


NO_LIMIT = 2**30  # patches


class Limits(NamedTuple):
    """How large an exam may get, as in training (`data.fit`).

    A max_image_patches below NO_LIMIT takes the place of the processor's own limit, as it does in
    training.
    """

    seq_len: int
    max_patches: int
    max_image_patches: int


def make_samples(
    dataset: Dataset,
    *,
    kinds: Sequence[str] = KINDS,
    limit: int | None = None,
    images: str = "given",
    seed: int = 0,
    language: str | None = None,
) -> list[list[Sample]]:
    """The samples of each of the first `limit` exams, at most one of each kind.

    Wording, language and the statements to choose from follow from (seed, exam, kind): the same
    for every model and for every value of `images`.

    Args:
      kinds: some of KINDS; they are made in that order.
      limit: exams; None = all.
      images: "given"; "blind": none; "swapped": those of an exam of another organ; "shuffled":
        those of another exam of the same organ, or of an organ's only exam, of another organ. The
        other exam has images, and where one has them of the same kinds, still or moving, that one.
      language: one of LANGUAGES; None = one that the exam has.

    Raises:
      InputError: an argument is none of these, or no other exam is there to swap with.
    """
    for value, allowed, name in (
        *((kind, KINDS, "tasks") for kind in kinds),
        (images, IMAGES, "images"),
        (language or LANGUAGES[0], LANGUAGES, "language"),
    ):
        if value not in allowed:
            raise InputError(f"{name} {value!r} is unknown; choose of {', '.join(allowed)}")
    if not kinds:
        raise InputError(f"tasks: none is left to evaluate; choose of {', '.join(KINDS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1 exam, found {limit}")
    count = len(dataset) if limit is None else min(limit, len(dataset))
    labels = _labels(dataset) if "diagnosis" in kinds else {}
    peers = peers_of(dataset)
    shown = _media_kinds(dataset) if images in ("swapped", "shuffled") else np.zeros(0)
    out = []
    for number in range(count):
        record = dataset.record(number)
        media = _media_of(dataset, number, images, seed, shown)
        if language is not None:
            kept = tuple(r for r in record.reports if r.language == language)
            record = dataclasses.replace(record, reports=kept, turns=())
        made = (
            _sample(dataset, record, number, media, kind, seed, labels, peers)
            for kind in KINDS
            if kind in kinds
        )
        out.append([sample for sample in made if sample is not None])
    return out


def _sample(
    dataset: Dataset,
    record: Record,
    number: int,
    media: int | None,
    kind: str,
    seed: int,
    labels: Mapping[tuple[str, str], tuple[str, ...]],
    peers: Sequence[np.ndarray],
) -> Sample | None:
    """The exam's sample of a kind, or None where it has no texts for one."""
    other = functools.partial(other_record, dataset, peers, number)  # as training's
    key = keys.number(seed, number, KINDS.index(kind), 31)
    for weights in _TASKS[kind]:
        try:
            task, language, turns = compose(record, key, weights, other)
        except InputError:  # it has no text at all
            return None
        if task in weights:
            break
    else:
        return None
    known = labels.get((record.organ, language), ()) if kind == "diagnosis" else ()
    question, reference = turns[-2].text, turns[-1].text
    answer = None
    if kind == "diagnosis":
        answer = label(reference)
    elif kind == "vqa":
        # The letter that a choice's reference begins with is right, whatever the options are.
        letter = reference[:1] if reference[:1] in options_of(question) else None
        answer = letter or read_answer(task, reference, question, ())
    name = f"{record.id}/{task}"
    return Sample(name, number, media, record.organ, task, kind, language, turns, known, answer)


def _labels(dataset: Dataset) -> dict[tuple[str, str], tuple[str, ...]]:
    """The diagnoses of each organ in each language, over the whole split."""
    found: dict[tuple[str, str], set[str]] = {}
    for number in range(len(dataset)):
        record = dataset.record(number)
        for report in record.reports:
            if name := label(report.diagnosis):
                found.setdefault((record.organ, report.language), set()).add(name)
    return {key: tuple(sorted(names)) for key, names in found.items()}


def _media_kinds(dataset: Dataset) -> np.ndarray:
    """Of each exam, whether it has images (1), loops (2), both (3) or neither (0)."""
    media = (dataset.record(number).media for number in range(len(dataset)))
    return np.array([sum({2 if medium.frames else 1 for medium in found}) for found in media])


def _media_of(
    dataset: Dataset, number: int, images: str, seed: int, shown: np.ndarray
) -> int | None:
    """Whose images are shown with an exam's questions; `shown` is of `_media_kinds`."""
    if images == "blind":
        return None
    if images == "given" or not shown[number]:
        return number
    others, organ = np.arange(len(shown)) != number, dataset.organs == dataset.organs[number]
    others &= shown > 0
    near = images == "shuffled" and (others & organ).any()
    others &= organ if near else ~organ
    if not others.any():
        which = "another organ" if images == "swapped" else "another patient"
        raise InputError(
            f"images {images}: the split has no exam of {which} with images to take them from"
        )
    alike = others & (shown == shown[number])
    found = np.flatnonzero(alike if alike.any() else others)
    return int(found[keys.number(seed, number, 32) % len(found)])


def inputs_of(
    model: Any, sample: Sample, media: Sequence[np.ndarray], shown: Record | None, limits: Limits
) -> dict[str, np.ndarray]:
    """A sample's prompt as `Model.answer` takes it: the very tokens and patches that training has.

    Args:
      model: a `load.Model`.
      media: the pixels that are shown.
      shown: the record that they are of; None where nothing is shown.
      limits: those of the row that the prompt has to fit.

    Raises:
      InputError: it doesn't fit, or an image can't be made into patches.
    """
    processor = model.processor
    config, unit = processor.image_config, processor.image_config.merge_size**2
    if limits.max_image_patches < NO_LIMIT:
        config = training_images(config, limits.max_image_patches, limits.max_patches)
    sizes = () if shown is None else shown.media
    kinds = ["video" if medium.frames else "image" for medium in sizes]
    bare = _prompt(model, sample, [(kind, 1) for kind in kinds])
    grids = fit(sizes, len(bare) - len(kinds), *limits, config)
    if grids is None:
        raise InputError(
            f"its text takes {len(bare)} tokens, and beside it its {len(kinds)} media don't fit"
            f" into {limits.seq_len}"
        )
    vision = [(kind, grid.patches // unit) for kind, grid in zip(kinds, grids, strict=True)]
    ids = _prompt(model, sample, vision).astype(np.int64)[None]
    out = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for kind, pixels_key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        pairs: list[tuple[np.ndarray, Grid]] = [
            (pixels, grid) for pixels, grid, k in zip(media, grids, kinds, strict=True) if k == kind
        ]
        if pairs:
            out[pixels_key] = np.concatenate([cut(*pair, config) for pair in pairs])
            out[f"{kind}_grid_thw"] = np.array([grid[:3] for _, grid in pairs], np.int64)
    if "video" in kinds and model.config.tokens_per_second is not None:
        out["second_per_grid_ts"] = seconds_of(sizes, grids, config)
    return out


def _prompt(model: Any, sample: Sample, vision: Sequence[tuple[str, int]]) -> np.ndarray:
    """The tokens up to where the reference begins, int32 [n]."""
    encoded = encode(model.processor.tokenizer, model.config, sample.turns, vision)
    return encoded.tokens[: int(np.argmax(encoded.labels != IGNORED))]
