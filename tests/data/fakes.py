"""A dataset in memory for tests of the pipeline, which worker processes can open by its name.

`fake:N` has N exams; `fake:N:WHAT:I` one whose exam I does WHAT when its pixels are read: exit0,
exit3, kill, or broken (an image that can't be read).
"""

import functools
import os
import signal

import numpy as np
from ml_collections import ConfigDict

from echovlm_jax.data import examples, pipeline, rows
from echovlm_jax.data.keys import number
from echovlm_jax.data.record import Medium, Record, Report, Turn
from echovlm_jax.errors import InputError

ORGANS = ("breast", "liver", "thyroid")
_ORGAN_OF = (0, 1, 0, 1, 2)  # unevenly: of exams by number


def config(**changes) -> ConfigDict:
    """What make_batches reads, for rows of two or three exams."""
    keys = {
        "seed": 3,
        "data": "fake:40",
        "model": "tiny",
        "stage": "full",
        "seq_len": 768,
        "max_patches": 256,
        "max_image_patches": 64,
        "global_batch_size": 8,
        "mix_temperature": 1.0,
        "data_workers": 0,
    }
    return ConfigDict(keys | changes)


def open_dataset(data: str, split: str = "train") -> "FakeDataset":
    return FakeDataset(data)


class FakeDataset:
    def __init__(self, data: str) -> None:
        _, count, *rest = data.split(":")
        self.fingerprint = f"{number(int(count)):x}"
        self.organ_names = ORGANS
        self.organs = np.array([_ORGAN_OF[i % 5] for i in range(int(count))], np.int16)
        self.trouble = (rest[0], int(rest[1])) if rest else ("", -1)

    def __len__(self) -> int:
        return len(self.organs)

    def record(self, i: int) -> Record:
        return _record(i)

    def media(self, i: int) -> list[np.ndarray]:
        what, at = self.trouble
        if i == at:
            _misbehave(what)
        out = []
        for n, (frames, height, width, _) in enumerate(_sizes(i)):
            shape = ((frames,) if frames else ()) + (height, width, 3)
            pixels = np.random.default_rng([i, n]).integers(0, 256, shape, np.uint8)
            if n == 1:
                pixels[...] = pixels[..., :1]  # grey
            out.append(pixels)
        return out


@functools.cache
def _record(i: int) -> Record:
    words = " ".join(f"w{number(i, n) % 97}" for n in range(5 + number(i) % 40))
    report = Report(
        language=("zh", "en")[i % 2],
        findings=f"Findings {i}: {words}.",
        impression=f"Impression {i}.",
        diagnosis=("benign", "malignant", "cyst")[i % 3],
    )
    return Record(
        id=f"exam-{i}",
        organ=ORGANS[_ORGAN_OF[i % 5]],
        media=_sizes(i),
        turns=(Turn("user", f"Exam {i}?"), Turn("assistant", f"Answer {i}: {words}")),
        reports=(report,),
    )


def _sizes(i: int) -> tuple[Medium, ...]:
    out = []
    for n in range(number(i, 1000) % 4):
        height, width = (40 + number(i, n, side) % 90 for side in (0, 1))
        frames = number(i, n) % 6 if n == 2 else 0
        out.append(Medium(frames, height, width))
    return tuple(out)


def _misbehave(what: str) -> None:
    if what.startswith("exit"):
        os._exit(int(what[4:]))
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise InputError("image 1: is damaged or truncated, it doesn't decode")


def use(monkeypatch) -> None:
    """Makes `data = "fake:…"` open a FakeDataset, in worker processes too."""
    monkeypatch.setattr(examples, "open_dataset", open_dataset)
    monkeypatch.setattr(rows, "fill_row_in_worker", fill_row_in_worker)
    monkeypatch.setattr(pipeline, "_plan_in_worker", plan_in_worker)


_fill_row_in_worker, _plan_in_worker = rows.fill_row_in_worker, pipeline._plan_in_worker


def fill_row_in_worker(*args) -> None:
    examples.open_dataset = open_dataset
    _fill_row_in_worker(*args)


def plan_in_worker(*args) -> None:
    examples.open_dataset = open_dataset
    _plan_in_worker(*args)
