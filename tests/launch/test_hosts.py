"""Hosts that are killed, stopped, slow or preempted: real processes of launch/train.py, each as on
a host of its own, so that nobody but themselves ends them."""

import contextlib
import ctypes
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from echovlm_jax.data.build import Options, build
from echovlm_jax.phantom.write import write_exams
from echovlm_jax.storage.layout import steps
from echovlm_jax.train.watch import LOST

ROOT = Path(__file__).parents[2]
DEVICES = 4  # of all processes together: the sums are the same, whatever their number
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
HEARTBEAT = 20  # seconds; a loss shows in less than half of it
BOUND = 60.0  # seconds, for the end of all
KEYS = {
    "data_workers": 0,
    "seq_len": 512,
    "max_patches": 128,
    "allow_dropped": 1.0,
    "steps": 8,
    "global_batch_size": 4,
    "log_every": 1,
    "eval_every": 4,
    "eval_batches": 1,
    "checkpoint_every": 2,
}
Shared = Callable[..., "Job"]

pytestmark = pytest.mark.slow


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


class Job:
    """So many processes of one job, which train in one folder."""

    def __init__(self, folder: Path, count: int, keys: dict, words: list[str], told: dict) -> None:
        self.folder, self.count = folder, count
        given = ["--config", str(ROOT / "configs/phantom.py"), "--workdir", str(folder / "run")]
        given += [f"--config.{key}={value}" for key, value in keys.items()] + words
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.said, self.processes = [], []
        for i in range(count):
            self.said.append(folder / f"{len(list(folder.glob('*.said')))}.said")
            environment = {
                **{k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_"))},
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
                "XLA_FLAGS": f"{FAST} --xla_force_host_platform_device_count={DEVICES // count}",
                "NPROC": str(DEVICES),
                "ECHOVLM_HEARTBEAT": str(HEARTBEAT),
                **told,
            }
            if count > 1:
                environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(i)}
                environment |= {"JAX_COORDINATOR_BIND_ADDRESS": address}
                environment |= {"JAX_NUM_PROCESSES": str(count)}
            with open(self.said[-1], "w") as file:
                command = [sys.executable, str(ROOT / "launch/train.py"), *given]
                process = subprocess.Popen(
                    command, env=environment, stdout=file, stderr=file, preexec_fn=die_with_parent
                )
                self.processes.append(process)

    def text(self, i: int) -> str:
        return self.said[i].read_text()

    def until(self, holds: Callable[[], bool], seconds: float = 400) -> None:
        """Waits for something to hold, or the job's end."""
        deadline = time.monotonic() + seconds
        while not holds() and all(process.poll() is None for process in self.processes):
            assert time.monotonic() < deadline, self.text(0)[-3000:]
            time.sleep(0.02)

    def codes(self, seconds: float, besides: int | None = None) -> list[int | None]:
        """Exit codes, of all that end in so many seconds; the others' are None."""
        deadline = time.monotonic() + seconds
        for i, process in enumerate(self.processes):
            if i != besides:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(deadline - time.monotonic(), 0.1))
        return [process.poll() for process in self.processes]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[Shared]:
    """Starts jobs on one dataset, which keep their programs for one another."""
    folder = tmp_path_factory.mktemp("shared")
    write_exams(folder, 24, 0, views=1)
    options = Options(validation=0.25, test=0.0)
    build([folder / "phantom.json"], folder, folder / "exams", options)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    jobs: list[Job] = []

    def start(run: Path, count: int, *words: str, told: dict | None = None, **keys: object) -> Job:
        run.mkdir(exist_ok=True)
        keys = {**KEYS, "data": folder / "exams", **keys}
        jobs.append(Job(run, count, keys, list(words), {**cache, **(told or {})}))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


def finish(job: Job) -> list[dict]:
    assert job.codes(600) == [0] * job.count, job.text(0)[-3000:]
    return lines(job)


def lines(job: Job) -> list[dict]:
    text = (job.folder / "run/metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def losses(found: list[dict]) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in found if "loss" in line}


@pytest.fixture(scope="module")
def right(shared, tmp_path_factory) -> dict[int, float]:
    """The losses of a run that nothing happens to."""
    found = losses(finish(shared(tmp_path_factory.mktemp("right"), 1)))
    assert list(found) == list(range(1, KEYS["steps"] + 1))
    return found


def same(found: dict[int, float], right: dict[int, float], rtol: float = 1e-4) -> None:
    assert found.keys() == right.keys()
    np.testing.assert_allclose(list(found.values()), list(right.values()), rtol=rtol)


def logged(job: Job, count: int) -> bool:
    path = job.folder / "run/metrics.jsonl"
    return path.exists() and path.read_text().count('"loss"') >= count


def at_moment(job: Job, moment: str, rng: random.Random) -> None:
    """Waits for a moment of the job, and a bit."""
    checkpoints = job.folder / "run/checkpoints"
    count = rng.randint(1, KEYS["steps"] - 2)
    holds = {
        "compile": lambda: "compiling for" in job.text(0),
        "step": lambda: logged(job, count),
        "save": lambda: any(checkpoints.glob("*.unfinished*")) if checkpoints.exists() else False,
        "evaluate": lambda: logged(job, 4),
    }[moment]
    job.until(holds)
    time.sleep(rng.uniform(0, 0.5))


def ends_named(job: Job, victim: int, text: str, code: int = LOST) -> None:
    """All others end, with the line that names the victim and its host."""
    codes = job.codes(BOUND, besides=victim)
    host = re.escape(socket.gethostname())
    for i, found in enumerate(codes):
        if i != victim:
            assert found == code, f"{i} of {codes}:\n{job.text(i)[-3000:]}"
            assert re.search(rf"echovlm: process {victim} \({host}\) {text}", job.text(i)), (
                job.text(i)[-3000:]
            )


# What is done to a process, and when. In a save and while compiling, each.
SCENARIOS = [
    (seed, action, moment)
    for seed, (action, moment) in enumerate(
        [
            *(("kill", m) for m in ("compile", "step", "step", "save", "save", "evaluate")),
            *(("stop", m) for m in ("compile", "step", "step", "save", "save", "evaluate")),
            *(("preempt", m) for m in ("compile", "step", "save", "evaluate", "step")),
            *(("slow", m) for m in ("compile", "step", "save")),
        ]
    )
]


@pytest.mark.parametrize(("seed", "action", "moment"), SCENARIOS)
def test_it_ends_as_promised_and_goes_on(shared, right, tmp_path, seed, action, moment):
    rng = random.Random(seed)
    count, then = rng.choice([2, 2, 4]), rng.choice([1, 1, 2, 4])
    victim = rng.randrange(count)
    # A program that is there already is not compiled.
    told = {"JAX_COMPILATION_CACHE_DIR": ""} if moment == "compile" else {}
    job = shared(tmp_path, count, told=told)
    at_moment(job, moment, rng)
    process = job.processes[victim]
    if action == "kill":
        process.kill()
        ends_named(job, victim, "is lost")
        assert process.wait() == -signal.SIGKILL
    elif action == "stop":
        process.send_signal(signal.SIGSTOP)
        ends_named(job, victim, "is lost")
        process.send_signal(signal.SIGCONT)  # it finds that nobody is there, and ends too
        assert process.wait(BOUND) not in (0, 2)
    elif action == "preempt":
        process.send_signal(signal.SIGTERM)
        codes = job.codes(600)
        assert codes in ([75] * count, [0] * count), job.text(victim)[-3000:]
        assert max(steps(tmp_path / "run/checkpoints")) == max(losses(lines(job)))
    else:
        for _ in range(rng.randint(3, 6)):
            process.send_signal(signal.SIGSTOP)
            time.sleep(rng.uniform(0.5, 3))  # it is not taken for lost
            process.send_signal(signal.SIGCONT)
            time.sleep(rng.uniform(0.1, 1))
        assert job.codes(600) == [0] * count
    same(losses(finish(shared(tmp_path, then))), right)


def test_a_slice_is_lost_and_fewer_go_on(shared, right, tmp_path):
    """Each process is a slice. The same global batch on half the devices: the same losses."""
    job = shared(tmp_path, 4, **{"mesh.dcn.data": 4, "mesh.data": 1})
    job.until(lambda: logged(job, 5))
    job.processes[2].kill()
    ends_named(job, 2, "is lost")
    two = {"mesh.dcn.data": 2, "mesh.data": 1}
    flags = f"{FAST} --xla_force_host_platform_device_count=1"
    job = shared(tmp_path, 2, "--change-config", told={"XLA_FLAGS": flags}, **two)
    found = finish(job)
    assert "training from step 4 to 8" in job.text(0)
    same(losses(found), right, 1e-3)
    assert [line["tokens"] for line in found if "loss" in line]


def children(pid: int) -> list[int]:
    """The processes that a process has started: data workers, and who runs users' patterns."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("victim", [0, 1])
def test_data_that_never_comes_is_named(shared, right, tmp_path, victim):
    """The data workers stand still. Where they live again they end: their parent is gone."""
    job = shared(tmp_path, 2, "--step-timeout", "5", data_workers=1, steps=100)
    job.until(lambda: logged(job, 3))
    workers = children(job.processes[victim].pid)
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    try:
        # Ten steps' time, where that is longer.
        codes = job.codes(200)
        assert codes == [LOST] * 2, job.text(victim)[-3000:]
        for i in range(2):
            # Who sees it first says that it hangs, or that the others wait for it.
            assert re.search(rf"process {victim} \(\S+\) hangs.* waits .*data", job.text(i))
        assert "train/watch.py" in job.text(victim)  # where each of its threads stands
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_slow_host_is_named(shared, tmp_path):
    """It stands still for half of the time."""
    job = shared(tmp_path, 2, steps=60, checkpoint_every=1000, eval_every=1000)
    job.until(lambda: logged(job, 3))
    deadline = time.monotonic() + 120
    while "is slow" not in job.text(0) and time.monotonic() < deadline:
        job.processes[1].send_signal(signal.SIGSTOP)
        time.sleep(1)
        job.processes[1].send_signal(signal.SIGCONT)
        time.sleep(1)
    assert re.search(r"process 1 \(\S+\) is slow: of a step's [\d.]+ s", job.text(0))
    for process in job.processes:
        process.send_signal(signal.SIGTERM)
    assert job.codes(200) in ([75, 75], [0, 0])
