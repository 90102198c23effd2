"""A conversion that is killed, at any moment, goes on and ends like one that was not."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echovlm_jax.convert import convert, export
from echovlm_jax.convert.from_torch import Journal
from echovlm_jax.errors import InputError
from echovlm_jax.storage.writer import Writer
from tests.convert.checkpoints import digests, tensors, write

# Kills itself, for real, when the named function is reached for the n-th time.
_CHILD = """
import os, signal, sys
from echovlm_jax.convert import from_torch
from echovlm_jax.storage import writer as store
from echovlm_jax.convert.journal import Journal
source, target, place, count = sys.argv[1:]
store.CHUNK_BYTES = from_torch._IN_FLIGHT_BYTES = 3000
left = int(count)

def deadly(owner, name):
    original = getattr(owner, name)
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, wrapped)

places = {
    "journal": (Journal, "add"),
    "write": (store.Writer, "write"),
    "finish": (store.Writer, "finish"),
    "clean": (store.Writer, "_drop_unreferenced"),
    "side": (from_torch.folder, "copy_side_files"),
    "report": (from_torch, "write_json"),
    "rename": (from_torch, "rename_folder"),
    "renamed": (Journal, "discard"),
}
if place in places:
    deadly(*places[place])
from_torch.convert(source, target)
"""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echovlm_jax.storage.writer.CHUNK_BYTES", 3000)


def killed(source: Path, target: Path, place: str, count: int) -> None:
    command = [sys.executable, "-c", _CHILD, str(source), str(target), place, str(count)]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr


def is_complete(target: Path, source: Path) -> None:
    back = target.with_name("back")
    export(target, back)
    assert digests(back) == digests(source)
    left = sorted(path.name for path in target.parent.iterdir())
    assert left == ["back", "ours", "source"]


PLACES = [
    ("journal", 1),
    ("journal", 40),
    ("write", 60),
    ("finish", 1),
    ("clean", 1),
    ("report", 1),
    ("rename", 1),
    ("renamed", 1),
]


@pytest.mark.parametrize(
    ("place", "count"),
    [
        pytest.param(*where, marks=[] if where[0] == "write" else pytest.mark.slow)
        for where in PLACES
    ],
)
def test_killed_at(tmp_path: Path, place: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write(tmp_path / "source", tensors(), shards=2), tmp_path / "ours"
    killed(source, target, place, count)
    assert target.exists() == (place == "renamed")
    journal = tmp_path / "ours.partial/journal.jsonl"
    finished = {line["name"] for line in map(json.loads, journal.read_text().splitlines()[1:])}
    added: list[str] = []
    original = Journal.add
    monkeypatch.setattr(
        Journal,
        "add",
        lambda self, name, digest: (added.append(name), original(self, name, digest)),
    )
    report = convert(source, target)
    assert not finished & set(added), "a finished tensor was done again"
    if place != "renamed":
        assert report["resumed"] == len(finished)
        assert len(finished) + len(added) == report["tensors"]
    if place == "write":
        assert 0 < len(finished) < report["tensors"]
    is_complete(target, source)


def stopped(source: Path, target: Path, owner: object, name: str, count: int) -> None:
    """Like `killed`, inside this process and so without the seconds that another one takes."""
    left = count
    original = getattr(owner, name)

    def wrapped(*args: object) -> object:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return original(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, wrapped)
        convert(source, target)


def test_no_debris_of_a_killed_write(tmp_path: Path) -> None:
    """Data files that a kill left unreferenced are gone in the end."""
    source, target = write(tmp_path / "source", tensors()), tmp_path / "ours"
    stopped(source, target, Journal, "add", 20)
    data = tmp_path / "ours.partial/model/params/ocdbt.process_0/d"
    (data / "0123456789abcdef0123456789abcdef").write_bytes(b"half a chunk")
    assert convert(source, target)["resumed"] == 19
    names = [p.name for p in (target / "params/ocdbt.process_0/d").iterdir()]
    assert names and "0123456789abcdef0123456789abcdef" not in names
    is_complete(target, source)


def test_a_kill_after_the_last_rename(tmp_path: Path) -> None:
    """The model is there; the next run says so and takes the journal away."""
    source, target = write(tmp_path / "source", tensors()), tmp_path / "ours"
    stopped(source, target, Journal, "discard", 1)
    assert target.exists() and (tmp_path / "ours.partial").exists()
    convert(source, target)
    is_complete(target, source)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_killed_from_outside(tmp_path: Path, seed: int) -> None:
    """SIGKILL after a random time, again and again until a run gets through."""
    source, target = write(tmp_path / "source", tensors(), shards=3), tmp_path / "ours"
    rng = random.Random(seed)
    command = [sys.executable, "-c", _CHILD, str(source), str(target), "never", "0"]
    for _ in range(30):
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not (tmp_path / "ours.partial").exists() and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        try:
            child.wait(timeout=rng.uniform(0.0, 1.0))
        except subprocess.TimeoutExpired:
            child.kill()
        child.communicate()
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
    else:
        convert(source, target)
    is_complete(target, source)


def test_another_source_or_dtype(tmp_path: Path) -> None:
    source, target = write(tmp_path / "source", tensors()), tmp_path / "ours"
    stopped(source, target, Journal, "add", 10)
    other = write(tmp_path / "other", tensors(seed=1))
    for given, dtype in ((other, None), (source, "float32")):
        with pytest.raises(
            InputError, match=r"ours\.partial: holds an unfinished conversion of an"
        ):
            convert(given, target, dtype=dtype)
    convert(source, target)


def test_lost_chunks_are_noticed(tmp_path: Path) -> None:
    """A journal without its data must not become a checkpoint with holes."""
    source, target = write(tmp_path / "source", tensors()), tmp_path / "ours"
    stopped(source, target, Writer, "finish", 1)
    shutil.rmtree(tmp_path / "ours.partial/model/params")
    assert convert(source, target)["resumed"] == 0
    is_complete(target, source)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written stays, and the same command goes on once there is space."""
    source, target = write(tmp_path / "source", tensors()), tmp_path / "ours"

    def full(self: Writer) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nmore lines")

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", full)
        with pytest.raises(InputError, match=r"writing failed \(.*No space left on device\); free"):
            convert(source, target)
    report = convert(source, target)
    assert report["resumed"] == report["tensors"]
    is_complete(target, source)
