"""Bootstrap intervals, and the paired test of two systems, from statistics that add up.

Every metric here is a function of sums over samples (BLEU of counts, a mean of values and their
number, F1 of true and false positives), so that a resample costs one product of matrices.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from echovlm_jax.data import keys

RESAMPLES = 1000
LEVEL = 95  # percent of the resamples that lie inside an interval
_CELLS = 2**21  # of the matrix of how often each resample holds each sample; the rest comes later


class Statistic(NamedTuple):
    """A metric as a function of sums over samples."""

    columns: np.ndarray  # [n, k]: a row a sample
    value: Callable[[np.ndarray], np.ndarray]  # sums [r, k] → the metric [r], as a percentage


def mean_of(values: Sequence[float] | np.ndarray) -> Statistic:
    """The mean of values from 0 to 1, one a sample, as a percentage."""
    columns = np.stack([np.asarray(values, np.float64), np.ones(len(values))], axis=1)
    return Statistic(columns, lambda sums: 100 * sums[:, 0] / np.maximum(sums[:, 1], 1))


def estimate(statistic: Statistic) -> float | None:
    """The metric over all samples; None where there are none."""
    if not len(statistic.columns):
        return None
    return float(statistic.value(statistic.columns.sum(axis=0, keepdims=True))[0])


def interval(
    statistic: Statistic, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """The percentile interval of a metric over resampled samples; None where there are none.

    Which samples a resample holds depends on the seed and on their number alone.
    """
    if not len(statistic.columns):
        return None
    low, high = np.percentile(_resampled(statistic, seed, resamples), _LIMITS)
    return float(low), float(high)


class Difference(NamedTuple):
    """What `paired` says of a metric of two systems."""

    a: float
    b: float
    difference: float  # b − a
    interval: tuple[float, float]
    p: float


def paired(
    a: Statistic, b: Statistic, seed: int = 0, resamples: int = RESAMPLES
) -> Difference | None:
    """The paired bootstrap: both systems on the same resampled samples.

    p is two-sided: the share of resamples whose difference is at least as far from the resamples'
    mean difference as the observed one is from 0, one resample added to both counts (Koehn 2004, as
    sacrebleu does it).

    Args:
      a, b: the metric of either system; row i of both is the same sample.

    Returns:
      None where there are no samples.
    """
    if a.columns.shape[0] != b.columns.shape[0]:
        raise ValueError("paired statistics are of the same samples")
    first, second = estimate(a), estimate(b)
    if first is None or second is None:
        return None
    found = _resampled(b, seed, resamples) - _resampled(a, seed, resamples)
    low, high = np.percentile(found, _LIMITS)
    observed = second - first
    # The last bits of two equal sums may differ.
    beyond = np.abs(found - found.mean()) >= abs(observed) - 1e-9
    p = (int(beyond.sum()) + 1) / (resamples + 1)
    return Difference(first, second, observed, (float(low), float(high)), p)


_LIMITS = [(100 - LEVEL) / 2, (100 + LEVEL) / 2]


def _resampled(statistic: Statistic, seed: int, resamples: int) -> np.ndarray:
    """The metric of each resample, [resamples]."""
    columns = np.asarray(statistic.columns, np.float64)
    parts = [statistic.value(counts @ columns) for counts in _draws(len(columns), seed, resamples)]
    return np.concatenate(parts)


def _draws(n: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each resample holds each of n samples: float64 [some resamples, n], by parts."""
    step = max(1, _CELLS // n)
    for start in range(0, resamples, step):
        yield _drawn(n, seed, start, min(start + step, resamples))


@functools.lru_cache(4)  # the metrics of one table are resampled alike
def _drawn(n: int, seed: int, start: int, stop: int) -> np.ndarray:
    rows = np.arange(start, stop)
    drawn = keys.mix(seed, rows[:, None], np.arange(n)[None]) % np.uint64(n)
    flat = (drawn.astype(np.int64) + np.arange(len(rows))[:, None] * n).ravel()
    return np.bincount(flat, minlength=len(rows) * n).reshape(len(rows), n).astype(np.float64)
