"""How often to save: against Daly's own figures, and against jobs that fail in a simulation."""

import numpy as np
import pytest

from echovlm_jax.plan.goodput import (
    HOST_MTBF_HOURS,
    Failures,
    best_interval,
    expected_goodput,
    recommend,
)

HOUR = 3600.0
RESTARTING, STEPPING, WAITING, SAVING = range(4)


@pytest.mark.parametrize(("mtbf", "minutes"), [(24 * HOUR, 117), (6 * HOUR, 57), (HOUR / 4, 9.1)])
def test_the_interval_is_dalys(mtbf, minutes):
    """Figures 3 to 5 of his paper: saves of five minutes."""
    assert best_interval(300.0, mtbf) / 60 == pytest.approx(minutes, rel=0.01)


def test_where_a_save_takes_longer_than_hosts_last():
    assert best_interval(300.0, 100.0) == 100.0
    sizes = {"save": 300.0, "write": 0.0, "restart": 60.0}
    assert 0 < expected_goodput(100.0, **sizes, mtbf=100.0) < 0.05
    assert expected_goodput(100.0, **sizes, mtbf=0.01) == 0


def failure_times(hosts, host_mtbf, until, runs, rng):
    """[runs, N]: when a job's hosts fail, each host by itself, in order; then infinity."""
    most = int(until / host_mtbf + 10 * np.sqrt(until / host_mtbf) + 10)
    found = []
    for _ in range(runs):
        times = np.cumsum(rng.exponential(host_mtbf, (hosts, most)), axis=1)
        found.append(np.sort(times[times < until]))
    longest = max(map(len, found)) + 1
    return np.array([np.pad(t, (0, longest - len(t)), constant_values=np.inf) for t in found])


def simulate(intervals, failing, until, *, save, write, restart):
    """[I]: of jobs that save after so many seconds of steps each, the share of the time `until`
    that went into steps which a whole checkpoint holds. One event after the other, all at once."""
    failing = np.tile(failing, (len(intervals), 1))
    every = np.repeat(intervals, len(failing) // len(intervals))
    jobs = np.arange(len(every))
    now, at, mode = np.zeros(len(jobs)), np.zeros(len(jobs), int), np.full(len(jobs), STEPPING)
    left, whole_at = every.copy(), np.full(len(jobs), np.inf)
    counted, saved = np.zeros(len(jobs)), np.zeros(len(jobs))
    while now.min() < until:
        fails = failing[jobs, at]
        ends = np.where(mode == WAITING, np.inf, now + left)
        then = np.minimum(np.minimum(fails, ends), np.minimum(whole_at, until))
        left -= then - now
        now = then
        whole = now == whole_at
        counted = np.where(whole, saved, counted)
        whole_at[whole] = np.inf
        done = now == ends
        left[done] = 0.0
        begun = done & ((mode == RESTARTING) | (mode == SAVING))
        copied = done & (mode == SAVING)
        saved = np.where(copied, saved + every, saved)
        whole_at[copied] = now[copied] + write
        wants = (done & (mode == STEPPING)) | (mode == WAITING)
        mode[wants] = np.where(np.isinf(whole_at[wants]), SAVING, WAITING)
        left[wants & (mode == SAVING)] = save
        mode[begun] = STEPPING
        left[begun] = every[begun]
        failed = now == fails
        mode[failed], left[failed], whole_at[failed] = RESTARTING, restart, np.inf
        saved[failed] = counted[failed]
        at[failed] += 1
    return (counted / until).reshape(len(intervals), -1).mean(axis=1)


# Chips, chips a host, mean hours between failures of a host; seconds of a save, its writing, and a
# restart.
CASES = {
    "4 chips": (4, 4, HOST_MTBF_HOURS, 60.0, 300.0, 600.0),
    "256 chips": (256, 4, HOST_MTBF_HOURS, 5.0, 60.0, 600.0),
    "2,048 chips": (2048, 4, HOST_MTBF_HOURS, 5.0, 60.0, 600.0),
    "2,048 cards": (2048, 8, HOST_MTBF_HOURS, 20.0, 200.0, 900.0),
    "256 spot chips": (256, 4, 48.0, 5.0, 60.0, 400.0),
    "2,048 chips, hardly alive": (2048, 4, 200.0, 10.0, 100.0, 300.0),
}
# How far the formula may be from the simulation, in points of goodput; what the recommended
# interval may lose of the simulated best; and how many times that one it may be, or that it.
NEAR, LOSES, APART = 0.003, 0.0005, 1.3


def of(case, every=500):
    chips, each, hours, save, write, restart = CASES[case]
    known = Failures(hours, 1.0, save, write, restart)
    sizes = {"host_bytes": 0, "chip_bytes": 0, "step": 0, "compiling": 0, "every": every}
    found = recommend(known, hosts=chips // each, **sizes)
    assert not found["estimated"]
    return found, {"save": save, "write": write, "restart": restart}


def failing_hosts(found, until, runs=200):
    rng = np.random.default_rng(0)
    return failure_times(found["hosts"], found["host_mtbf_hours"] * HOUR, until, runs, rng)


@pytest.mark.parametrize("case", CASES)
def test_a_simulation_of_failing_hosts_agrees(case):
    found, seconds = of(case)
    best, until = found["checkpoint_every"], 2400 * found["checkpoint_every"]
    shares = np.array([0.4, 1 / 1.3**2, 1 / 1.3, 1.0, 1.3, 1.3**2, 2.5])
    simulated = simulate(shares * best, failing_hosts(found, until), until, **seconds)
    assert found["expected"] == pytest.approx(simulated[3], abs=NEAR)
    assert simulated.max() - simulated[3] <= LOSES
    assert 1 / APART <= shares[np.argmax(simulated)] <= APART


def test_a_save_waits_for_the_one_before():
    found, seconds = of("256 spot chips", every=20)  # a third of what writing takes
    until = 400_000
    [simulated] = simulate(np.array([20.0]), failing_hosts(found, until), until, **seconds)
    assert found["configured"]["expected"] == pytest.approx(simulated, abs=NEAR)
    assert found["configured"]["expected"] < 0.5 * found["expected"]


def test_what_was_not_measured_is_estimated_and_said():
    sizes = {"host_bytes": 8e9, "chip_bytes": 2e9, "step": 0.5, "compiling": 60.0, "every": 500}
    found = recommend(Failures(step_seconds=2.0), hosts=64, **sizes)
    assert found["estimated"] == [
        "host_mtbf_hours", "save_seconds", "write_seconds", "restart_seconds"
    ]  # fmt: skip
    assert found["step_seconds"] == 2 and found["save_seconds"] == 0.25
    assert found["write_seconds"] == 8 and found["restart_seconds"] == 300 + 8 + 60
    assert 150 < found["mtbf_hours"] * 64 / 24 < 400  # the paper's hosts: most of a year
    daly = best_interval(0.25, found["mtbf_hours"] * HOUR)
    assert found["checkpoint_every"] == round(daly / 2)
    assert found["configured"]["expected"] < found["expected"] < 1
    slow = recommend(Failures(step_seconds=2.0, write_seconds=5000.0), hosts=64, **sizes)
    assert slow["checkpoint_every"] == 2500 > 2 * daly / 2  # no sooner than it is written
