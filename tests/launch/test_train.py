"""launch/train.py as real processes, which join by each of the ways that need no cluster."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echovlm_jax.data.build import Options, build
from echovlm_jax.phantom.write import write_exams

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# What describes a job; a session that runs in one of its own may have it.
NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_JOB_ID")
KEYS = {
    "data_workers": 0,
    "seq_len": 512,
    "max_patches": 512,
    "allow_dropped": 1.0,
    "log_every": 1,
    "checkpoint_every": 1000,
    "eval_every": 1000,
}


def environment(**told: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if name not in NAMES}
    count = "--xla_force_host_platform_device_count=1"
    return {
        **ours,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"{FAST} {count}",
        **told,
    }


def explicit(process: int, port: int) -> dict[str, str]:
    address = f"127.0.0.1:{port}"
    return {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(process),
    }


def slurm(process: int, port: int) -> dict[str, str]:
    """As srun sets it for two tasks on one node; JAX takes the port from the job's number."""
    return {
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
        "JAX_COORDINATOR_PORT": str(port),
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_exams(folder, 12, 0, views=1)
    options = Options(validation=0.0, test=0.0)
    build([folder / "phantom.json"], folder, folder / "exams", options)
    return folder / "exams"


@pytest.fixture
def start(tmp_path):
    """Starts a process of train.py, whose output goes to files; none outlives the test."""
    started = []

    def start(name: str, words: list[str], told: dict[str, str]) -> subprocess.Popen:
        with open(tmp_path / f"{name}.out", "w") as out, open(tmp_path / f"{name}.err", "w") as err:
            process = subprocess.Popen(
                [sys.executable, TRAIN, *words], env=environment(**told), stdout=out, stderr=err
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def words(folder: Path, data: Path, **keys) -> list[str]:
    given = {**KEYS, "data": data, **keys}
    found = ["--config", str(ROOT / "configs" / "phantom.py"), "--workdir", str(folder / "run")]
    return [*found, *(f"--config.{key}={value}" for key, value in given.items())]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(processes: list[subprocess.Popen], folder: Path, seconds: float = 900) -> list[int]:
    try:
        return [process.wait(seconds) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join(path.read_text()[-2000:] for path in folder.glob("*.err")))


@pytest.mark.parametrize("way", [explicit, slurm])
def test_bad_input_ends_both_processes(tmp_path, data, start, way):
    """Which they find after they have joined: one by itself would not know of two devices."""
    port = free_port()
    wrong = words(tmp_path, data, **{"mesh.data": 3})
    codes = finish([start(str(i), wrong, way(i, port)) for i in range(2)], tmp_path)
    # Whoever is slower may be ended by the other's end before it has read as far.
    assert 2 in codes and 0 not in codes
    for i, code in enumerate(codes):
        said = (tmp_path / f"{i}.err").read_text()
        assert code != 2 or "makes 3 devices, but there are 2" in said, said


@pytest.mark.parametrize(
    ("told", "more", "named"),
    [
        ({"JAX_PROCESS_ID": "1"}, [], "has JAX_PROCESS_ID but not JAX_COORDINATOR_ADDRESS"),
        ({**explicit(0, 1), "JAX_PROCESS_ID": "two"}, [], "invalid literal"),
        ({**explicit(0, 1), "JAX_PROCESS_ID": "2"}, [], "process_id"),
        ({**explicit(0, 1), "ECHOVLM_HEARTBEAT": "soon"}, [], "ECHOVLM_HEARTBEAT is 'soon': must"),
        (explicit(0, 1), ["--step-timeout", "-1"], "must be a number of seconds, or 0"),
        (explicit(0, 1), ["--stepss", "3"], "unrecognized arguments: --stepss"),
    ],
)
def test_what_can_not_be_joined_is_one_line(tmp_path, start, told, more, named):
    process = start("0", [*words(tmp_path, tmp_path), *more], told)
    assert finish([process], tmp_path, 100) == [2]
    said = (tmp_path / "0.err").read_text()
    assert named in said and said.count("\n") == 1, said


@pytest.mark.slow
def test_two_processes_stop_with_75_and_the_same_command_goes_on(tmp_path, data, start):
    port, command = free_port(), words(tmp_path, data, steps=100_000)
    both = [start(str(i), command, explicit(i, port)) for i in range(2)]
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 1):
        assert all(process.poll() is None for process in both), (tmp_path / "0.err").read_text()
        time.sleep(0.2)
    both[1].send_signal(signal.SIGTERM)  # one host's notice is all hosts'
    assert finish(both, tmp_path) == [75, 75]
    result = json.loads((tmp_path / "0.out").read_text())
    assert result["stopped"] and result["saved_step"] == result["final_step"] > 0
    assert not (tmp_path / "1.out").read_text()
    done = result["saved_step"]

    # The number of steps may not change without a word.
    more = [f"--config.steps={done + 1}", "--change-config"]
    process = start("alone", [*command, *more], {})
    assert finish([process], tmp_path) == [0]
    said = (tmp_path / "alone.err").read_text()
    assert "the environment describes no job: training alone" in said
    assert f"training from step {done} to {done + 1}" in said
    assert json.loads((tmp_path / "alone.out").read_text())["final_step"] == done + 1
