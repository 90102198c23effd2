"""Checkpoints: what is restored is what was saved, or it is said to be broken."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echovlm_jax import checkpoint
from echovlm_jax.checkpoint import Checkpoints, open_checkpoints
from echovlm_jax.errors import InputError
from echovlm_jax.storage import digests
from echovlm_jax.storage import steps as keeping
from echovlm_jax.storage.files import as_path
from echovlm_jax.storage.layout import steps
from echovlm_jax.storage.verify import DamagedError, verify
from tests.buckets import s3_server

ROOT = Path(__file__).parents[1]


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    nothing: Any


def sharding(devices: int = 1, *spec: str | None) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("x",)), PartitionSpec(*spec))


def state(seed: int = 0, where: NamedSharding | None = None) -> State:
    """Random bits as weights, NaNs with payloads among them, and an optimizer's state."""
    rng = np.random.default_rng(seed)
    where = where or sharding()

    def bits(dtype: Any) -> jax.Array:
        raw = np.frombuffer(rng.bytes(64 * jnp.dtype(dtype).itemsize), dtype).reshape(8, 8)
        return jax.device_put(raw, where)

    params = {"a": {"w": bits(np.float32)}, "b": [bits(jnp.bfloat16), bits(np.int32)]}
    everywhere = NamedSharding(where.mesh, PartitionSpec())
    moments = jax.tree.map(lambda x: x, optax.adam(1e-3).init(params))
    return State(jax.device_put(jnp.int32(seed), everywhere), params, moments, {})


def like(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same_bits(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def run(folder: Path, *wanted: int, keep: int = 9, **options: Any) -> Checkpoints:
    """An open folder with some checkpoints."""
    checkpoints = open_checkpoints(folder, keep=keep, **options)
    for step in wanted:
        checkpoints.save(step, state(step), {"step": step}, wait=True)
    return checkpoints


def test_another_mesh_gets_the_same_bits(tmp_path: Path) -> None:
    saved = state(5, sharding(8, "x"))
    with open_checkpoints(tmp_path / "run/checkpoints", keep=2) as checkpoints:
        extra = {"config": {"seed": 1, "lr": 1e-5, "名": [None, True]}, "position": 2**53 + 1}
        checkpoints.save(5, saved, extra)
        assert checkpoints.latest() == 5  # waits for it
        for where in (sharding(4, None, "x"), sharding(2, "x"), sharding()):
            wanted = like(state(0, where))
            found, told = checkpoints.restore(5, wanted)
            assert same_bits(found, saved) and told == extra
            assert found.params["a"]["w"].sharding == where
    assert verify(tmp_path / "run") == {
        "ok": True, "arrays": 11, "corrupt": [], "checkpoints": [5],
        "bytes": digests.nbytes(tmp_path / "run/checkpoints/5"),
    }  # fmt: skip


def test_a_donated_state_was_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training step after a save overwrites the state while it is still being written."""
    changed = threading.Event()
    original = checkpoint.ocp.AsyncCheckpointer.wait_until_finished
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    tree = {"w": jax.device_put(jnp.arange(2.0**18), sharding(8, "x"))}
    expected = np.asarray(tree["w"]).copy()
    with open_checkpoints(tmp_path, keep=1) as checkpoints:

        def late(self: Any) -> None:
            if threading.current_thread().name == "checkpoint":
                changed.wait()
            original(self)

        monkeypatch.setattr(checkpoint.ocp.AsyncCheckpointer, "wait_until_finished", late)
        checkpoints.save(1, tree, {})
        wanted = like(tree)
        for _ in range(3):
            tree = step(tree)
        jax.block_until_ready(tree)
        changed.set()
        found, _ = checkpoints.restore(1, wanted)
        np.testing.assert_array_equal(found["w"], expected)


def test_what_is_kept(tmp_path: Path) -> None:
    with run(tmp_path, *range(1, 9), keep=2, keep_every=3) as checkpoints:
        assert steps(tmp_path) == [3, 6, 7, 8]
        before = digests.read(tmp_path / "8")
        checkpoints.save(8, state(0), {}, wait=True)  # is there: kept as it is
        assert digests.read(tmp_path / "8") == before and verify(tmp_path / "8")["ok"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "6", "7", "8"]


def snapshots(folder: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What a kill would leave: copies of the folder around each step that finishes a save."""
    taken: list[Path] = []

    def take(name: str) -> None:
        taken.append(to / f"{len(taken)}-{name}")
        shutil.copytree(folder, taken[-1])

    def around(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> None:
            take(f"before-{name}")
            original(*args, **kwargs)
            take(f"after-{name}")

        monkeypatch.setattr(owner, name, wrapped)

    around(digests, "write")
    around(keeping, "prune")
    return taken


def test_a_kill_while_a_save_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    run(folder, 1, keep=1).close()
    taken = []
    with monkeypatch.context() as patch:
        taken = snapshots(folder, tmp_path / "left", patch)
        run(folder, 2, keep=1).close()
    # And in the middle of deleting the old one.
    taken.append(tmp_path / "left/deleting")
    shutil.copytree(folder, taken[-1])
    shutil.copytree(folder / "2", taken[-1] / f"1{keeping.DELETED}")
    (taken[-1] / f"1{keeping.DELETED}" / digests.SUMS).unlink()
    found = []
    for left in taken:
        with open_checkpoints(left, keep=1) as checkpoints:
            found.append(newest := checkpoints.latest())
            assert newest is not None
            restored, extra = checkpoints.restore(newest, like(state()))
            assert same_bits(restored, state(newest)) and extra == {"step": newest}
            assert all(path.name.isdecimal() for path in left.iterdir())
    assert len(taken) == 5 and found == sorted(found) and set(found) == {1, 2}


def test_the_newest_is_set_aside_where_it_is_broken(tmp_path: Path, capsys) -> None:
    checkpoints = run(tmp_path, 1, 2, 3)
    flip(tmp_path / "3/state/_METADATA", 100)
    (tmp_path / "2/extra/metadata").unlink()
    assert verify(tmp_path)["corrupt"] == ["2/extra/metadata", "3/state/_METADATA"]
    assert checkpoints.latest() == 1
    told = capsys.readouterr().err
    assert f"{tmp_path}/3: is broken: state/_METADATA differs; set aside as 3.broken" in told
    assert f"{tmp_path}/2: is broken: extra/metadata missing; set aside as 2.broken" in told
    assert verify(tmp_path)["ok"]
    # The run goes on and makes them again.
    for step in (2, 3):
        checkpoints.save(step, state(step), {}, wait=True)
    flip(tmp_path / "3/state/_METADATA", 100)
    assert checkpoints.latest() == 2
    names = {"1", "2", "2.broken", "3.broken", "3.broken-2"}
    assert {path.name for path in tmp_path.iterdir()} == names
    checkpoints.close()


def test_starting_over_is_not_done_silently(tmp_path: Path) -> None:
    with open_checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(1, state(1), {}, wait=True)
        (tmp_path / "1" / digests.SUMS).unlink()
        for _ in range(2):
            with pytest.raises(InputError, match=r"no whole checkpoint is left \(1\.broken\); del"):
                checkpoints.latest()


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def test_only_what_fits_is_restored(tmp_path: Path) -> None:
    with run(tmp_path, 1) as checkpoints:
        wanted = like(state())
        a, b = wanted.params["a"], wanted.params["b"]
        other = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16, sharding=sharding())
        cases = [
            ({"a": {"w": other}, "b": b}, r"a/w is float32\[8, 8\] there and bfloat16\[8, 8\] in"),
            ({"a": a, "b": b[:1]}, r"b/1 is int32\[8, 8\] there and missing in this run"),
            ({"a": a, "b": b, "c": other}, r"c is missing there and bfloat16\[8, 8\] in this run"),
        ]
        for params, told in cases:
            with pytest.raises(InputError, match=r"/1: params/" + told):
                checkpoints.restore(1, wanted._replace(params=params))
        with pytest.raises(InputError, match=r"/7: no such checkpoint; there are \[1\]"):
            checkpoints.restore(7, wanted)


def test_damage_after_the_check_is_found(tmp_path: Path) -> None:
    with run(tmp_path, 1) as checkpoints:
        assert checkpoints.latest() == 1
        flip(tmp_path / "1/extra/metadata", 3)
        with pytest.raises(InputError, match=r"/1: is broken: extra/metadata differs"):
            checkpoints.restore(1, like(state()))


def test_one_job_at_a_time_and_strangers_files(tmp_path: Path) -> None:
    (tmp_path / "5.unfinished-notes").mkdir()
    (tmp_path / "6.unfinished").write_text("a file")
    (tmp_path / "x.deleted").mkdir()
    (tmp_path / "7.unfinished.orbax-checkpoint-tmp").mkdir()
    checkpoints = run(tmp_path, 1)
    with pytest.raises(InputError, match="another process is writing into it"):
        open_checkpoints(tmp_path, keep=1)
    checkpoints.close()
    run(tmp_path, 2).close()
    names = ["1", "2", "5.unfinished-notes", "6.unfinished", "x.deleted"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A file may not grow beyond 64 KiB: the arrays fit no more."""
    checkpoints = run(tmp_path, 1)
    large = {"w": jnp.zeros((2**18,))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
        checkpoints.save(2, large, {})
        deadline = time.monotonic() + 60
        told = rf"/2: can't be saved \({os.strerror(errno.EFBIG)}\); checkpoint 1 is intact; mend"
        with pytest.raises(InputError, match=told):
            while time.monotonic() < deadline:  # as a loop that never waits learns of it
                checkpoints.check()
                time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]  # what was written is given back
    assert checkpoints.latest() == 1
    checkpoints.save(2, large, {}, wait=True)  # and it goes on where it can
    assert checkpoints.latest() == 2
    checkpoints.close()


MANY = """
import logging, resource, sys
from pathlib import Path
import jax.numpy as jnp
from echovlm_jax.checkpoint import open_checkpoints
from echovlm_jax.errors import InputError
logging.disable()
checkpoints = open_checkpoints(Path(sys.argv[1]), keep=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
try:
    checkpoints.save(1, {str(i): jnp.ones(2**19) for i in range(16)}, {}, wait=True)
except InputError as error:
    print(error, file=sys.stderr)
checkpoints.close()
"""


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """Also where other arrays are still being written when one has failed."""
    command = [sys.executable, "-c", MANY, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert "/1: can't be saved" in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("owner", "name", "left"),
    [(digests, "write", ["1"]), (os, "rename", ["1"]), (keeping, "prune", ["1", "2"])],
)
def test_permission_that_is_lost(tmp_path: Path, monkeypatch, owner, name, left) -> None:
    checkpoints = run(tmp_path, 1, keep=1)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refuse)
        checkpoints.save(2, state(2), {})
        told = rf"/2: can't be saved \(Permission denied\); checkpoint {left[-1]} is intact"
        with pytest.raises(InputError, match=told):
            checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert checkpoints.latest() == int(left[-1])
    checkpoints.close()


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/checkpoints: Not a directory; name another folder"):
        open_checkpoints(tmp_path / "file/checkpoints", keep=1)


def test_defects_are_not_explained_away(tmp_path: Path, monkeypatch) -> None:
    checkpoints = run(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(digests, "write", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoints.save(2, state(2), {}, wait=True)
    assert steps(tmp_path) == [1]
    with pytest.raises(TypeError, match="JSON"):
        checkpoints.save(2, state(2), {"x": object()}, wait=True)
    checkpoints.close()


def damage(rng: random.Random, folder: Path, other: Path) -> str:
    """Damages a checkpoint at random; what it did."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    # Half of the time where most bytes are, or else each file alike.
    weights = [path.stat().st_size for path in files] if rng.random() < 0.5 else None
    path = rng.choices(files, weights)[0]
    kind = rng.choice(["flip", "cut", "grow", "delete", "swap", "extra", "older", "zeros"])
    data = path.read_bytes()
    if kind == "flip" and data:
        flip(path, rng.randrange(8 * len(data)))
    elif kind == "cut" and data:
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "grow":
        path.write_bytes(data + rng.randbytes(rng.randrange(1, 99)))
    elif kind == "swap":
        second = rng.choice([file for file in files if file.read_bytes() != data])
        path.write_bytes(second.read_bytes())
        second.write_bytes(data)
    elif kind == "extra":
        (path.parent / f"{rng.randrange(2**64):x}").write_bytes(rng.randbytes(rng.randrange(99)))
    elif kind == "older" and (older := other / path.relative_to(folder)).is_file():
        path.write_bytes(older.read_bytes())
        if older.read_bytes() == data:
            path.unlink()
    elif kind == "zeros" and any(data):
        start = rng.choice([i for i, byte in enumerate(data) if byte])
        path.write_bytes(data[:start] + bytes(len(data[start : start + 512])) + data[start + 512 :])
    else:
        path.unlink()
    return f"{kind} {path.relative_to(folder)}"


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_damage_is_found_before_a_value_is_used(tmp_path: Path, count: int) -> None:
    """`verify` names it; restoring refuses it, or it lies where nothing is read."""
    rng = random.Random(count)
    found = 0
    with run(tmp_path / "run", 1, 2) as checkpoints:
        newest, backup = tmp_path / "run/2", tmp_path / "backup"
        shutil.copytree(newest, backup)
        for _ in range(count):
            what = damage(rng, newest, tmp_path / "run/1")
            assert not verify(newest)["ok"], what
            try:
                restored, extra = checkpoints.restore(2, like(state()))
                assert same_bits(restored, state(2)) and extra == {"step": 2}, what
            except DamagedError:
                found += 1
                step, restored, extra = checkpoints.restore_latest(like(state()))
                assert same_bits(restored, state(1)) and step == 1 and extra == {"step": 1}
                shutil.rmtree(tmp_path / "run/2.broken")
            shutil.rmtree(newest, ignore_errors=True)
            shutil.copytree(backup, newest)
    assert found > 0.7 * count


def odd(seed: int, where: NamedSharding | None = None) -> dict[str, jax.Array]:
    """Arrays that a database doesn't keep inside its index, of sizes that don't cut evenly."""
    rng, where = np.random.default_rng(seed), where or sharding(2, "x")
    shapes = {"params": (48, 50), "mu": (6, 28, 13), "step": ()}
    raw = {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    everywhere = NamedSharding(where.mesh, PartitionSpec())
    return {n: jax.device_put(v, where if v.shape else everywhere) for n, v in raw.items()}


@pytest.mark.parametrize("name", ["params", "mu"])
def test_a_bit_of_any_array(tmp_path: Path, name: str, monkeypatch, capsys) -> None:
    """Chunks are smaller than shards here, and those than arrays."""
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 2000)
    with run(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, odd(step), {}, wait=True)
        row = np.asarray(odd(2)[name]).reshape(-1)[-6:].tobytes()
        [file] = [path for path in tmp_path.rglob("2/state/**/d/*") if row in path.read_bytes()]
        flip(file, 8 * file.read_bytes().index(row) + 77)
        assert verify(tmp_path / "2")["corrupt"] == [str(file.relative_to(tmp_path / "2"))]
        for where in (sharding(2, "x"), sharding(2, None, "x"), sharding()):
            wanted = like(odd(0, where))
            with pytest.raises(DamagedError, match=f"/2/state: is broken: {name} differs from"):
                checkpoints.restore(2, wanted)
        assert checkpoints.latest() == 2  # no array is read for that
        step, found, _ = checkpoints.restore_latest(wanted) or (0, None, None)
        assert step == 1 and same_bits(found, odd(1))
        assert f"/2: is broken: {name} differs from its digest; set" in capsys.readouterr().err
        assert (tmp_path / "2.broken").is_dir()


def test_a_checkpoint_from_before_there_were_digests_of_chunks(tmp_path: Path) -> None:
    """Its files are read whole before a value is."""
    with run(tmp_path, 1) as checkpoints:
        checkpoints.save(2, odd(2), {}, wait=True)
        (tmp_path / "2/chunks.json").unlink()
        digests.write(tmp_path / "2")
        assert same_bits(checkpoints.restore(2, like(odd(2)))[0], odd(2))
        file = max(tmp_path.rglob("2/state/**/d/*"), key=lambda path: path.stat().st_size)
        flip(file, 8 * file.stat().st_size - 1)
        with pytest.raises(DamagedError, match=r"/2: is broken: state/.*/d/.* differs"):
            checkpoints.restore(2, like(odd(2)))


def test_each_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the mesh, and however chunks and shards lie to each other."""
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 2**16)
    tree = {name: jnp.ones((256, 512, 4), name) for name in ("float32", "bfloat16")}
    size = sum(values.nbytes for values in tree.values())
    with run(tmp_path) as checkpoints:
        checkpoints.save(1, jax.device_put(tree, sharding(8, "x")), {}, wait=True)
        for where in (sharding(8, "x"), sharding(8, None, "x"), sharding(4, None, None, "x")):
            wanted = like(jax.device_put(tree, where))
            before = bytes_read()
            found, _ = checkpoints.restore(1, wanted)
            assert size <= bytes_read() - before < 1.05 * size
            assert same_bits(found, tree)


def bytes_read() -> int:
    """By TensorStore, of all files since the process began."""
    [found] = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for value in found["values"])


SAVER = """
import sys, jax, jax.numpy as jnp
from pathlib import Path
from echovlm_jax.checkpoint import open_checkpoints
checkpoints = open_checkpoints(Path(sys.argv[1]), keep=1)
newest = checkpoints.latest() or 0
if newest:
    like = {"w": jax.ShapeDtypeStruct((2**20,), jnp.float32)}
    found, extra = checkpoints.restore(newest, like)
    assert (found["w"] == newest).all() and extra == {"step": newest}, newest
for step in range(newest + 1, 10_000):
    checkpoints.save(step, {"w": jnp.full((2**20,), float(step))}, {"step": step})
    print(step - 1, flush=True)  # whole: save has waited for it
"""


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """A killed process never takes back a checkpoint that it had called whole."""
    rng = random.Random(0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    whole = 0
    for _ in range(20):
        command = [sys.executable, "-c", SAVER, str(tmp_path / "run")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline()]
            assert lines[0], process.wait()  # it found the newest one whole
            time.sleep(rng.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.readlines()
        told = max(int(line) for line in lines if line.endswith(b"\n"))
        assert int(lines[0]) >= whole
        whole = told
        assert whole in (0, *steps(tmp_path / "run")) or max(steps(tmp_path / "run")) > whole
    assert whole >= 19  # each process saved one at least


def jobs(folder: Path, *modes: tuple[int, str]) -> None:
    """Runs checkpoints.py as so many processes, one mode after another."""
    launcher = str(ROOT / "launch/local_processes.py")
    program = str(Path(__file__).parent / "distributed/checkpoints.py")
    for processes, mode in modes:
        devices = str(max(4 // processes, 1))
        options = ["--processes", str(processes), "--devices", devices, "--", program]
        done = subprocess.run(
            [sys.executable, launcher, *options, str(folder), *mode.split()],
            capture_output=True, text=True, timeout=300,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + done.stdout


ANOTHER = ((2, "save 1"), (1, "save 2"), (4, "save 3"), (2, "damage"))


@pytest.mark.slow
def test_another_number_of_processes(tmp_path: Path) -> None:
    """Several processes save what one restores, and one saves what several restore."""
    jobs(tmp_path / "run", *ANOTHER)
    assert steps(tmp_path / "run") == [2] and (tmp_path / "run/3.broken").is_dir()
    assert verify(tmp_path / "run")["ok"]


@pytest.mark.slow
def test_what_four_processes_saved_is_restored_on_one_two_and_eight(tmp_path: Path) -> None:
    """On as many devices as there, and on twice as many."""
    jobs(tmp_path / "run", (4, "save 1"), (1, "restore 1"), (2, "restore 1"), (8, "restore 1"))


@pytest.mark.parametrize("modes", [ANOTHER[:1], pytest.param(ANOTHER, marks=pytest.mark.slow)])
def test_several_processes_and_a_bucket(modes: tuple) -> None:
    with s3_server():
        run = as_path(f"s3://bucket/run{len(modes)}")
        jobs(run, *modes)
        assert steps(run) == [1 if modes == ANOTHER[:1] else 2] and verify(run)["ok"]
