"""The fate of an epoch's samples: trained on, dropped, or trained on with smaller images."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from echovlm_jax.data.epoch import Epoch, make_beginning, make_epoch, mend
from echovlm_jax.data.examples import ALONE, REASONS, Source, open_source
from echovlm_jax.data.settings import Settings
from echovlm_jax.data.tasks import TASKS
from echovlm_jax.errors import InputError
from echovlm_jax.processing.files import shown

# The share of a task's samples that a run may leave out without being told so: a few outliers.
ALLOWED = 0.05
_NAMED = 3  # tasks that an error names
_COUNTS = ("drawn", "trained", "dropped", "shrunk")


def review(settings: Settings, allowed: float = ALLOWED) -> dict[str, Any]:
    """The fate of the samples that a run's first epoch draws; see `counted`.

    Args:
      allowed: the share of all samples, and of any task's, that may be left out. One for which no
        other exam has a text that differs is counted, and doesn't count for this: no setting could
        mend it.

    Raises:
      InputError: more are left out (nothing has been stored then, and the message says what would
        mend it), or the data can't be used.
    """
    source = open_source(settings)
    return counted(source, make_epoch(source, 0, partial(_check, source, allowed)))


def expected_filling(settings: Settings) -> dict[str, float]:
    """The share of the rows' tokens and patches that is used, by an epoch's first samples.

    Raises:
      InputError: the data can't be used.
    """
    source = open_source(settings)
    begun = make_beginning(source)
    return filled(begun.tokens, begun.patches, len(begun.offsets) - 1, settings)


def counted(source: Source, epoch: Epoch) -> dict[str, Any]:
    """Counts of an epoch, as plain data for JSON.

    Returns:
      drawn (samples); dropped (by reason); tasks and by_organ, of each: drawn = trained + dropped
      samples, and shrunk, the images of the trained ones that are smaller, or have fewer frames,
      than max_image_patches lets them, to fit a row; images_shrunk (all of these);
      packing_efficiency (tokens, patches: the used share of the rows); useful_patches (that of the
      patches: the others are computed for nothing).
    """
    settings, organs = source.settings, source.dataset.organs
    of_organ = _by(organs[epoch.record], organs[epoch.lost_record], epoch, len(source.peers))
    of_task = _by(epoch.task, epoch.lost_task, epoch, len(TASKS))
    efficiency = filled(epoch.tokens, epoch.patches, len(epoch.offsets) - 1, settings)
    return {
        "drawn": len(epoch.record) + len(epoch.lost_record),
        "dropped": epoch.dropped,
        "tasks": {
            name: found
            for name, found in zip(TASKS, of_task, strict=True)
            if found["drawn"] or source.tasks.get(name)
        },
        "by_organ": dict(zip(source.dataset.organ_names, of_organ, strict=True)),
        "images_shrunk": int(epoch.shrunk.sum()),
        "useful_patches": efficiency["patches"],
        "packing_efficiency": efficiency,
    }


def filled(
    tokens: np.ndarray, patches: np.ndarray, rows: int, settings: Settings
) -> dict[str, float]:
    """The share of the rows' tokens and patches that samples of these lengths use."""
    return {
        "tokens": int(tokens.sum()) / (rows * settings.seq_len),
        "patches": int(patches.sum()) / max(1, rows * settings.max_patches),
    }


def _by(kept: np.ndarray, lost: np.ndarray, epoch: Epoch, count: int) -> list[dict[str, int]]:
    """Of each number below `count`: what the samples that have it come to."""
    trained = np.bincount(kept, minlength=count)
    dropped = np.bincount(lost[lost >= 0], minlength=count)
    shrunk = np.bincount(kept, epoch.shrunk, minlength=count)
    return [
        {"drawn": int(t + d), "trained": int(t), "dropped": int(d), "shrunk": int(s)}
        for t, d, s in zip(trained, dropped, shrunk, strict=True)
    ]


def _check(source: Source, allowed: float, epoch: Epoch) -> None:
    """Raises InputError where more than the allowed share of the samples is left out."""
    mends = epoch.lost_reason != REASONS.index(ALONE)
    lost = np.bincount(epoch.lost_task[mends & (epoch.lost_task >= 0)], minlength=len(TASKS))
    drawn = lost + np.bincount(epoch.task, minlength=len(TASKS))
    shares = lost / np.maximum(drawn, 1)
    count, samples = int(mends.sum()), len(epoch.record) + len(epoch.lost_record)
    worst = max(count / samples, float(shares.max()))
    if worst <= allowed:
        return
    named = [i for i in np.argsort(-shares, kind="stable")[:_NAMED] if shares[i] > allowed]
    tasks = "".join(f", {TASKS[i]} {lost[i]:,} of {drawn[i]:,}" for i in named)
    budgets = mend(source.settings, epoch.lost_need[mends])
    raise InputError(
        f"data {shown(source.settings.data)}: {count:,} of an epoch's {samples:,} samples would be"
        f" left out{tasks}, more than allow_dropped {allowed:g} of a task;"
        f" {f'give rows room with {budgets}' if budgets else 'mend the data'}, or go on without"
        f" them with --config.allow_dropped={math.ceil(worst * 100) / 100:g}"
    )


def table(found: Mapping[str, Any], settings: Settings) -> str:
    """What `counted` returns, as a text for people."""
    return "\n".join(_lines(found, settings))


def _lines(found: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    yield f"an epoch of {shown(settings.data)}, split {settings.split}: {losses(found)}"
    yield from rows_of("task", found["tasks"])
    yield from rows_of("organ", found["by_organ"])
    used = found["packing_efficiency"]
    yield (
        f"rows of {settings.seq_len} tokens and {settings.max_patches} patches are full to"
        f" {used['tokens']:.1%} and {used['patches']:.1%}"
    )


def rows_of(title: str, found: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """A table of the counts of each task, or organ."""
    yield f"{title:<16}" + "".join(f"{name:>10}" for name in _COUNTS)
    for name, row in found.items():
        yield f"{shown(name):<16}" + "".join(f"{row[key]:>10,}" for key in _COUNTS)


def losses(found: Mapping[str, Any]) -> str:
    """One line: how many samples are drawn and left out, and why, and how many images shrink."""
    dropped = ", ".join(f"{n:,} {reason}" for reason, n in found["dropped"].items())
    images = found["images_shrunk"]
    return (
        f"{found['drawn']:,} samples drawn; left out: {dropped or 'none'}; images made smaller to"
        f" fit a row: {images or 'none'}"
    )
