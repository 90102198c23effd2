"""A conversion that deletes its source's shards: what it makes is the same, and nothing is lost."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from echovlm_jax.convert import convert
from echovlm_jax.convert.journal import REMEMBERED
from echovlm_jax.convert.shards import Shards
from echovlm_jax.errors import InputError
from echovlm_jax.storage.verify import verify
from tests.convert.checkpoints import digests, finite, write

_CHILD = """
import os, signal, sys
from echovlm_jax.convert import from_torch, shards
source, target, place, count = sys.argv[1:]
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
    "delete": (shards, "remove"),
    "deleted": (shards, "sync_folder"),
    "renamed": (from_torch.Journal, "discard"),
}
deadly(*places[place])
from_torch.convert(source, target, quantize="int8", delete_source_shards=True)
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released folder of several shards."""
    folder = tmp_path_factory.mktemp("released")
    write(folder / "source", finite(), shards=4)
    convert(folder / "source", folder / "int8", quantize="int8")
    return folder


@pytest.fixture
def source(released: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released / "source", tmp_path / "source"))


def _shards(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors"))


def _is_the_same(target: Path, released: Path) -> None:
    """The weights, which the report has digests of."""
    assert verify(target)["ok"]
    ours, theirs = (json.loads((p / "conversion.json").read_text()) for p in (target, released))
    assert (ours["sha256"], ours["chunks"]) == (theirs["sha256"], theirs["chunks"])


def test_shards_go_one_by_one_and_the_result_is_the_same(
    source: Path, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, held = [len(_shards(source))], []
    plain = Shards.delete_used

    def watched(self: Shards, whole, name=None):
        plain(self, whole, name)
        there.append(len(_shards(source)))
        held.append(sum(".safetensors (deleted)" in file for file in _open_files()))

    monkeypatch.setattr(Shards, "delete_used", watched)
    names = [path.name for path in _shards(source)]
    report = convert(source, tmp_path / "int8", quantize="int8", delete_source_shards=True)
    assert report["deleted"] == names and not _shards(source)
    assert max(a - b for a, b in itertools.pairwise(there)) == 1  # never two at once
    assert not any(held)  # a file that is still open would keep its place on the disk
    assert (source / "config.json").is_file() and (source / "tokenizer.json").is_file()
    _is_the_same(tmp_path / "int8", released / "int8")
    # The same command again finds it done, without the shards.
    again = convert(source, tmp_path / "int8", quantize="int8", delete_source_shards=True)
    assert again == report
    with pytest.raises(InputError, match="another quantize"):
        convert(source, tmp_path / "int8", quantize="int4", delete_source_shards=True)


def _open_files() -> list[str]:
    """What this process has open; a file may be closed meanwhile."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


@pytest.mark.parametrize(
    ("place", "count"),
    [("delete", 2), ("deleted", 3), ("renamed", 1)],
)
def test_after_a_kill_it_goes_on_without_them(
    source: Path, released: Path, tmp_path: Path, place: str, count: int
) -> None:
    target = tmp_path / "int8"
    command = [sys.executable, "-c", _CHILD, str(source), str(target), place, str(count)]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    convert(source, target, quantize="int8", delete_source_shards=True)
    assert not _shards(source)
    _is_the_same(target, released / "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8", "source"]


def test_without_the_option_nothing_is_deleted(source: Path, tmp_path: Path) -> None:
    names = [path.name for path in _shards(source)]
    assert "deleted" not in convert(source, tmp_path / "int8", quantize="int8")
    assert [path.name for path in _shards(source)] == names


def test_a_shard_is_kept_where_the_disk_has_something_else(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(source)
    monkeypatch.setattr("echovlm_jax.convert.from_torch._is_whole", lambda *_: False)
    with pytest.raises(InputError, match="is kept"):
        convert(source, tmp_path / "int8", quantize="int8", delete_source_shards=True)
    assert digests(source) == before


def test_links_are_refused_before_anything_is_done(source: Path, tmp_path: Path) -> None:
    first, second, *_ = _shards(source)
    blob = first.rename(tmp_path / "blob")
    first.symlink_to(blob)
    with pytest.raises(InputError, match="is a link"):
        convert(source, tmp_path / "int8", delete_source_shards=True)
    first.unlink()
    blob.rename(first)
    os.link(second, tmp_path / "other")
    with pytest.raises(InputError, match="second name"):
        convert(source, tmp_path / "int8", delete_source_shards=True)
    assert blob.exists() is False and len(_shards(source)) == 4
    assert not (tmp_path / "int8").exists() and not (tmp_path / "int8.partial").exists()


def test_a_disk_that_could_not_hold_both_will_do(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        "echovlm_jax.convert.folder.check_space", lambda path, needed: asked.append(needed)
    )
    largest = max(path.stat().st_size for path in _shards(source))
    report = convert(source, tmp_path / "plain")
    convert(source, tmp_path / "used", delete_source_shards=True)
    assert asked[0] == report["bytes"] and asked[1] <= largest


def test_what_it_remembers_may_be_damaged(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "int8"
    command = [sys.executable, "-c", _CHILD, str(source), str(target), "deleted", "2"]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    noted = tmp_path / "int8.partial" / REMEMBERED
    said = json.loads(noted.read_text())
    noted.write_text(json.dumps({file: {"stamp": ""} for file in said}))
    with pytest.raises(InputError, match="does not say what"):
        convert(source, target, quantize="int8", delete_source_shards=True)
    noted.unlink()
    with pytest.raises(InputError, match="is missing"):
        convert(source, target, quantize="int8", delete_source_shards=True)
