"""Where a run's time goes, by a clock that the test sets."""

import threading
import time
from types import SimpleNamespace

import pytest

from echovlm_jax.train import clock as module
from echovlm_jax.train.clock import PARTS, Clock


class Time:
    """In place of `time`: stands still unless it is moved on."""

    def __init__(self) -> None:
        self.at = 1000.0

    def perf_counter(self) -> float:
        return self.at

    def time(self) -> float:
        return 5000 + self.at


@pytest.fixture
def now(monkeypatch):
    now = Time()
    monkeypatch.setattr(module, "time", now)
    return now


class Step:
    """What a step computes: not there before `finish`."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._finished = clock, threading.Event()
        self._number = clock._steps + 1
        clock.watch([self])

    def block_until_ready(self) -> None:
        assert self._finished.wait(60)

    def finish(self) -> None:
        self._finished.set()
        while len(self._clock._step_seconds) < self._number:
            time.sleep(0.001)


def parts(clock):
    found = clock.goodput()
    assert found["wall"] == pytest.approx(sum(found[part] for part in PARTS))
    return {part: found[part] for part in PARTS if found[part]}


def passing(now, seconds, then=lambda: None):
    def make():
        now.at += seconds
        then()
        return "a batch"

    return make


def test_only_waits_of_idle_devices_are_waits(now):
    clock = Clock()
    now.at += 10
    with clock.during("compile"):
        now.at += 20
    assert clock.data_wait(passing(now, 3)) == "a batch"  # nothing was begun: all of it
    one = Step(clock)
    now.at += 1
    clock.data_wait(passing(now, 5))  # the devices are at it all the while
    assert parts(clock) == {"start": 10, "compile": 20, "data_wait": 3, "step": 6}
    one.finish()
    two = Step(clock)
    now.at += 1

    def both() -> None:
        two.finish()
        now.at += 4

    clock.data_wait(passing(now, 2, both))  # they finish after two of six seconds
    three = Step(clock)
    now.at += 7
    three.finish()
    with clock.during("save"):
        now.at += 30
    clock.stop()
    now.at += 40
    found = parts(clock)
    assert found == {
        "start": 10, "compile": 20, "data_wait": 3 + 4, "step": 6 + 1 + 2 + 7, "save": 30,
        "other": 40,
    }  # fmt: skip
    report = clock.report()
    assert report["goodput"] == pytest.approx(16 / 123) and report["wall"] == 123
    # From when the batch was asked for, or the step before was finished: 3 + 6, 1 + 2, 4 + 7.
    assert sorted(clock._step_seconds) == [3, 9, 11]
    assert report["step_seconds"]["p50"] == 9 and report["step_seconds"]["max"] == 11


@pytest.mark.parametrize(
    ("last_sign", "lost", "between"),
    [(50, 50, 150), (-20, 0, 200), (900, 200, 0)],
    ids=["a line came after the checkpoint", "none did", "another machine's clock is ahead"],
)
def test_what_comes_after_a_checkpoint_is_lost(now, last_sign, lost, between):
    clock = Clock()
    now.at += 5
    clock.data_wait(passing(now, 1))
    now.at += 94
    kept, saved = clock.kept(), now.time()
    now.at += 200
    later = Clock()
    now.at += 7
    later.resume(kept, saved + last_sign, whole=False)
    expected = {"start": 5 + 7, "data_wait": 1, "step": 94, "lost": lost, "between": between}
    assert parts(later) == {name: seconds for name, seconds in expected.items() if seconds}
    assert later.goodput()["wall"] == 5 + 1 + 94 + 200 + 7
    again = Clock()
    again.resume(kept, saved + last_sign, whole=True)  # nothing was left to do in that time
    assert parts(again) == {"start": 5, "data_wait": 1, "step": 94}


def test_the_process_that_waits_for_data_is_named(now, monkeypatch):
    clock = Clock()
    clock.data_wait(passing(now, 2))
    assert "straggler" not in clock.report()
    monkeypatch.setattr(module.jax, "process_count", lambda: 3)
    others = SimpleNamespace(process_allgather=lambda own: [[own], [9.0], [own]])
    monkeypatch.setattr(module, "multihost_utils", others)
    assert clock.report()["straggler"] == {"process": 1, "data_wait": 9.0, "median": 2.0}
