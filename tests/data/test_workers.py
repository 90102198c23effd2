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


def test_each_job_gets_its_own_values(pool) -> None:
    def run(number: int) -> None:
        shared = pool.share()
        pool(("fill", number), shared)
        assert np.all(shared.arrays["number"] == number) and np.all(
            shared.arrays["values"] == number
        )

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(run, range(400)))


def test_rows_of_one_block_are_filled_by_any_worker(pool) -> None:
    shared = pool.share()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda row: pool(("row", row), shared, row), range(3)))
    assert shared.arrays["values"].tolist() == [[row] * 5000 for row in range(3)]


def test_memory_is_used_again_when_nobody_has_a_view_of_it() -> None:
    workers = make(1)
    first = workers.share()
    workers(("fill", 1), first)
    place, kept = first.offset, first.arrays["values"][1, ::7][3:]  # a view of a view
    del first
    second = workers.share()
    workers(("fill", 2), second)
    assert second.offset != place and np.all(kept == 1)
    del kept
    assert workers.share().offset == place
    values = second.arrays["values"]
    workers.close()
    del workers, second
    assert np.all(values == 2)  # it outlives the workers


def test_many_that_are_kept_hold_few_descriptors() -> None:
    workers, before = make(1), len(os.listdir("/proc/self/fd"))
    kept = [workers.share() for _ in range(300)]
    workers(("fill", 5), kept[-1])
    assert len({shared.offset for shared in kept}) == 300 and np.all(kept[-1].arrays["values"] == 5)
    assert len(os.listdir("/proc/self/fd")) - before < 12
    worker = workers.pids[0]
    assert len(os.listdir(f"/proc/{worker}/fd")) < 16
    workers.close()
    with pytest.raises(WorkersClosed):
        workers.share()


def test_memory_that_nobody_needs_goes_back() -> None:
    def resident() -> int:
        return os.fstat(workers._fd).st_blocks * 512

    workers = make(1)
    kept = [workers.share() for _ in range(40)]
    for shared in kept:
        workers(("fill", 5), shared)
    one, most = kept[7].arrays["values"], resident()
    del kept, shared
    assert resident() < most / 3
    workers.close()
    assert resident() < most / 8 and np.all(one == 5)


def test_what_a_job_raises_names_its_part(pool) -> None:
    with pytest.raises(InputError, match=r"^part 1 of 7: 7 is refused$"):
        pool(("refuse", 7), pool.share())
    with pytest.raises(RuntimeError, match=r"^part 1 of 8: a data worker failed:\n(.|\n)*KeyError"):
        pool(("fail", 8), pool.share())
    pool(("fill", 9), pool.share())  # and the worker goes on


def test_reads_that_a_worker_made_again_are_counted_here(pool) -> None:
    before = retry.counted()
    for number in (3, 0, 4):
        pool(("retry", number), pool.share())
    assert retry.counted() == before + 7


def test_workers_import_only_what_they_need(pool) -> None:
    shared = pool.share()
    pool(("modules", 0), shared)
    assert not shared.arrays["number"].any()


def test_what_a_worker_prints_is_no_result() -> None:
    program = """
from tests.data.test_workers import make
workers = make(1)
workers(("print", 1), workers.share())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""


def test_a_death_before_the_first_part_is_told() -> None:
    workers = make(1)
    with pytest.raises(WorkerDied, match="was killed by SIGTERM while it worked on part -1 of 3"):
        workers(("die first", 3), workers.share())


def test_a_death_is_told_to_all_who_wait() -> None:
    workers = make(1)
    pid = workers.pids[0]
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(workers, ("sleep", n), workers.share()) for n in range(4)]
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
            workers(("sleep", 0), workers.share())
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
