"""The folder beside a target: nothing of somebody else's is deleted, and no finished work."""

from pathlib import Path

import pytest

from echovlm_jax.convert import convert, export, safetensors, source, to_torch
from echovlm_jax.convert.journal import Journal
from echovlm_jax.errors import InputError
from echovlm_jax.storage import writer as store
from tests.convert.checkpoints import digests, tensors, write


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "source", tensors())


@pytest.mark.parametrize("inside", ["thesis.txt", "model/thesis.txt", "journal.jsonl"])
@pytest.mark.parametrize("suffix", [".partial", ".exporting"])
def test_somebodys_folder(checkpoint: Path, tmp_path: Path, suffix: str, inside: str) -> None:
    theirs = tmp_path / f"out{suffix}" / inside
    theirs.parent.mkdir(parents=True)
    theirs.write_text("years of work")
    what = convert if suffix == ".partial" else export
    with pytest.raises(InputError, match=rf"out\{suffix}: .*; delete (it or move it|that folder)"):
        what(checkpoint, tmp_path / "out")
    assert theirs.read_text() == "years of work"
    assert [path.name for path in theirs.parent.iterdir()] == [theirs.name]
    theirs.unlink()
    (tmp_path / f"out{suffix}" / "model").mkdir(exist_ok=True)
    (tmp_path / f"out{suffix}" / "model").rmdir()
    what(checkpoint, tmp_path / "out")  # an empty folder is nobody's
    assert not (tmp_path / f"out{suffix}").exists()


def test_a_journal_beside_somebodys_files(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "ours")
    partial = tmp_path / "ours.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    convert(checkpoint, tmp_path / "ours")  # is there: says so, and need not clear anything
    assert (partial / "thesis.txt").exists()


def test_two_exports_to_one_place(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one, begun while the first one writes, is refused and harms nothing."""
    original = safetensors.write_file
    refused = []

    def write_file(*args) -> None:
        original(*args)
        monkeypatch.setattr(safetensors, "write_file", original)
        with pytest.raises(InputError, match=r"out\.exporting: another process is writing"):
            export(checkpoint, tmp_path / "out")
        refused.append(True)

    monkeypatch.setattr(safetensors, "write_file", write_file)
    export(checkpoint, tmp_path / "out")
    assert refused and digests(tmp_path / "out") == digests(checkpoint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_what_a_killed_export_left(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "out.exporting"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "discard", lambda *args: None)
        patch.setattr(to_torch.folder, "copy_side_files", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(checkpoint, tmp_path / "out")
    assert (work / "model/model.safetensors").exists()
    export(checkpoint, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(checkpoint) and not work.exists()


@pytest.mark.parametrize(("reads", "kept"), [(40, True), (0, False)])
def test_a_read_error_keeps_finished_tensors(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: int, kept: bool
) -> None:
    monkeypatch.setattr("echovlm_jax.convert.from_torch._IN_FLIGHT_BYTES", 0)
    left, original = reads, safetensors.read_values

    def read_values(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(5, "Input/output error")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(source.safetensors, "read_values", read_values)
        with pytest.raises(InputError, match=r"cannot be read \(Input/output error\)"):
            convert(checkpoint, tmp_path / "ours")
    assert (tmp_path / "ours.partial").exists() == kept
    assert convert(checkpoint, tmp_path / "ours")["resumed"] == reads
    assert not (tmp_path / "ours.partial").exists()


def test_a_link_is_refused_before_the_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(store, "Writer", None)
    monkeypatch.setattr(safetensors, "write_file", None)
    for what in (convert, export):
        for name in ("link", "dangling"):
            with pytest.raises(InputError, match=f"{name}: is a link; delete it"):
                what(checkpoint, tmp_path / name)


def test_the_root_folder(checkpoint: Path) -> None:
    for what in (convert, export):
        with pytest.raises(InputError, match=r"^/: exists; choose another place"):
            what(checkpoint, "/")


@pytest.mark.parametrize(
    "line",
    [b'{"name": "\xff", "sha256": "1"}', b'{"name": "x"}', b'{"sha256": "1"}', b'{"name": [1]}'],
)
def test_a_damaged_journal(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, {"a": 1}):
        pass
    with open(path, "ab") as file:
        file.write(line + b"\n")
    for _ in range(2):  # the first refusal gives the lock back
        with pytest.raises(InputError, match=r"jsonl is damaged; delete that folder to start over"):
            Journal(path, {"a": 1})


def test_a_journal_of_unknown_tensors(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store.Writer, "finish", interrupted)
        convert(checkpoint, tmp_path / "ours")
    with open(tmp_path / "ours.partial/journal.jsonl", "a") as file:
        file.write('{"name": "nope", "sha256": "1"}\n')
    with pytest.raises(InputError, match=r"ours\.partial: .* names nope, .* delete that folder"):
        convert(checkpoint, tmp_path / "ours")
