"""How often to save, and what share of the time then counts, where hosts fail.

Failures come at random, at the same rate always, and one host's ends the job: of N hosts it fails N
times as often as one. A failure costs what was made since the checkpoint that the job goes on from,
and a restart; a save costs what the loop waits for it. Young (1974), "A first order approximation
to the optimum checkpoint interval", balanced the two; Daly (2006), "A higher order estimate of the
optimum checkpoint interval for restart dumps", also has failures in a save and in a restart.
"""

import math
from dataclasses import dataclass
from typing import Any

# Meta's Llama 3 (2024, arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days on
# 16,384 H100 cards, eight a host. That hosts of other accelerators fail as often is an assumption;
# spot machines are taken away more often.
HOST_MTBF_HOURS = 54 * 24 * (16_384 / 8) / 419
# Assumptions, to be replaced by what was measured. A chip's copy to its host's memory: half of what
# PCIe 3.0 gives 16 lanes. A host's rate to and from storage. And what passes until a failure is
# noticed, a host is there and the program has begun.
COPY_RATE, STORAGE_RATE, COMING_BACK = 8e9, 1e9, 300.0


@dataclass(frozen=True)
class Failures:
    """What was measured of failures, saves and steps; None is estimated.

    Attributes:
      host_mtbf_hours: the mean time between failures of one host.
      step_seconds: of one step.
      save_seconds: of a save, what the loop waits for.
      write_seconds: of a save, from then until the checkpoint is whole.
      restart_seconds: from a failure until the first step after it.
    """

    host_mtbf_hours: float | None = None
    step_seconds: float | None = None
    save_seconds: float | None = None
    write_seconds: float | None = None
    restart_seconds: float | None = None


def best_interval(save: float, mtbf: float) -> float:
    """Seconds of steps between two saves that lose the least, by Daly (2006).

    Args:
      save: seconds that a save takes from the loop.
      mtbf: seconds between two failures of the job, on average.
    """
    if save >= 2 * mtbf:
        return mtbf
    part = save / (2 * mtbf)
    return math.sqrt(2 * save * mtbf) * (1 + math.sqrt(part) / 3 + part / 9) - save


def expected_goodput(
    interval: float, *, save: float, write: float, restart: float, mtbf: float
) -> float:
    """The share of a long run's time that goes into steps which no failure undoes.

    Between two failures pass M = `mtbf` seconds on average, whatever came before, and a restart
    that may fail itself makes it M·exp(R/M). The first checkpoint after it is whole interval + save
    + write later, each next one L later; L = interval + save, or more where a save waits until the
    one before is written. Of chances p = exp(−seconds/M) that no host fails until then, that gives
    p(first) / (1 − p(L)) checkpoints, on average. With no `write` this is Daly's model.

    Args:
      interval: seconds of steps between two saves.
      save: seconds that a save takes from the loop.
      write: seconds from then until the checkpoint is whole, beside steps.
      restart: seconds from a failure until the first step after it.
      mtbf: seconds between two failures of the job, on average.
    """
    first, each = interval + save + write, max(interval, write) + save
    checkpoints = math.exp(-(restart + first) / mtbf) / -math.expm1(-each / mtbf)
    return checkpoints * interval / mtbf


def recommend(
    failures: Failures,
    *,
    hosts: int,
    host_bytes: float,
    chip_bytes: float,
    step: float,
    compiling: float,
    every: int,
) -> dict[str, Any]:
    """How often to save, and the goodput that it gives: failures, restarts and saves taken off.

    Args:
      hosts: of the job.
      host_bytes, chip_bytes: of the state that a host's chips, and a chip, hold.
      step: seconds of a step, compiling: of compiling, where no measured ones are given.
      every: the configuration's checkpoint_every, to compare with.

    Returns:
      checkpoint_every, expected (goodput); configured (the same with `every`); hosts; mtbf_hours,
      the job's; what it was computed with, by the names in `Failures`; and `estimated`, those of
      them that nobody measured.
    """
    estimates = {
        "host_mtbf_hours": HOST_MTBF_HOURS,
        "step_seconds": step,
        "save_seconds": chip_bytes / COPY_RATE,
        "write_seconds": host_bytes / STORAGE_RATE,
        "restart_seconds": COMING_BACK + host_bytes / STORAGE_RATE + compiling,
    }
    given = {name: getattr(failures, name) for name in estimates}
    used = {name: estimates[name] if given[name] is None else given[name] for name in estimates}
    mtbf = used["host_mtbf_hours"] * 3600 / hosts
    save, write, seconds = (used[f"{name}_seconds"] for name in ("save", "write", "step"))
    best = max(1, round(max(best_interval(save, mtbf), write) / seconds))
    costs = {"save": save, "write": write, "restart": used["restart_seconds"], "mtbf": mtbf}
    return {
        "checkpoint_every": best,
        "expected": expected_goodput(best * seconds, **costs),
        "configured": {
            "checkpoint_every": every,
            "expected": expected_goodput(every * seconds, **costs),
        },
        "hosts": hosts,
        "mtbf_hours": mtbf / 3600,
        **used,
        "estimated": [name for name in estimates if given[name] is None],
    }
