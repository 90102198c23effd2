"""Real processes of jax.distributed on this machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = [sys.executable, str(ROOT / "launch" / "local_processes.py")]
PROGRAM = str(Path(__file__).with_name("psum.py"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def launch(*words: object, processes: int = 2, devices: int = 4) -> subprocess.CompletedProcess:
    command = [*LAUNCHER, "--processes", str(processes), "--devices", str(devices)]
    return subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )


@pytest.mark.parametrize(("processes", "devices"), [(2, 4), (4, 2)])
def test_a_sum_over_the_devices_of_all_processes(tmp_path, processes, devices):
    out = tmp_path / "sum.npz"
    done = launch("--", PROGRAM, "add", out, processes=processes, devices=devices)
    assert done.returncode == 0, done.stderr
    found = np.load(out)
    assert found["shape"].tolist() == [processes, devices, 8]
    assert found["held"].tolist() == [[1, 5]] * devices
    assert found["owners"].tolist() == [[i] * devices for i in range(processes)]
    np.testing.assert_array_equal(found["total"], found["rows"].sum(0, keepdims=True))


@pytest.mark.parametrize(
    ("words", "code", "process"),
    [(("fail", 1, 7), 7, 1), (("fail", 0, 3), 3, 0), (("raise", 1), 1, 1)],
)
def test_one_failure_ends_all(words, code, process):
    # The other one sleeps for ten minutes: only being killed makes it end in time.
    done = launch("--", "python", PROGRAM, *words)
    assert done.returncode == code
    assert f"local_processes: process {process} failed with exit code {code}; st" in done.stderr
    assert f"[{process}] process {process} gives up" in done.stdout.splitlines()
    assert ("ValueError: wrong on purpose" in done.stderr) == (words[0] == "raise")


def test_a_timeout_ends_all(tmp_path):
    done = launch("--timeout", 6, "--", PROGRAM, "sleep", tmp_path)
    assert done.returncode == 124
    assert "local_processes: not done after 6 seconds; stopping all" in done.stderr
    assert all(is_gone(int(file.read_text())) for file in tmp_path.glob("*.pid"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_launcher(tmp_path, number):
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("needs PR_SET_PDEATHSIG")
    options = ["--processes", "2", "--devices", "1", "--grace", "1"]
    command = [*LAUNCHER, *options, "--", PROGRAM, "sleep", tmp_path]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as launcher:
        try:
            files = [tmp_path / "0.pid", tmp_path / "1.pid"]
            assert eventually(lambda: all(file.exists() for file in files))
            pids = [int(file.read_text()) for file in files]
            assert not any(map(is_gone, pids))
            launcher.send_signal(number)
            code = launcher.wait(60)
        finally:
            launcher.terminate()
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    assert eventually(lambda: all(map(is_gone, pids)))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--",), "no program to run: give it after --"),
        (("--processes", "0", "--", "x.py"), "argument --processes: '0' is not a number of at l"),
    ],
)
def test_bad_usage_is_refused(words, named):
    done = launch(*words)
    assert done.returncode == 2
    assert named in done.stderr


def test_a_program_that_is_not_there_is_named():
    done = launch("--", "not_there.py", processes=1, devices=1)
    assert done.returncode == 1
    assert "not_there.py: no such file, and no program of that name on PATH" in done.stderr


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def eventually(holds, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.1)
    return False
