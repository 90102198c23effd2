"""`echovlm verify`: every stored byte of a model or a run, and the names of what is corrupt."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from echovlm_jax.checkpoint import open_checkpoints
from echovlm_jax.cli import main
from echovlm_jax.convert import convert, from_torch
from echovlm_jax.errors import InputError
from echovlm_jax.storage import digests
from echovlm_jax.storage.verify import verify
from echovlm_jax.storage.writer import Writer
from tests.convert.checkpoints import tensors, write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", tensors())


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    convert(source, tmp_path / "ours")
    return tmp_path / "ours"


def test_any_changed_byte_of_a_model_is_found(model: Path) -> None:
    whole = verify(model)
    assert whole["ok"] and whole["corrupt"] == [] and whole["bytes"] == digests.nbytes(model)
    assert whole["arrays"] == len(
        json.loads((model / "params/_METADATA").read_text())["tree_metadata"]
    )
    files = [path for path in model.rglob("*") if path.is_file()]
    assert {"config.json", "conversion.json", digests.SUMS} < {path.name for path in files}
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert verify(model)["corrupt"] == [str(path.relative_to(model))]
        path.unlink()
        assert verify(model)["corrupt"] == [str(path.relative_to(model))]
        path.write_bytes(data)
    assert verify(model)["ok"]


def test_files_that_were_added(model: Path) -> None:
    (model / "tokenizer_config.json").write_text("{}")  # generating needs one, converting doesn't
    assert verify(model)["ok"]
    (model / "params/d/extra").touch()
    assert verify(model)["corrupt"] == ["params/d/extra"]


def test_a_conversion_that_was_interrupted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "finish", interrupted)
        convert(source, tmp_path / "ours")
    assert convert(source, tmp_path / "ours")["resumed"] > 0
    assert verify(tmp_path / "ours")["ok"]


def test_a_conversion_without_its_digests_is_not_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(from_torch.digests, "write", lambda *args, **kwargs: 1 / 0)
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == verify(model)
    run = tmp_path / "run"
    with open_checkpoints(run / "checkpoints", keep=3) as checkpoints:
        for step in (5, 10):
            checkpoints.save(step, {"w": jnp.ones((4, 4))}, {}, wait=True)
    for folder in (run, run / "checkpoints", run / "checkpoints/10"):
        assert main(["verify", str(folder), "--json"]) == 0
        capsys.readouterr()
    (run / "checkpoints/5/state/_sharding").write_text("{}")
    (run / "checkpoints/10/extra/metadata").unlink()
    assert main(["verify", str(run), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["corrupt"] == ["checkpoints/5/state/_sharding", "checkpoints/10/extra/metadata"]
    assert told["checkpoints"] == [5, 10] and told["arrays"] == 2 and not told["ok"]
    assert main(["verify", str(run / "checkpoints/5")]) == 1
    assert "corrupt: state/_sharding\n" in capsys.readouterr().out


def test_folders_without_digests(source: Path, model: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(InputError, match="source: holds no digests; `convert` and `train` store"):
        verify(source)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        verify(tmp_path / "nowhere")
    assert main(["verify", str(source)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (model / digests.SUMS).unlink()
    assert verify(model)["corrupt"] == [digests.SUMS]


def test_a_checkpoint_that_is_pruned_meanwhile(tmp_path: Path, monkeypatch) -> None:
    with open_checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"w": jnp.ones((4, 4))}, {}, wait=True)
    original = digests.check

    def check(folder: Path, **options):
        if folder.name == "1":
            shutil.rmtree(folder)
        return original(folder, **options)

    monkeypatch.setattr(digests, "check", check)
    assert verify(tmp_path)["ok"]
