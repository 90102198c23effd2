"""Who is lost, hangs or is slow: told by what processes tell, and with real ones."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from echovlm_jax.cli.frame import explain
from echovlm_jax.errors import InputError
from echovlm_jax.storage import retry
from echovlm_jax.train import watch as module
from echovlm_jax.train.watch import LOST, Watch

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()


class Coordinator:
    """JAX's store of keys, in this process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        if key in self.values and not allow_overwrite:
            raise RuntimeError(f"ALREADY_EXISTS: {key}")
        self.values[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [item for item in self.values.items() if item[0].startswith(f"{key}/")]


def watches(count: int, **options: float) -> list[Watch]:
    """Those of so many processes, whose threads the test is."""
    coordinator: Any = Coordinator()
    made = [Watch(25.0, **options) for _ in range(count)]
    for i, watch in enumerate(made):
        watch._index, watch._client, watch._place = i, coordinator, "w"
        watch._tell()
    return made


def beat(watches: list[Watch]) -> list[dict | None]:
    """All tell; then they know what all have told."""
    for watch in watches:
        watch._tell()
    return [watch._exchange() for watch in watches]


def step(watches: list[Watch], number: int) -> None:
    for watch in watches:
        watch.next(iter([0]), number)
        watch.made(number + 1)


def test_who_is_no_longer_heard_of_is_lost():
    a, b, c = all_ = watches(3)
    for _ in range(module._SILENT + 1):
        beat(all_)
        assert not any(watch._judge() for watch in all_)
    for _ in range(module._SILENT - 1):
        beat([a, c])
        assert a._judge() is None and c._judge() is None
    beat([a, c])
    beat([a, c])
    for watch in (a, c):
        assert re.match(r"\(1, 'is lost: not heard of for \d s", str(watch._judge()))
    # One that has stood still itself heard of nobody, and suspects nobody.
    b._exchange()
    assert b._judge() is None


def test_who_has_ended_is_not_lost():
    a, b = watches(2)
    b._tell(done=True)
    for _ in range(3 * module._SILENT):
        a._exchange()
    assert a._judge() is None


def test_the_first_accusation_stands(capfd, monkeypatch):
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    a, b = watches(2)
    a._beat = b._beat = 0.001
    b._accuse(1, "hangs")
    a._accuse(1, "is lost")
    for watch, verdict in zip((a, b), beat([a, b]), strict=True):
        assert verdict is not None
        watch._leave(verdict)
    assert left == [LOST, LOST]
    said = capfd.readouterr().err
    assert said.count(f"echovlm: process 1 ({HOST}) hangs; all processes end") == 2
    assert "is lost" not in said
    assert said.count("Current thread 0x") == 1  # where the accused one stands, and who else lives


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError("mine"), 2), (OSError(28, "No space left"), 2), (KeyError("mine"), 70)],
)
def test_the_others_end_with_the_code_of_one_that_failed(capfd, monkeypatch, error, code):
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    a, b = both = watches(2)
    a._beat = b._beat = 0.001
    b._exit_code = lambda error: explain(error)[1]  # as `train` has it
    b._thread = threading.Thread(target=int)
    b._thread.start()
    b._restore = int
    b.__exit__(type(error), error, None)
    verdict, _ = beat(both)
    assert verdict is not None
    a._leave(verdict)
    assert left == [code] and f"process 1 ({HOST}) failed: " in capfd.readouterr().err


def hang(watch: Watch, what: str, number: int) -> None:
    """It has done this for an hour."""
    watch._now = (what, number, time.monotonic() - 3600)


def test_who_waits_for_its_data_hangs_and_not_who_waits_for_it():
    a, b, c = all_ = watches(3, step_timeout=600.0)
    for number in range(3):
        step(all_, number)
    hang(a, module._STEP, 4)
    hang(b, module._DATA, 4)
    hang(c, module._STEP, 4)
    beat(all_)
    for watch in all_:
        assert watch._judge() == (1, "hangs: it waits 3600 s for the data of step 4")


def test_who_is_behind_hangs():
    a, b = both = watches(2, step_timeout=600.0)
    for number in range(3):
        step(both, number)
    hang(a, module._STEP, 4)
    hang(b, module._ELSE, 3)  # saves, for instance, and may take long if nobody waits
    beat(both)
    said = "hangs in step 3 for 3600 s, where it saves, evaluates or logs; others wait for it"
    assert a._judge() == (1, said)


def test_where_all_hang_it_is_the_devices():
    a, b = both = watches(2, step_timeout=600.0)
    for number in range(3):
        step(both, number)
    hang(a, module._STEP, 4)
    hang(b, module._STEP, 4)
    beat(both)
    assert "as all do: it is the devices" in (a._judge() or (0, ""))[1]


@pytest.mark.parametrize(
    ("steps", "what", "longest", "timeout"),
    [
        (3, module._ELSE, 0, 600.0),  # evaluates or saves
        (1, module._STEP, 0, 600.0),  # the second step
        (3, module._STEP, 0, 0.0),
        (3, module._STEP, 400, 600.0),  # ten times the longest step
    ],
)
def test_what_may_take_long(steps, what, longest, timeout):
    [watch] = watches(1, step_timeout=timeout)
    for number in range(steps):
        step([watch], number)
    watch._longest = max(watch._longest, longest)
    hang(watch, what, steps + 1)
    watch._exchange()
    assert watch._judge() is None


def test_a_slow_process_is_named_once(capsys):
    a, b, _ = all_ = watches(3)
    for window in range(3):
        beat(all_)
        a._mark = a._mark[0] - 10.0, a._mark[1]  # ten seconds for five steps
        a._compare()
        for number in range(5):
            step(all_, 5 * window + number)
        b._waited += 5.0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"process 1 ({HOST}) is slow" in said[0]
    assert re.search(r"of a step's \d+\.\d\d s it .* 1\.00 s; the others 0\.00 s", said[0])


def test_equally_slow_ones_are_not_named(capsys):
    all_ = watches(3)
    for window in range(3):
        beat(all_)
        all_[0]._mark = all_[0]._mark[0] - 10.0, all_[0]._mark[1]
        all_[0]._compare()
        for number in range(5):
            step(all_, 5 * window + number)
        for watch in all_:
            watch._waited += 5.0
    assert not capsys.readouterr().err


def test_retries_are_those_of_all(monkeypatch):
    a, b = both = watches(2)
    counted = {"a": 3, "b": 4}
    monkeypatch.setattr(retry, "counted", lambda: counted["b"])
    b._tell()
    monkeypatch.setattr(retry, "counted", lambda: counted["a"])
    assert a.retries() == 3
    a._exchange()
    assert a.retries() == 7 and len(both) == 2


# --- Real processes -------------------------------------------------------------------------------


@contextlib.contextmanager
def running(folder: Path, count: int, *words: str) -> Iterator[list[subprocess.Popen]]:
    """watched.py as so many processes that have made steps, each with its output in a file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = []
    program = str(ROOT / "tests/distributed/watched.py")
    for i in range(count):
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("JAX_")},
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "ECHOVLM_HEARTBEAT": "10",
        }
        command = [sys.executable, program, str(folder), *words]
        if count > 1:
            environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(i)}
            environment |= {"JAX_COORDINATOR_BIND_ADDRESS": address}
            environment |= {"JAX_NUM_PROCESSES": str(count)}
            command[1:1] = [str(ROOT / "launch/join.py")]
        with open(folder / f"{i}.said", "w") as said:
            processes.append(subprocess.Popen(command, env=environment, stderr=said, stdout=said))
    try:
        deadline = time.monotonic() + 100
        while not all((folder / str(i)).exists() for i in range(count)):
            assert time.monotonic() < deadline, (folder / "0.said").read_text()
            time.sleep(0.05)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        (1, signal.SIGKILL),
        (0, signal.SIGKILL),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_the_others_end_and_name_it(tmp_path, victim, number):
    with running(tmp_path, 3) as processes:
        processes[victim].send_signal(number)
        for i, process in enumerate(processes):
            if i != victim:
                assert process.wait(60) == LOST
                said = (tmp_path / f"{i}.said").read_text()
                assert f"echovlm: process {victim} ({HOST}) is lost" in said, said
        if number == signal.SIGSTOP:
            processes[victim].send_signal(signal.SIGCONT)
            assert processes[victim].wait(60) == LOST
            said = (tmp_path / f"{victim}.said").read_text()
            assert f"echovlm: process {victim} ({HOST}) " in said, said


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_that_gets_no_data_is_named(tmp_path, count):
    with running(tmp_path, count, "2", str(count - 1)) as processes:
        for i, process in enumerate(processes):
            assert process.wait(60) == LOST
            said = (tmp_path / f"{i}.said").read_text()
            assert f"process {count - 1} ({HOST}) hangs: it waits " in said
            assert ("in batches" in said) == (i == count - 1)  # where it stands


@pytest.mark.slow
def test_a_failure_is_told_to_the_others(tmp_path):
    """A file that one process alone can't write."""
    with running(tmp_path, 2) as processes:
        (tmp_path / "1").unlink()
        (tmp_path / "1").mkdir()  # its next write fails
        assert [process.wait(60) for process in processes] == [1, 1]
    said = (tmp_path / "0.said").read_text()
    assert f"process 1 ({HOST}) failed: IsADirectoryError" in said, said


def test_what_else_aborts_does_abort():
    program = (
        "import os; from echovlm_jax.train.watch import _at_abort\n"
        "undo = _at_abort(lambda: print('asked', flush=True)); os.abort()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == -signal.SIGABRT and done.stdout == "asked\n", done.stderr


def test_an_error_goes_on_where_nobody_else_is():
    with pytest.raises(InputError, match="mine"), Watch(10.0):
        raise InputError("mine")
