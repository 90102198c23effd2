"""What is stored is what is loaded: whatever changed since is named, and never used."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from echovlm_jax.convert import convert, export, from_torch, load_params
from echovlm_jax.convert.folder import open_model
from echovlm_jax.convert.journal import Journal
from echovlm_jax.errors import InputError
from echovlm_jax.load import fingerprint
from echovlm_jax.storage import digests
from echovlm_jax.storage import writer as store
from echovlm_jax.storage.lock import Lock
from echovlm_jax.storage.verify import verify
from tests.convert.checkpoints import tensors, write


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source and a model of it, in chunks of a few kilobytes."""
    root = tmp_path_factory.mktemp("storage")
    write(root / "source", tensors(seed=3))
    (root / "source/chat_template.jinja").write_text("{{ messages }}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_BYTES", 3000)
        convert(root / "source", root / "ours")
    return root


@pytest.fixture
def both(made: Path, tmp_path: Path) -> tuple[Path, Path]:
    for name in ("source", "ours"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path / "source", tmp_path / "ours"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 3000)


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x40
    path.write_bytes(data)


def flip_weight(model: Path, name: str) -> None:
    """A bit of a tensor, somewhere in its last row."""
    row = tensors(seed=3)[name].reshape(-1)[-8:].tobytes()
    file = next(path for path in model.rglob("d/*") if row in path.read_bytes())
    data = bytearray(file.read_bytes())
    data[data.index(row) + 3] ^= 0x40
    file.write_bytes(data)


def weights(model: Path) -> Path:
    return max((model / "params/ocdbt.process_0/d").iterdir(), key=lambda p: p.stat().st_size)


def test_sharded_blocks_are_checked_and_equal(made: Path) -> None:
    opened = open_model(made / "ours")
    path = "text/layers/attn/q/kernel"
    shape = opened._reader.shapes[path]  # type: ignore[attr-defined]
    whole = opened.read(path, tuple(slice(0, n) for n in shape))
    for axis, size in enumerate(shape):
        for start, stop in ((0, size), (1 % size, size), (size // 2, size // 2 + 1)):
            index = [slice(0, n) for n in shape]
            index[axis] = slice(start, stop)
            assert np.array_equal(
                opened.read(path, tuple(index)).view(np.uint8),
                np.ascontiguousarray(whole[tuple(index)]).view(np.uint8),
            )


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.moe.gate.weight"])
def test_damaged_weights_are_never_loaded(both: tuple[Path, Path], name: str) -> None:
    """Whole arrays, blocks of devices and an export: the bytes that are read are checked."""
    model = both[1]
    flip_weight(model, name)
    assert not verify(model)["ok"]
    for read in (
        lambda: load_params(model),
        lambda: load_params(model, dtype="float32"),
        lambda: export(model, model.with_name("back")),
    ):
        with pytest.raises(InputError, match=r"ours.*convert again"):
            read()


def test_whatever_decides_a_models_function_is_checked(both: tuple[Path, Path]) -> None:
    model = both[1]
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "conversion.json"):
        before = (model / name).read_bytes()
        (model / name).write_bytes(before + b" ")
        assert verify(model)["corrupt"] == [name]
        with pytest.raises(InputError, match=f"ours: is broken: {name} differs; convert again"):
            open_model(model)
        (model / name).unlink()
        with pytest.raises(InputError, match=f"{name} missing|has no {name}"):
            open_model(model)
        (model / name).write_bytes(before)
    (model / digests.SUMS).unlink()
    with pytest.raises(InputError, match="XXH128SUMS missing"):
        open_model(model)


def test_models_from_before_there_were_digests(both: tuple[Path, Path], capsys) -> None:
    """Of chunks: the files are read through first. Of files: it says so."""
    model = both[1]
    report = json.loads((model / "conversion.json").read_text())
    del report["chunks"]
    (model / "conversion.json").write_text(json.dumps(report))
    digests.write(model)
    load_params(model)
    damaged = model.with_name("damaged")
    shutil.copytree(model, damaged)
    flip(weights(damaged))
    with pytest.raises(InputError, match="is broken: params/"):
        load_params(damaged)
    (model / digests.SUMS).unlink()
    load_params(model)
    assert "unchecked" in capsys.readouterr().err


def test_a_conversion_that_is_there_is_looked_at(both: tuple[Path, Path]) -> None:
    source, model = both
    assert convert(source, model)["tensors"]  # copied: other times, so the bytes are compared
    for name, content in (("chat_template.jinja", "other"), ("generation_config.json", "{}")):
        path = source / name
        before = path.read_text() if path.exists() else None
        path.write_text(content)
        with pytest.raises(
            InputError, match=f"exists; delete it .*: it was made with another {name}"
        ):
            convert(source, model)
        path.write_text(before) if before else path.unlink()
    file = source / "model.safetensors"
    stat = file.stat()
    flip(file, 0.9)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(
        InputError, match=r"exists; delete it .*: it was made of other weights \(.*\)"
    ):
        convert(source, model)
    flip(file, 0.9)
    assert convert(source, model)["tensors"]
    weights(model).write_bytes(b"")
    with pytest.raises(InputError, match=r"is broken: params/.* differs; delete it"):
        convert(source, model)


def test_damage_before_a_conversion_goes_on(
    both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    source, target = both[0], both[0].with_name("new")
    add, count = Journal.add, 0

    def stop(self: Journal, name: str, digest: str) -> None:
        nonlocal count
        add(self, name, digest)
        count += 1
        if count == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(from_torch.Journal, "add", stop)
        convert(source, target)
    partial = target.with_name("new.partial")
    done = [json.loads(line) for line in (partial / "journal.jsonl").read_text().splitlines()[1:]]
    large = max((line["name"] for line in done), key=lambda name: tensors(seed=3)[name].size)
    flip_weight(partial / "model", large)
    report = convert(source, target)
    assert report["resumed"] == 29 and "converted again" in capsys.readouterr().err
    assert verify(target)["ok"]
    a, b = load_params(target)[1], load_params(both[1])[1]
    assert fingerprint(a) == fingerprint(b)


def test_every_bit_of_every_parameter_is_in_the_fingerprint() -> None:
    tree = {"a": np.zeros((300, 7), np.float32), "b": {"c": np.ones(5, np.float32)}}
    mark = fingerprint(tree)
    assert mark == fingerprint({"b": dict(tree["b"]), "a": jax.numpy.asarray(tree["a"])})
    tree["a"][299, 6] = 1e-30
    assert mark != fingerprint(tree)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "file"):
        if path != tmp_path:
            path.touch()
        with Lock(path), pytest.raises(InputError, match="another process is writing"):
            Lock(path)
        Lock(path).close()
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another process is writing"):
        Lock(tmp_path)
    os.close(fd)
