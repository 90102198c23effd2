"""Exams in memory: a dataset for tests that need no pixels, and what samples are made from."""

from __future__ import annotations

import numpy as np

from echovlm_jax.config import preset
from echovlm_jax.data.examples import Source
from echovlm_jax.data.record import Medium, Record, Report
from echovlm_jax.data.settings import Settings
from echovlm_jax.data.tasks import mix_for
from echovlm_jax.data.tokenizer import tokenizer_for

SETTINGS = Settings(
    data="memory",
    model="tiny",
    stage="instruction",
    seq_len=1024,
    max_patches=2048,
    max_image_patches=256,
    global_batch_size=4,
    mix_temperature=1.0,
    workers=0,
)
WORDS = ["echo", "node", "cyst", "wall", "flow", "margin", "lobe", "duct", "valve", "shadow"]


class MemoryDataset:
    """A `Dataset` of given records. Its pixels are grey."""

    def __init__(self, records, fingerprint="00"):
        self.records = records
        self.fingerprint = fingerprint
        self.organ_names = tuple(sorted({record.organ for record in records}))
        organs = [self.organ_names.index(record.organ) for record in records]
        self.organs = np.array(organs, np.int16)

    def __len__(self):
        return len(self.records)

    def record(self, i):
        return self.records[i]

    def media(self, i):
        shapes = [
            (m.frames,) * (m.frames > 0) + (m.height, m.width, 3) for m in self.record(i).media
        ]
        return [np.full(shape, 128, np.uint8) for shape in shapes]


def exam(number, organ="liver", media=None, words=6):
    """One whose texts and sizes follow from its number."""
    rng = np.random.default_rng(number)
    if media is None:
        media = [Medium(0, *rng.integers(60, 300, 2).tolist()) for _ in range(number % 4 + 1)]

    def text(kind):
        return f"{kind} {number}: " + " ".join(rng.choice(WORDS, words))

    report = Report(
        "en", text("findings"), text("impression"), text("caption"), f"label {number % 3}"
    )
    return Record(f"exam-{number}", organ, tuple(media), reports=(report,))


def exams(**counts):
    """So many of each organ, one after another."""
    organs = [organ for organ, count in counts.items() for _ in range(count)]
    return MemoryDataset([exam(i, organ) for i, organ in enumerate(organs)])


def source(dataset, settings=SETTINGS):
    tokenizer, model, images = tokenizer_for(settings.model, settings.tokenizer)
    weights = dict(settings.task_weights) if settings.task_weights else None
    peers = tuple(np.flatnonzero(dataset.organs == i) for i in range(len(dataset.organ_names)))
    tasks = mix_for(settings.stage, weights)
    assert preset(settings.model) is model
    return Source(settings, dataset, tokenizer, model, images, tasks, peers)
