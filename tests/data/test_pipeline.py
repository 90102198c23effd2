"""Batches: the same bytes however many processes and workers make them, from wherever they start;
and no process that dies, or is left behind, goes unnoticed."""

import gc
import hashlib
import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echovlm_jax.data import global_arrays, make_batches, pipeline
from echovlm_jax.data.epoch import Epochs
from echovlm_jax.data.examples import open_source
from echovlm_jax.data.record import ORGANS
from echovlm_jax.data.settings import Settings
from echovlm_jax.data.tasks import TASKS
from echovlm_jax.data.workers import WorkerDied, Workers
from echovlm_jax.errors import InputError
from echovlm_jax.processing import ImageConfig, make_batch
from echovlm_jax.processing.images import images_to_patches
from tests.data import fakes
from tests.data.fakes import config

ROOT = Path(__file__).parents[2]
PER_PATCH = ("patches", "patch_segment_ids", "patch_positions")


@pytest.fixture(autouse=True)
def _fakes(monkeypatch) -> None:
    fakes.use(monkeypatch)


def conversations(**changes):
    """Of each exam its own conversation, which names it."""
    tasks = dict.fromkeys(TASKS, 0.0) | {"conversation": 1.0}
    return config(task_weights=tasks, **changes)


def take(cfg, n: int, **where) -> list[dict[str, np.ndarray]]:
    batches = make_batches(cfg, **where)
    out = list(itertools.islice(batches, n))
    batches.close()
    return out


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes()
        for k in a
    )


def steps_in_epoch(cfg) -> int:
    settings = Settings.from_config(cfg)
    epoch = Epochs(open_source(settings)).epoch(0)
    return (len(epoch.offsets) - 1) // settings.global_batch_size


def segments(batch, source):
    """Of each exam: (its number, row, columns, frames' numbers in the row, patches' places)."""
    for row in range(len(batch["tokens"])):
        patch = frame = 0
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            at = np.flatnonzero(batch["segment_ids"][row] == segment)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
            tokens = batch["tokens"][row, at]
            text = source.tokenizer.decode(tokens.tolist())
            (number,) = re.findall(r"Exam (\d+)\?", text)
            count = 4 * int((batch["patch_index"][row, at] >= 0).sum())
            ids = batch["patch_segment_ids"][row, patch : patch + count]
            yield int(number), row, at, frame, slice(patch, patch + count)
            patch, frame = patch + count, max(frame, int(ids.max(initial=0)))


# What a batch is.


def test_a_packed_row_is_the_exams_alone() -> None:
    cfg = conversations()
    source = open_source(Settings.from_config(cfg))
    pixels = ImageConfig(max_pixels=64 * 14 * 14)
    seen = 0
    for batch in take(cfg, steps_in_epoch(cfg)):
        for number, row, at, frame, where in segments(batch, source):
            media = source.dataset.media(number)
            inputs = {"input_ids": batch["tokens"][row, at][None]}
            for kind, dims, key in (
                ("image", 3, "pixel_values"),
                ("video", 4, "pixel_values_videos"),
            ):
                if of_kind := [m for m in media if m.ndim == dims]:
                    inputs[key], inputs[f"{kind}_grid_thw"] = images_to_patches(of_kind, pixels)
            alone = make_batch(source.model, inputs)
            organ = ORGANS.index(source.dataset.record(number).organ)
            assert np.all(batch["organs"][row, at] == organ)
            assert np.array_equal(batch["positions"][row][:, at], alone["positions"][0])
            index = batch["patch_index"][row, at]
            if media:
                shifted = alone["patch_index"][0] + np.where(index >= 0, where.start // 4, 0)
                assert np.array_equal(index, shifted)
                for key in PER_PATCH:
                    ours = batch[key][row, where] - (frame if key == "patch_segment_ids" else 0)
                    assert np.array_equal(ours, alone[key][0]), key
            seen += len(media) > 1
    assert seen > 5


def test_what_is_left_of_a_row_is_padding() -> None:
    (batch,) = take(config(), 1)
    free = batch["segment_ids"] == 0
    assert free.any() and not free.all(axis=1).any()
    assert np.all(batch["tokens"][free] == 0) and np.all(batch["labels"][free] == -100)
    assert np.all(batch["patch_index"][free] == -1)
    free = batch["patch_segment_ids"] == 0
    assert free.any() and not batch["patches"][free].any()
    assert not batch["patch_positions"][free].any()


def test_labels_are_the_answers() -> None:
    cfg = config()
    source = open_source(Settings.from_config(cfg))
    (batch,) = take(cfg, 1)
    learned = batch["labels"] != -100
    assert np.array_equal(batch["labels"][learned], batch["tokens"][learned])
    start, end = (source.tokenizer.token_id(f"<|im_{word}|>") for word in ("start", "end"))
    opening = [start, *source.tokenizer.encode("assistant\n")]
    for tokens, mask in zip(batch["tokens"].tolist(), learned.tolist(), strict=True):
        expected = [False] * len(tokens)
        for at in range(len(tokens)):
            if tokens[at : at + len(opening)] == opening:
                first = at + len(opening)
                last = tokens.index(end, first) + 1  # and a line end behind it
                expected[first : last + 1] = [True] * (last + 1 - first)
        assert mask == expected and any(mask)
        text = source.tokenizer.decode(np.array(tokens)[mask].tolist())
        assert not re.search(r"assistant|user|Exam \d+\?", text)


@pytest.mark.parametrize(
    "mix",
    [{}, {"mix_temperature": None, "organ_weights": {"breast": 1.0, "liver": 1.0, "thyroid": 2.0}}],
    ids=["as they are", "weighted"],
)
def test_each_sample_comes_once_in_an_epoch(mix) -> None:
    cfg = conversations(**mix)
    source = open_source(Settings.from_config(cfg))
    epoch = Epochs(source).epoch(0)
    batches = take(cfg, steps_in_epoch(cfg))
    found = Counter(number for batch in batches for number, *_ in segments(batch, source))
    assert found == Counter(epoch.record.tolist())
    assert set(found) == set(range(40))
    if not mix:
        assert set(found.values()) == {1}


def test_without_patches_there_are_no_patch_arrays() -> None:
    (batch,) = take(config(max_patches=0), 1)
    assert set(batch) == {"tokens", "labels", "segment_ids", "positions", "organs"}
    assert batch["segment_ids"].max() > 1


def test_global_arrays_are_the_batch() -> None:
    (batch,) = take(config(), 1)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    like = {
        key: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        for key, array in batch.items()
    }
    arrays = global_arrays(batch, like)
    assert same({key: np.asarray(array) for key, array in arrays.items()}, batch)
    assert arrays["patches"].sharding == sharding
    half = {"patches": jax.ShapeDtypeStruct(batch["patches"].shape, "bfloat16", sharding=sharding)}
    assert global_arrays(batch, half)["patches"].dtype == "bfloat16"


# The same bytes, whoever makes them.


def test_the_union_over_processes_is_one_batch() -> None:
    steps = steps_in_epoch(config()) + 2
    whole = take(config(), steps)
    for count in (2, 4, 8):
        parts = [take(config(), steps, process_index=p, process_count=count) for p in range(count)]
        for step in range(steps):
            rows = [part[step] for part in parts]
            union = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
            assert same(union, whole[step]), (count, step)


def test_start_step_goes_on_where_a_run_would_be() -> None:
    steps = steps_in_epoch(config()) + 3
    whole = take(config(), steps)
    assert not same(whole[0], whole[steps - 3])  # another epoch, another order
    for start in range(1, steps):
        assert same(take(config(), 1, start_step=start)[0], whole[start]), start
    assert same(take(config(), 3, start_step=steps - 3)[2], whole[-1])


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_workers_change_nothing(workers) -> None:
    here = take(config(), 4)
    assert all(map(same, take(config(data_workers=workers), 4), here))


def test_planning_ahead_changes_nothing(monkeypatch, tmp_path) -> None:
    steps = 2 * steps_in_epoch(config()) + 2
    here = take(config(), steps)
    monkeypatch.setattr(pipeline, "PLAN_AHEAD", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    batches = make_batches(config(data_workers=1))
    assert all(map(same, itertools.islice(batches, steps), here))
    assert list(tmp_path.glob("echovlm-plan-*")), "no epoch was planned ahead"
    batches.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"process_count": 3}, "multiple of the number of processes"),
        ({"process_index": 2, "process_count": 2}, "process 2 of 2"),
        ({"start_step": -1}, "start_step must be a whole number of at least 0"),
    ],
)
def test_impossible_places_are_refused(where, message) -> None:
    with pytest.raises(InputError, match=message):
        make_batches(config(), **where)


@pytest.mark.parametrize("key", ["data_workers", "global_batch_size", "max_image_patches", "seed"])
def test_impossible_values_are_refused(key) -> None:
    with pytest.raises(InputError, match=rf"config key {key} must be at least \d; found -1"):
        make_batches(config(**{key: -1}))
    with pytest.raises(InputError, match="the configuration lacks data"):
        make_batches({})


# Processes that die, or should.


def late(cfg) -> int:
    """An exam with images that an epoch has in its last batch but one."""
    epochs = Epochs(open_source(Settings.from_config(cfg)))
    step = steps_in_epoch(cfg) - 2
    records = [sample.record for row in range(8) for sample in epochs.row(step, row)]
    return next(i for i in records if epochs.source.dataset.record(i).media)


def collect(cfg, seconds: float = 60) -> None:
    """Takes batches until there is an error, which it raises; fails where none comes in time."""
    batches = make_batches(cfg)
    errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            for _ in itertools.islice(batches, 100):
                pass
        except Exception as error:
            errors.put(error)

    threading.Thread(target=run, daemon=True).start()
    raise errors.get(timeout=seconds)


@pytest.mark.parametrize(
    ("what", "how", "workers"),
    [
        ("exit0", "exited with code 0", 1),  # nobody is left who could go on
        ("exit0", "exited with code 0", 2),
        ("exit3", "exited with code 3", 2),
        ("kill", "was killed by SIGKILL", 2),
    ],
)
def test_a_dead_worker_names_its_record(what, how, workers) -> None:
    number = late(config())
    with pytest.raises(WorkerDied, match=f"{how} while it worked on record 'exam-{number}'"):
        collect(config(data=f"fake:40:{what}:{number}", data_workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_names_its_record(workers) -> None:
    number = late(config())
    with pytest.raises(InputError, match=f"record 'exam-{number}' .*: image 1: is damaged"):
        collect(config(data=f"fake:40:broken:{number}", data_workers=workers))


@pytest.fixture
def pools(monkeypatch) -> list[Workers]:
    made = []

    class Spied(Workers):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(pipeline, "Workers", Spied)
    return made


def alive(pids) -> list[int]:
    """Those of the processes that run; a zombie does not."""

    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return "gone"

    return [pid for pid in pids if state(pid) not in ("gone", "Z", "X")]


def test_a_worker_killed_between_rows_is_noticed(pools) -> None:
    batches = make_batches(config(data_workers=2))
    next(batches)
    os.kill(pools[0].pids[1], signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"SIGKILL while it worked on (the )?record"):
        list(itertools.islice(batches, 100))
    assert not alive(pools[0].pids)


@pytest.mark.parametrize("end", ["close", "drop", "error"])
def test_no_process_is_left_behind(pools, end) -> None:
    number = late(config(data="fake:120"))
    batches = make_batches(config(data=f"fake:120:broken:{number}", data_workers=2))
    next(batches)
    (pool,) = pools
    assert len(alive(pool.pids)) == 2
    if end == "close":
        batches.close()
    elif end == "drop":
        del batches
        gc.collect()
    else:
        with pytest.raises(InputError):
            list(itertools.islice(batches, 100))
    assert not alive(pool.pids)


CONSUMER = """
import hashlib, itertools, json, sys
from tests.data import fakes
from tests.data.fakes import config
from tests.data.fakes import config
from echovlm_jax.data import pipeline

class Patch:
    setattr = staticmethod(setattr)

fakes.use(Patch)
made = []
Workers = pipeline.Workers
pipeline.Workers = lambda *args: made.append(Workers(*args)) or made[-1]
start, stop, workers, log = (json.loads(word) for word in sys.argv[1:])
batches = pipeline.make_batches(config(data_workers=workers), start_step=start)
with open(log, "a") as file:
    for step, batch in zip(range(start, stop), batches):
        digest = hashlib.sha256(b"".join(batch[k].tobytes() for k in sorted(batch))).hexdigest()
        print(json.dumps([step, digest, made[0].pids]), file=file, flush=True)
"""


def consume(start: int, stop: int, workers: int, log: Path) -> subprocess.Popen:
    words = [json.dumps(word) for word in (start, stop, workers, str(log))]
    return subprocess.Popen(
        [sys.executable, "-c", CONSUMER, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def logged(log: Path) -> list[tuple[int, str, list[int]]]:
    """What was recorded; a last line that was cut off does not count."""
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def gone(pids, seconds: float = 30) -> bool:
    until = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(pids)


def digests(steps: int) -> list[str]:
    return [
        hashlib.sha256(b"".join(batch[k].tobytes() for k in sorted(batch))).hexdigest()
        for batch in take(config(), steps)
    ]


def kill_and_resume(tmp_path: Path, kills: int, steps: int, seed: int) -> None:
    log, random = tmp_path / "log", np.random.default_rng(seed)
    orphans: set[int] = set()
    for n in range(kills):
        done = logged(log)
        log.write_text("".join(json.dumps(line) + "\n" for line in done))
        child = consume(len(done), steps, 1 + n % 3, log)
        if n % 4 != 3:  # otherwise at any moment, also while it starts
            while len(logged(log)) <= len(done) and child.poll() is None:
                time.sleep(0.01)
        time.sleep(float(random.uniform(0, 0.3)))
        child.kill()
        child.communicate()
        orphans.update(pid for line in logged(log) for pid in line[2])
    done = logged(log)
    log.write_text("".join(json.dumps(line) + "\n" for line in done))
    last = consume(len(done), steps, 2, log)
    assert last.wait() == 0, last.stderr and last.stderr.read()
    lines = logged(log)
    assert [step for step, *_ in lines] == list(range(steps))
    assert [digest for _, digest, _ in lines] == digests(steps)
    assert gone(orphans)


def test_a_killed_run_goes_on_with_the_same_batches(tmp_path) -> None:
    kill_and_resume(tmp_path, kills=1, steps=8, seed=0)


@pytest.mark.slow
def test_a_run_killed_twenty_times_sees_the_same_batches(tmp_path) -> None:
    kill_and_resume(tmp_path, kills=20, steps=120, seed=1)


def test_ctrl_c_ends_everything(tmp_path) -> None:
    child = consume(0, 10**9, 2, tmp_path / "log")
    while not logged(tmp_path / "log"):
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGINT and errors.count("Traceback") == 1, errors
    assert "KeyboardInterrupt" in errors.splitlines()[-1]
    assert gone(logged(tmp_path / "log")[0][2])


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_samples(pools) -> None:
    def resident(pid) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    batches = make_batches(config(data="fake:2500", data_workers=2))
    samples, sizes = 0, []
    for batch in batches:
        samples += int(batch["segment_ids"].max(axis=1).sum())
        sizes.append((samples, [resident(pid) for pid in (os.getpid(), *pools[0].pids)]))
        if samples >= 12_000:
            break
    batches.close()
    warm = max(np.array([size for n, size in sizes if 1000 < n <= 4000]).tolist())
    end = np.array([size for n, size in sizes if n > 11_000]).max(axis=0)
    assert np.all(end - np.array(warm) < 40 * 2**20), (warm, end)
