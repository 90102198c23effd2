"""A disk that fills up: one line with the path and the space, and nothing half-written."""

import errno
import json
import os
import subprocess
import sys

import pytest

from echovlm_jax.cli import main
from echovlm_jax.data import build as building
from echovlm_jax.data import disk, parts
from echovlm_jax.data.beam import _call
from echovlm_jax.data.tokenizer import train_sentencepiece
from echovlm_jax.errors import InputError
from echovlm_jax.phantom import write as phantom
from tests.data.sources import record, write


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def one_line(capsys, path):
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and not printed.out
    assert f"{path}" in printed.err and "no space left on the disk (" in printed.err
    return printed.err


def test_the_line_has_path_free_and_needed(tmp_path):
    needed = r"a: no space .* free, about 1\.5 MB more are needed\)"
    with pytest.raises(InputError, match=needed), disk.writing(tmp_path / "a", lambda: 1_500_000):
        full()
    unknown = r"no space left on the disk \([\d.]+ .?B free\)"
    with pytest.raises(InputError, match=unknown), disk.writing(tmp_path / "not" / "there"):
        full()
    with pytest.raises(InputError, match="b: Permission denied"), disk.writing(tmp_path):
        raise OSError(errno.EACCES, "Permission denied", str(tmp_path / "b"))
    with pytest.raises(InputError, match="the write failed"), disk.writing(tmp_path):
        raise OSError("of a library")


@pytest.mark.parametrize("where", ["survey", "part", "shard", "quarantine", "manifest"])
def test_build_says_so_and_goes_on_later(tmp_path, capsys, monkeypatch, where):
    sources, images = write(tmp_path, [record(n) for n in range(3)] + ["bad"])
    words = ["data", "build", "--source", str(sources[0]), "--images", str(images), "--workers"]
    words += ["1", "--out", str(tmp_path / "out"), "--json"]
    with monkeypatch.context() as patch:
        if where == "survey":
            patch.setattr("echovlm_jax.data.survey.np.memmap", full)
        elif where == "part":
            patch.setattr(parts.os, "fsync", full)
        elif where == "shard":
            patch.setattr(disk, "free_bytes", lambda _: 0)
            patch.setattr(parts, "_shard", _shard_that_fails)
        elif where == "quarantine":
            patch.setattr(building.shutil, "copyfileobj", full)
        else:
            patch.setattr(building.folder, "manifest_bytes", full)
        assert main(words) == 2
    assert "more are needed" in one_line(capsys, tmp_path / "out.partial")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("images", "liver.json", "out.partial"),
    ]
    assert not list((tmp_path / "out.partial").glob("*.tmp"))
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 3


class _shard_that_fails:
    def __init__(self, path):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def write(self, _):
        raise RuntimeError("ArrayRecord's only word")


@pytest.mark.parametrize("workers", [1, 2])
def test_phantom_leaves_nothing(tmp_path, capsys, monkeypatch, workers):
    out = tmp_path / "exams"
    words = ["data", "phantom", "--out", str(out), "--exams", "2", "--views", "1", "--workers"]
    with monkeypatch.context() as patch:
        if workers == 1:
            patch.setattr(phantom.os, "replace", full)
        else:  # its processes have modules of their own: only the last file is written here
            patch.setattr(phantom.os, "fsync", full)
        assert main([*words, str(workers)]) == 2
    one_line(capsys, out)
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main([*words, "1"]) == 2 and [path.name for path in out.iterdir()] == ["notes.txt"]


def test_tokenizer_and_sheet_leave_nothing(tmp_path, capsys, monkeypatch):
    texts = [f"the liver is {word} and {word}ly seen in view {n}" for n, word in enumerate("abcde")]
    monkeypatch.setattr("echovlm_jax.data.tokenizer._train", lambda *_: b"x" * 100)
    monkeypatch.setattr("echovlm_jax.data.tokenizer.SentencePieceTokenizer", lambda *_: None)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"tokenizer\.model: no space .*100 bytes more"):
        train_sentencepiece(texts, tmp_path / "tokenizer", 400)
    monkeypatch.setattr("pathlib.Path.replace", full)
    monkeypatch.setattr("echovlm_jax.phantom.sheet._tile", lambda *_: (0, 0, 0, 0))
    monkeypatch.setattr("PIL.Image.Image.paste", lambda *_: None)
    assert main(["data", "phantom", "--sheet", str(tmp_path / "s.png")]) == 2
    one_line(capsys, tmp_path / "s.png")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_beam_worker_says_so_too(tmp_path):
    with pytest.raises(InputError, match="no space left on the disk"):
        _call(0, full, str(tmp_path))


@pytest.mark.slow
def test_a_disk_that_is_full(tmp_path):
    """On a real small disk: needs the right to mount one."""
    sources, images = write(tmp_path, [record(n, 4) for n in range(300)])
    code = "import sys; from echovlm_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "data", "build", "--source", str(sources[0])]
    command += ["--images", str(images), "--out", str(tmp_path / "small" / "out"), "--workers"]
    (tmp_path / "small").mkdir()
    script = (
        'mount -t tmpfs -o size=800k none "$1" || exit 99; shift\n'
        '"$@" 1; echo "exit $?" >&2; "$@" 2; echo "exit $?" >&2; ls -A "$0" >&2\n'
        'mount -o remount,size=20m none "$0"; "$@" 1 >&2; echo "exit $?" >&2; ls -A "$0" >&2'
    )
    small = str(tmp_path / "small")
    words = ["unshare", "-m", "bash", "-c", script, small, small, *command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        pytest.skip("no unshare")
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("may not mount a disk")
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("exit")] == ["exit 2", "exit 2", "exit 0"]
    assert sum("no space left on the disk" in line for line in lines) == 2
    assert "out.partial" in lines and lines[-1] == "out"
