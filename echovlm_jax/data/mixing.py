"""How often an epoch shows each exam, and in which order: organs in balance."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import floor
from typing import NamedTuple

import numpy as np

from echovlm_jax.data.keys import mix, uniform
from echovlm_jax.errors import InputError

_ORDER, _CYCLE = 1, 2  # what a key is for
_MOST = 1000  # samples an epoch for each exam of the data; beyond that the mixture is a mistake


class Draws(NamedTuple):
    """An epoch's samples in their order: int32 [M] each."""

    record: np.ndarray
    repeat: np.ndarray  # 0 where the exam first comes up in this epoch, 1 at its second time, ...


def ratios(
    counts: Sequence[int],
    names: Sequence[str],
    *,
    temperature: float | None = None,
    weights: Mapping[str, float] | None = None,
) -> list[Fraction]:
    """How often an epoch shows an exam of each organ; 1 for the organ shown least, 0 for none.

    Args:
      counts: exams of each organ.
      temperature: shares go as counts^(1/temperature): 1 leaves them as they are, a high one makes
        all organs alike.
      weights: the shares themselves, by name, up to a factor; 0 leaves an organ out.

    Raises:
      InputError: neither or both given, a weight that is missing or of an organ without exams, no
        weight above 0, or a mixture that makes an epoch absurdly long.
    """
    if (temperature is None) == (not weights):
        raise InputError(
            "give either mix_temperature or organ_weights: with the weights, set"
            " --config.mix_temperature=none"
        )
    if weights:
        shares = _shares_by_weight(dict(zip(names, counts, strict=True)), weights)
    else:
        assert temperature is not None
        if not temperature > 0:
            raise InputError(f"mix_temperature must be above 0, found {temperature}")
        shares = _shares_by_temperature(counts, temperature)
    per_exam = [share / n if n else Fraction(0) for share, n in zip(shares, counts, strict=True)]
    least = min((ratio for ratio in per_exam if ratio), default=None)
    if least is None:
        raise InputError("no organ has both exams and a weight above 0; there is nothing to show")
    found = [ratio / least for ratio in per_exam]
    if sum(ratio * n for ratio, n in zip(found, counts, strict=True)) > _MOST * sum(counts):
        name, times = max(zip(names, found, strict=True), key=lambda pair: pair[1])
        raise InputError(
            f"the mixture shows each exam of {name} {float(times):,.0f} times an epoch, and the"
            f" epoch is over {_MOST} times the data; bring organ_weights nearer to the data's"
            " shares, or mix_temperature to 1 or more"
        )
    return found


def _shares_by_temperature(counts: Sequence[int], temperature: float) -> list[Fraction]:
    if temperature == 1:
        return [Fraction(n) for n in counts]
    # 12 digits: the last ones of a power differ between machines, the data order must not.
    largest = max(counts)
    shares = [Fraction(f"{(n / largest) ** (1 / temperature):.12g}") for n in counts]
    if any(n and not share for n, share in zip(counts, shares, strict=True)):
        raise InputError(f"mix_temperature {temperature} leaves rare organs no share; raise it")
    return shares


def _shares_by_weight(counts: Mapping[str, int], weights: Mapping[str, float]) -> list[Fraction]:
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise InputError(f"organ_weights.{name} must be a number of at least 0, found {weight}")
        if weight and not counts.get(name):
            known = ", ".join(sorted(name for name, n in counts.items() if n))
            raise InputError(f"organ_weights.{name}: the data has no such exams, only {known}")
    missing = [name for name, n in counts.items() if n and name not in weights]
    if missing:
        raise InputError(
            f"organ_weights lacks {', '.join(missing)}, which the data has; give each a weight, 0"
            " to leave it out"
        )
    # As written: 0.3 means three tenths, not the double nearest to it.
    return [Fraction(repr(float(weights.get(name, 0)))) for name in counts]


def epoch_draws(organs: np.ndarray, ratio: Sequence[Fraction], *, seed: int, epoch: int) -> Draws:
    """The samples of one epoch.

    Each organ's exams are in a fixed random cycle, which epochs walk along: this epoch's stretch
    begins where the last one's ended, to the fraction of an exam. So an exam comes up floor(ratio)
    or ceil(ratio) times, all of an organ equally often in the long run, and organs in their exact
    proportions. The order is random; the k times of one exam are a k-th of the epoch apart.

    Args:
      organs: int [N], each exam's organ.
      ratio: the result of `ratios`.
    """
    records, repeats, places = [], [], []
    for organ, times in enumerate(ratio):
        exams = np.flatnonzero(organs == organ)
        n = len(exams)
        first, end = (floor(times * n * e) for e in (epoch, epoch + 1))
        if end == first:
            continue
        cycle = exams[np.argsort(mix(seed, _CYCLE, exams), kind="stable")]
        whole, extra = divmod(end - first, n)
        # Everyone `whole` times, and the next `extra` of the cycle once more.
        count = np.full(n, whole)
        count[(first + whole * n + np.arange(extra)) % n] += 1
        record = np.repeat(cycle, count)
        repeat = np.arange(len(record)) - np.repeat(np.cumsum(count) - count, count)
        phase = uniform(mix(seed, _ORDER, epoch, cycle))
        records.append(record)
        repeats.append(repeat)
        places.append((np.repeat(phase, count) + repeat) / np.repeat(count, count))
    record, repeat = (np.concatenate(parts).astype(np.int32) for parts in (records, repeats))
    order = np.lexsort((repeat, record, np.concatenate(places)))
    return Draws(record[order], repeat[order])
