"""From a record's number and a key to one sample: what is asked and answered, and how large it is.

The plan calls this to know lengths, a worker calls it again to build the sample. It is the one way
from a key to a sample, so what is built has exactly the planned lengths.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.data.dataset import Dataset, open_dataset
from echovlm_jax.data.encode import text_tokens
from echovlm_jax.data.fit import Grid, Need, fit, needed, training_images, whole
from echovlm_jax.data.keys import mix
from echovlm_jax.data.record import Record, Turn
from echovlm_jax.data.settings import Settings
from echovlm_jax.data.tasks import TASKS, Composed, Unmade, compose, mix_for
from echovlm_jax.data.tokenizer import tokenizer_for
from echovlm_jax.errors import InputError
from echovlm_jax.processing.images import ImageConfig
from echovlm_jax.processing.tokenizer import Tokenizer


class Source(NamedTuple):
    """All that samples are made from."""

    settings: Settings
    dataset: Dataset
    tokenizer: Tokenizer
    model: ModelConfig
    images: ImageConfig
    tasks: Mapping[str, float]  # the weight of each task
    peers: tuple[np.ndarray, ...]  # of each organ, the numbers of its records in order


class Example(NamedTuple):
    """One sample, before its pixels are read and its text is encoded."""

    record: Record
    task: str
    language: str
    turns: tuple[Turn, ...]
    grids: tuple[Grid, ...]  # of each medium
    vision: tuple[tuple[str, int], ...]  # of each medium: "image" or "video", and its tokens
    tokens: int  # all of them, also those that stand for patches
    patches: int
    shrunk: int  # media that are smaller, or have fewer frames, than max_image_patches lets them


class NoExample(InputError):
    """Nothing can be made of a record with a key.

    Attributes:
      reason: one of REASONS.
      task: the one that was drawn, of tasks.TASKS; None where the record has texts for none.
      need: the budgets that it would fit; None where they are not what is wrong.
    """

    def __init__(
        self,
        reason: str,
        record: Record,
        detail: str,
        task: str | None = None,
        need: Need | None = None,
    ) -> None:
        super().__init__(f"record {record.id}: {reason}: {detail}")
        self.reason, self.task, self.need = reason, task, need


TOO_LONG, NOTHING, SIDES = "too long", "nothing to teach", "image sizes"
ALONE = "nothing to choose from"  # no other exam has a text that differs
REASONS = (TOO_LONG, NOTHING, SIDES, ALONE)


def open_source(settings: Settings) -> Source:
    """Opens the dataset and the tokenizer. Cheap: each worker does it for itself."""
    dataset = open_dataset(settings.data, settings.split)
    tokenizer, model, images = tokenizer_for(settings.model, settings.tokenizer)
    images = training_images(images, settings.max_image_patches, settings.max_patches)
    weights = dict(settings.task_weights) if settings.task_weights else None
    tasks = mix_for(settings.stage, weights)
    return Source(settings, dataset, tokenizer, model, images, tasks, peers_of(dataset))


def example(source: Source, number: int, key: int) -> Example:
    """The sample that a key makes of a record; the same one every time.

    Raises:
      NoExample: its texts hold nothing to teach, the drawn task can't be made of it, it is too long
        for a row, or an image's sides can't be made into patches.
      InputError: the dataset is damaged.
    """
    return measured(source, number, conversation(source, number, key))


def conversation(source: Source, number: int, key: int) -> Composed:
    """What a key makes of a record's texts: of the task that is drawn, or nothing.

    Raises:
      NoExample: its texts hold nothing to teach, or the drawn task can't be made of it.
      InputError: the dataset is damaged.
    """
    record = source.dataset.record(number)
    try:
        other = partial(other_record, source.dataset, source.peers, number)
        return compose(record, key, source.tasks, other, redraw=False)
    except Unmade as error:
        detail = f"no other exam has a text for {error.task} that differs"
        raise NoExample(ALONE, record, detail, error.task) from None
    except InputError as error:
        raise NoExample(NOTHING, record, str(error)) from None


def measured(source: Source, number: int, composed: Composed) -> Example:
    """The sample of a record with this conversation: how large it is.

    Raises:
      NoExample: it is too long for a row, or an image's sides can't be made into patches.
      InputError: the dataset is damaged.
    """
    record = source.dataset.record(number)
    kinds = ["video" if medium.frames else "image" for medium in record.media]
    text = text_tokens(source.tokenizer, composed.turns, len(kinds))
    settings = source.settings
    limits = (settings.seq_len, settings.max_patches, settings.max_image_patches)
    try:
        grids = fit(record.media, text, *limits, source.images)
        full = whole(record.media, settings.max_image_patches, source.images)
    except InputError as error:
        raise NoExample(SIDES, record, str(error), composed.task) from None
    if grids is None:
        raise NoExample(
            TOO_LONG,
            record,
            f"its text takes {text} of seq_len {settings.seq_len} tokens, and beside it, or into"
            f" max_patches {settings.max_patches}, its {len(kinds)} media don't fit",
            composed.task,
            needed(record.media, text, settings.max_image_patches, source.images),
        )
    unit = source.images.merge_size**2
    vision = tuple((kind, g.patches // unit) for kind, g in zip(kinds, grids, strict=True))
    return Example(
        record=record,
        task=composed.task,
        language=composed.language,
        turns=composed.turns,
        grids=grids,
        vision=vision,
        tokens=text + sum(n for _, n in vision),
        patches=sum(grid.patches for grid in grids),
        shrunk=sum(a.patches < b.patches for a, b in zip(grids, full, strict=True)),
    )


def texts_of(data: str | Path, split: str = "train", draws: int = 2) -> Iterator[str]:
    """What is said in training, turn by turn: of each record `draws` samples of all tasks.

    A tokenizer that learns from these has pieces for what is asked as well as for reports.
    """
    dataset = open_dataset(data, split)
    peers, tasks = peers_of(dataset), {str(task): 1.0 for task in TASKS}
    for number in range(len(dataset)):
        record = dataset.record(number)
        for draw in range(draws):
            other = partial(other_record, dataset, peers, number)
            try:
                composed = compose(record, int(mix(number, draw)), tasks, other)
            except InputError:
                break  # nothing to teach from; a plan counts such records
            yield from (turn.text for turn in composed.turns)


def peers_of(dataset: Dataset) -> tuple[np.ndarray, ...]:
    """Of each organ, the numbers of its records in order."""
    return tuple(np.flatnonzero(dataset.organs == i) for i in range(len(dataset.organ_names)))


def other_record(
    dataset: Dataset, peers: Sequence[np.ndarray], number: int, n: int
) -> Record | None:
    """The n-th record of the same organ, this one left out; None where it is the only one."""
    others = peers[int(dataset.organs[number])]
    if len(others) < 2:
        return None
    place = n % (len(others) - 1)
    place += place >= np.searchsorted(others, number)
    return dataset.record(int(others[place]))
