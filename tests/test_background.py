"""Tests that run in a shell's background, where SIGINT is ignored, are the tests that they are."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
INNER = """
import os, signal, subprocess, sys, time

def test_a_child_can_be_interrupted():
    code = "import time; print(1, flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == -signal.SIGINT

def test_a_child_is_left_behind():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(os.environ["PID_FILE"], "w").write(str(child.pid))
    assert False, "on purpose"
"""


def test_children_hear_sigint_and_none_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "test_inner.py").write_text(INNER)
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    environment = os.environ | {"PID_FILE": str(tmp_path / "pid"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", 'trap "" INT; exec "$@"', "bash", *command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        cwd=tmp_path,
    )
    assert "1 failed, 1 passed" in done.stdout and "on purpose" in done.stdout, done.stdout
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_the_tests_own_wish_is_kept() -> None:
    """What was ignored stays without effect on the tests themselves."""
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
