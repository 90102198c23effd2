"""Worker processes: each job's values arrive whole, and nothing that happens to one is lost."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from echovlm_jax.data.workers import WorkerDied, Workers, WorkersClosed
from echovlm_jax.errors import InputError
from echovlm_jax.storage import retry
from tests.data import jobs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pool():
    with_two = make(2)
    yield with_two
    with_two.close()


def make(count: int) -> Workers:
    return Workers(jobs.fill, count, jobs.LAYOUT, lambda job, part: f"part {part} of {job[1]}")


def empty() -> dict[str, np.ndarray]:
    return {name: np.empty(*of) for name, of in jobs.LAYOUT.items()}


def test_each_job_gets_its_own_values(pool) -> None:
    def run(number: int) -> None:
        out = empty()
        pool(("fill", number), out)
        assert out["number"] == number and np.all(out["values"] == number)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(run, range(400)))


def test_what_a_job_raises_names_its_part(pool) -> None:
    with pytest.raises(InputError, match=r"^part 1 of 7: 7 is refused$"):
        pool(("refuse", 7), empty())
    with pytest.raises(RuntimeError, match=r"^part 1 of 8: a data worker failed:\n(.|\n)*KeyError"):
        pool(("fail", 8), empty())
    pool(("fill", 9), empty())  # and the worker goes on


def test_reads_that_a_worker_made_again_are_counted_here(pool) -> None:
    before = retry.counted()
    for number in (3, 0, 4):
        pool(("retry", number), empty())
    assert retry.counted() == before + 7


def test_workers_import_only_what_they_need(pool) -> None:
    out = empty()
    pool(("modules", 0), out)
    assert out["number"] == 0


def test_what_a_worker_prints_is_no_result() -> None:
    program = """
from tests.data.test_workers import empty, make
make(1)(("print", 1), empty())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""


def test_a_death_before_the_first_part_is_told() -> None:
    workers = make(1)
    with pytest.raises(WorkerDied, match="was killed by SIGTERM while it worked on part -1 of 3"):
        workers(("die first", 3), empty())


def test_a_death_is_told_to_all_who_wait() -> None:
    workers = make(1)
    pid = workers.pids[0]
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(workers, ("sleep", n), empty()) for n in range(4)]
        while workers._workers[0].note() < 1:  # until it has begun
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        errors = {str(one.exception(60)) for one in waiting}
    (error,) = errors
    assert "SIGKILL while it worked on part 1 of 0" in error
    with pytest.raises(WorkerDied, match="part 1 of 0"):
        workers.check()


def test_closing_frees_those_who_wait() -> None:
    workers = make(1)
    errors: list[Exception] = []

    def run() -> None:
        try:
            workers(("sleep", 0), empty())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    workers.close()
    for thread in threads:
        thread.join(60)
    assert [type(error) for error in errors] == [WorkersClosed] * 3
    workers.close()  # again: nothing
