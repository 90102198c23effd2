"""Runs and models in a bucket: whole or not believed, one writer, every changed byte found."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echovlm_jax import demo
from echovlm_jax.checkpoint import open_checkpoints
from echovlm_jax.cli import build_parser, frame, main
from echovlm_jax.convert import convert, export, inspect, load_params
from echovlm_jax.errors import InputError
from echovlm_jax.storage import bucket as buckets
from echovlm_jax.storage import digests, lock
from echovlm_jax.storage import writer as store
from echovlm_jax.storage.arrays import Reader
from echovlm_jax.storage.files import Lines, as_path, below, new_folder, remove, write_bytes
from echovlm_jax.storage.layout import steps
from echovlm_jax.storage.lock import Lock
from echovlm_jax.storage.verify import DamagedError, verify
from tests.buckets import gcs_server, s3_server
from tests.convert.checkpoints import digests as digests_of
from tests.convert.checkpoints import tensors, write
from tests.train.test_loop import CONFIG, MODEL, SMALL, lines

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def s3() -> Iterator[None]:
    with s3_server():
        yield


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    name = "".join(c for c in request.node.name if c.isalnum())
    path = as_path(f"s3://bucket/{name}")
    yield path
    remove(path)


def damage(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x10
    write_bytes(path, bytes(data))


def flip_value(model: Path, row: bytes) -> str:
    """Changes a bit of stored values that have these bytes. Returns the object's name."""
    name = next(name for name in below(model) if row in (model / name).read_bytes())
    data = (model / name).read_bytes()
    at = data.index(row) + 2
    write_bytes(model / name, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    return name


# --- Objects --------------------------------------------------------------------------------------


def test_a_folder_is_what_begins_with_its_name(folder):
    write_bytes(folder / "a/b.txt", b"hello")
    write_bytes(folder / "ab.txt", b"x")
    assert below(folder) == ["a/b.txt", "ab.txt"] and below(folder / "a") == ["b.txt"]
    assert (folder / "a").is_dir() and not (folder / "a").is_file()
    assert (folder / "a/b.txt").is_file() and not (folder / "a/b").exists()
    assert [path.name for path in folder.iterdir()] == ["a", "ab.txt"]
    assert (folder / "a/b.txt").read_bytes(1, 3) == b"el"
    with pytest.raises(FileNotFoundError, match="no such object"):
        (folder / "none").read_bytes()
    remove(folder / "a")
    assert below(folder) == ["ab.txt"]  # not what only begins alike
    with pytest.raises(InputError, match=r"must be a local path"):
        os.stat(folder)


def test_lines_are_kept_and_cut(folder):
    with Lines(folder / "log") as file:
        file.write("one\n")
        file.write("two\n")
    with Lines(folder / "log", 4) as file:
        file.write("three\n")
    assert (folder / "log").read_text() == "one\nthree\n"


def test_a_folder_is_replaced_or_left(folder):
    with new_folder(folder) as made:
        (made / "a").write_text("1")
    with pytest.raises(ZeroDivisionError), new_folder(folder) as made:
        (made / "b").write_text("2")
        _ = 1 / 0
    assert below(folder) == ["a"]


# --- One writer -----------------------------------------------------------------------------------


def test_a_second_writer_is_refused_in_one_line(folder):
    with Lock(folder), pytest.raises(InputError, match="another process is writing into it; wait"):
        Lock(folder)
    Lock(folder).close()  # given back


def test_of_many_at_once_one_gets_it(folder):
    held, refused = [], []

    def take() -> None:
        try:
            held.append(Lock(folder))
        except InputError:
            refused.append(1)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 7
    held[0].close()


def test_a_dead_holders_lock_is_taken_over(folder, monkeypatch):
    """At once where it died on this machine, and elsewhere when it is not renewed in time."""
    code = (
        "import os, sys, signal\n"
        "from echovlm_jax.storage.lock import Lock\n"
        "from echovlm_jax.storage.files import as_path\n"
        "Lock(as_path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code, str(folder)], env=environment)
    assert run.returncode == -signal.SIGKILL
    began = time.monotonic()
    Lock(folder).close()
    assert time.monotonic() - began < lock.EXPIRE / 2

    monkeypatch.setattr(lock, "_is_running", lambda content: None)  # as from another machine
    monkeypatch.setattr(lock, "RENEW", 0.1)
    monkeypatch.setattr(lock, "EXPIRE", 0.6)
    with Lock(folder) as alive:
        with pytest.raises(InputError, match="another process is writing"):
            Lock(folder)
        alive.check()
    held = Lock(folder)
    held._lease._ended.set()  # it renews no more: as a process that was stopped
    held._lease._thread.join()
    with Lock(folder), pytest.raises(InputError, match="was not renewed in time"):
        held.check()


# --- Checkpoints ----------------------------------------------------------------------------------


def layouts() -> tuple:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    one = NamedSharding(mesh, PartitionSpec("b", "a"))
    return one, NamedSharding(mesh, PartitionSpec("a")), NamedSharding(mesh, PartitionSpec())


def state(seed: int, sharding) -> dict:
    rng = np.random.default_rng(seed)
    made = {"w": rng.normal(size=(16, 6)).astype(np.float32), "step": np.int32(seed)}
    made["m"] = (jnp.asarray(rng.normal(size=(8, 4)), jnp.bfloat16), {})
    placed = {"w": jax.device_put(made["w"], sharding), "step": jnp.int32(seed)}
    few = jnp.asarray(rng.integers(-8, 8, (8, 4)), jnp.int4)
    placed["few"] = jax.device_put(few, sharding)
    return {**placed, "m": made["m"]}


def like(tree, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree
    )


def saved(folder: Path, *numbers: int, keep: int = 9) -> None:
    with open_checkpoints(folder, keep=keep) as checkpoints:
        for number in numbers:
            checkpoints.save(number, state(number, layouts()[0]), {"n": number}, wait=True)


def assert_restores(folder: Path, number: int, whole: bool = False) -> None:
    wanted = state(number, layouts()[0])
    with open_checkpoints(folder, keep=9) as checkpoints:
        found = checkpoints.restore_latest(like(wanted, layouts()[2] if whole else None))
    assert found is not None and found[0] == number and found[2] == {"n": number}
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_state_comes_back_on_any_mesh_and_old_ones_go(folder, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_BYTES", 16)
    monkeypatch.setattr("echovlm_jax.storage.state.CHUNK_BYTES", 16)
    saved(folder, 1, 2, 3, keep=2)
    assert steps(folder) == [2, 3]
    assert not [name for name in below(folder) if name.startswith("1/")]
    assert_restores(folder, 3)
    assert_restores(folder, 3, whole=True)
    assert verify(folder)["ok"]


def test_what_has_no_digests_is_not_believed(folder):
    saved(folder, 1, 2)
    (folder / "2/XXH128SUMS").unlink()
    write_bytes(folder / "7/state/d/x", b"half a save")
    write_bytes(folder / "8/somebodys.txt", b"not ours")
    assert steps(folder) == [1]
    assert_restores(folder, 1)
    assert sorted({name.split("/")[0] for name in below(folder)}) == ["1", "8"]


def test_who_lost_the_lock_stops_and_deletes_nothing(folder, monkeypatch):
    monkeypatch.setattr(lock, "EXPIRE", 0.6)
    monkeypatch.setattr(lock, "RENEW", 0.1)
    with open_checkpoints(folder, keep=9) as checkpoints:
        checkpoints.check()
        checkpoints._lock._lease._ended.set()  # a process that was suspended
        checkpoints._lock._lease._thread.join()
        time.sleep(0.7)
        write_bytes(folder / "5/state/d/x", b"the next holder's save")
        with pytest.raises(InputError, match="was not renewed in time"):
            checkpoints.check()
        checkpoints.save(1, state(1, layouts()[0]), {})
        with pytest.raises(InputError, match="was not renewed in time"):
            checkpoints.wait()
        assert (folder / "5/state/d/x").is_file() and steps(folder) == []


def objects(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in below(folder)}


def test_a_mix_of_two_writers_is_never_believed(folder):
    """One that lost the lock, and had requests on their way, and the next: whatever becomes of
    their objects under one name, what is restored is what one of them wrote, or nothing."""
    both = []
    for number in (1, 2):
        with open_checkpoints(folder, keep=9) as checkpoints:
            checkpoints.save(5, state(number, layouts()[0]), {"n": number}, wait=True)
        both.append(objects(folder / "5"))
        remove(folder / "5")
    names, rng = sorted({*both[0], *both[1]}), random.Random(0)
    assert {"XXH128SUMS", "extra/metadata", "state/manifest.ocdbt"} < both[0].keys() & both[
        1
    ].keys()
    for _ in range(12):
        for name in names:
            found = rng.choice([each[name] for each in both if name in each] + [None])
            remove(folder / "5" / name)
            if found is not None:
                write_bytes(folder / "5" / name, found)
        if objects(folder / "5") not in both and (folder / "5/XXH128SUMS").is_file():
            with open_checkpoints(folder, keep=9) as checkpoints, pytest.raises(DamagedError):
                checkpoints.restore(5, like(state(1, layouts()[0])))
    for name in names:  # all of both: the data files of the first belong to nobody
        write_bytes(folder / "5" / name, (both[1] | both[0] if name in both[0] else both[1])[name])
    with open_checkpoints(folder, keep=9) as checkpoints, pytest.raises(DamagedError):
        checkpoints.restore(5, like(state(1, layouts()[0])))


@pytest.mark.parametrize("name", ["extra/metadata", "chunks.json", "state/manifest.ocdbt"])
def test_what_another_writer_puts_there_before_the_digests(name, folder, monkeypatch):
    """The digests are of what this one wrote."""
    saved(folder, 1)
    late, write = (folder / "1" / name).read_bytes(), digests.write

    def after(work: Path, **options) -> None:
        write_bytes(work / name, late)
        write(work, **options)

    monkeypatch.setattr(digests, "write", after)
    saved(folder, 2)
    assert_restores(folder, 1)


def test_a_changed_byte_is_named_and_never_loaded(folder):
    saved(folder, 1, 2)
    names = [n for n in below(folder / "2") if n != "XXH128SUMS"]
    for name in names:
        before = (folder / "2" / name).read_bytes()
        damage(folder / "2" / name)
        assert verify(folder)["corrupt"] == [f"2/{name}"]
        write_bytes(folder / "2" / name, before)
    assert verify(folder)["ok"]
    values = state(2, layouts()[0])["w"].addressable_shards[0].data
    flip_value(folder / "2", np.asarray(values).tobytes()[:8])
    assert_restores(folder, 1)  # the one before
    assert steps(folder) == [1]
    saved(folder, 2)  # and the run comes by there again
    assert_restores(folder, 2)


def test_the_emulator_of_google_saves_lists_restores_and_verifies(monkeypatch):
    with gcs_server() as server:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.address)
        root = as_path("gs://bucket/run")
        with Lock(root), pytest.raises(InputError, match="another process"):
            Lock(root)
        saved(root, 1, 2)
        assert steps(root) == [1, 2]
        assert_restores(root, 2)
        assert verify(root)["ok"]
        damage(root / "2/state/manifest.ocdbt")
        assert verify(root)["corrupt"] == ["2/state/manifest.ocdbt"]
        assert_restores(root, 1)
    buckets._open.cache_clear()


# --- Models ---------------------------------------------------------------------------------------


def test_a_model_goes_there_and_back(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_BYTES", 3000)
    source = write(tmp_path / "source", tensors(), shards=2)
    here = convert(source, tmp_path / "ours")
    there = convert(source, folder / "ours")
    assert {**here, "seconds": 0, "peak_rss_bytes": 0} == {
        **there, "seconds": 0, "peak_rss_bytes": 0
    }  # fmt: skip
    assert convert(source, folder / "ours")["tensors"] == here["tensors"]  # it is there
    assert verify(folder / "ours")["ok"]
    assert inspect(folder / "ours") == inspect(tmp_path / "ours")
    export(folder / "ours", folder / "hf", max_shard_size="20KB")
    export(folder / "hf", tmp_path / "back")
    assert digests_of(tmp_path / "back") == digests_of(source)
    convert(folder / "hf", tmp_path / "again")
    a, b = (load_params(path)[1] for path in (folder / "ours", tmp_path / "again"))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    left = sorted({name.split("/")[0] for name in below(folder)})
    assert left == ["hf", "ours"]
    with pytest.raises(InputError, match="exists"):
        export(tmp_path / "ours", folder / "hf")
    data = flip_value(folder / "ours", tensors()["lm_head.weight"].reshape(-1)[:8].tobytes())
    assert verify(folder / "ours")["corrupt"] == [data]
    with pytest.raises(InputError, match=r"text/lm_head/kernel differs from its digest"):
        load_params(folder / "ours")


_CONVERT = """
import sys
from echovlm_jax.convert import from_torch
from echovlm_jax.storage import files, writer
writer.CHUNK_BYTES = from_torch._IN_FLIGHT_BYTES = 3000
files._RESEND_SECONDS = 0
from_torch.convert(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_conversion_that_is_killed_resumes(kills, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_BYTES", 3000)
    source = write(tmp_path / "source", tensors(), shards=2)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _CONVERT, str(source), str(folder / "ours")]
    rng, journal = random.Random(kills), folder / "ours.partial/journal.jsonl"

    def written() -> int:
        return journal.read_bytes().count(b"\n") if journal.is_file() else 0

    for _ in range(kills):
        enough = written() + rng.randint(1, 8)
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None and written() < enough:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not (folder / "ours/XXH128SUMS").is_file():
            with pytest.raises(InputError):  # what is unfinished is no model
                load_params(folder / "ours")
    report = convert(source, folder / "ours")
    assert report["resumed"] > 0
    export(folder / "ours", tmp_path / "back")
    assert digests_of(tmp_path / "back") == digests_of(source) and verify(folder / "ours")["ok"]
    assert {name.split("/")[0] for name in below(folder)} == {"ours"}


# --- A run ----------------------------------------------------------------------------------------

_TRAIN = """
import json, sys
from echovlm_jax.train.config_file import load_config
from echovlm_jax.train.loop import train
train(load_config(sys.argv[1], json.loads(sys.argv[3])), sys.argv[2])
"""


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_as_one_on_a_disk(kills, folder, tmp_path):
    number = 4 if kills == 1 else 24
    base = demo.make_checkpoint(tmp_path / "model", MODEL)
    changes = {**SMALL, "model": str(base), "steps": number, "checkpoint_every": 1}
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }

    def start(where: object) -> subprocess.Popen:
        command = [sys.executable, "-c", _TRAIN, str(CONFIG), str(where), json.dumps(changes)]
        return subprocess.Popen(command, env=environment)

    def newest() -> int:
        return max(steps(folder / "run/checkpoints"), default=0)

    assert start(tmp_path / "run").wait() == 0
    rng = random.Random(3)
    for _ in range(kills):
        process, enough = start(folder / "run"), newest() + rng.randint(1, 2)
        while process.poll() is None and newest() < enough:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(folder / "run").wait() == 0
    assert verify(folder / "run")["ok"]
    a, b = (Reader(as_path(f"{p}/run/checkpoints/{number}/state")) for p in (folder, tmp_path))
    assert a.shapes == b.shapes
    for name, shape in a.shapes.items():
        index = tuple(slice(0, n) for n in shape)
        assert a.read(name, index).tobytes() == b.read(name, index).tobytes(), name
    (tmp_path / "copy").mkdir()
    copied = (folder / "run/metrics.jsonl").read_bytes()
    (tmp_path / "copy/metrics.jsonl").write_bytes(copied)
    assert lines(tmp_path / "copy") == lines(tmp_path / "run")


# --- The door -------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    def inside(parser: argparse.ArgumentParser, name: str) -> Iterator:
        nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for action in nested:
            for word, sub in action.choices.items():
                yield from inside(sub, f"{name} {word}".strip())
        if not nested:
            yield name, parser

    yield from inside(build_parser(), "")


DOORS = (frame.PLACE, frame.LOCAL, frame.NAMED)
# What takes words that are no paths.
WORDS = {
    *(
        "dtype",
        "prompt",
        "system",
        "split",
        "tasks",
        "max_shard_size",
        "group_pattern",
        "topology",
        "host",
    ),
    *("size", "beam", "images", "language", "quantize"),
}


def test_every_argument_that_is_a_path_goes_through_the_door():
    for name, parser in commands():
        for action in parser._actions:
            plain = action.type in (None, str) and action.nargs != 0 and action.choices is None
            assert action.type is not Path, (name, action.dest)
            assert not plain or action.dest in WORDS, (name, action.dest)


def path_arguments() -> list:
    return [
        pytest.param(name, action.dest, id=f"{name} {action.dest}")
        for name, parser in commands()
        for action in parser._actions
        if action.type in DOORS
    ]


@pytest.mark.parametrize(("command", "argument"), path_arguments())
@pytest.mark.parametrize("place", ["hdfs://a/b", "https://example.org/x", "gs:b/x", "s3:/b"])
def test_a_scheme_that_cannot_be_used_is_refused_at_once(
    command, argument, place, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    words = command.split()
    for action in dict(commands())[command]._actions:
        here = action.dest == argument
        word = place if here else next(iter(action.choices or [str(tmp_path / "none")]))
        if not action.option_strings:
            words.append(word)
        elif here or action.required:
            words += [action.option_strings[-1], word]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert place in told and "scheme" in told, told
    assert not list(tmp_path.iterdir())


def test_a_dataset_wants_a_file_system(capsys):
    where = "s3://bucket/exams"
    for words in (
        ["data", "build", "--source", "a.json", "--images", ".", "--out", where],
        ["data", "stats", where],
        ["eval", "model", "--data", where, "--out", "x"],
        ["train", "--config", str(CONFIG), "--workdir", "x", f"--config.data={where}"],
    ):
        assert main(words) == 2
        assert "mount the bucket" in capsys.readouterr().err
