"""Weights in few bits, stored and loaded: the same bits, whichever way they went."""

import json
import math
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest

from echovlm_jax.cli import main
from echovlm_jax.convert import convert, export, folder, inspect, load, load_params, table
from echovlm_jax.convert.from_torch import Journal
from echovlm_jax.errors import InputError
from echovlm_jax.load import fingerprint
from echovlm_jax.mesh import make_mesh, param_shardings
from echovlm_jax.model import abstract_params, logical_axes, param_specs
from echovlm_jax.ops.product.weight import Quantized, as_operand
from echovlm_jax.quantize import pack, quantize, recipe, takes, unpack
from echovlm_jax.storage import digests
from echovlm_jax.storage import writer as store
from echovlm_jax.storage.verify import verify
from tests.convert.checkpoints import MINI, finite, same_bits, write

KINDS = ("int8", "int4")
CHUNK = 3000


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", CHUNK)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in Hugging Face form, converted, and converted to each kind."""
    root = tmp_path_factory.mktemp("few")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_BYTES", CHUNK)
        source = write(root / "source", finite(dtype="bfloat16", seed=3), shards=2)
        convert(source, root / "wide")
        for kind in KINDS:
            convert(source, root / kind, quantize=kind)
    return {name: root / name for name in ("source", "wide", *KINDS)}


def assert_same(a: dict, b: dict) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert same_bits(one, other), path


def weights(params: dict) -> dict[str, Quantized]:
    return {p: leaf for p, leaf in table.flatten(params).items() if isinstance(leaf, Quantized)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_gives_the_same_bits(made: dict[str, Path], kind: str) -> None:
    """Quantized while loading, from either form, or stored so: what `quantize` makes of floats."""
    config, wide = load_params(made["source"])
    specs = param_specs(config)
    wanted = {
        path: quantize(value, specs[path], recipe(kind)) if takes(path, specs[path]) else value
        for path, value in table.flatten(wide).items()
    }
    for name in ("source", "wide"):
        assert_same(load_params(made[name], quantize=kind)[1], table.unflatten(wanted))
    stored = load_params(made[kind])[1]
    assert_same(stored, table.unflatten(wanted))
    assert len(weights(stored)) == 15
    assert fingerprint(stored) != fingerprint(wide)
    floats = table.flatten(wide)
    for path, weight in weights(stored).items():  # and it is still that weight
        exact = np.asarray(floats[path], np.float32)
        error = np.abs(np.asarray(as_operand(weight, np.float32)) - exact).max()
        steps = 254 if weight.values.dtype == np.int8 else 8
        assert error <= 1.001 * np.abs(exact).max() / steps


def test_halves_of_bytes() -> None:
    """As `ml_dtypes` and a Python loop have it; an odd axis too."""
    values = np.random.default_rng(0).integers(-8, 8, (3, 5), np.int8)
    packed = np.asarray(pack(values))
    assert packed.shape == (3, 3) and packed.dtype == np.uint8
    for row, held in zip(values.tolist(), packed.tolist(), strict=True):
        pairs = zip(row[::2], [*row[1::2], 0], strict=True)
        assert held == [(low & 15) + 16 * (high & 15) for low, high in pairs]
    back = unpack(packed)[:, :5]
    assert np.array_equal(back, values)
    assert np.array_equal(back.view(ml_dtypes.int4).astype(int), values)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_told_of_it(made: dict[str, Path], kind: str) -> None:
    report = json.loads((made[kind] / "conversion.json").read_text())
    wide, told = inspect(made["wide"]), inspect(made[kind])
    leaves = jax.tree_util.tree_leaves(weights(load_params(made[kind])[1]))
    half = {"int8": 1, "int4": 2}[kind]
    few = sum(v.size // (half if v.dtype.name == kind else 1) * v.dtype.itemsize for v in leaves)
    assert report["quantized"] == told["quantized"] == {kind: few}
    assert (
        report["quantize"]
        == told["quantize"]
        == {
            "kind": kind,
            "bits": {"int8": 8, "int4": 4}[kind],
            "group": {"int8": None, "int4": 128}[kind],
            "qkv_bits": 8,
            **({"o_bits": 8, "expert_bits": 8} if kind == "int4" else {}),
            "table_bits": 8,
            "table_group": 128,
            "values": {"int8": "int8", "int4": "two a byte, the first in its low half"}[kind],
            "dtype": "bfloat16",
        }
    )
    assert told["dtype"] == report["dtype"] == f"bfloat16+{kind}"
    assert told["by_module"] == wide["by_module"] and told["params"] == wide["params"]
    assert sum(told["bytes_by_module"].values()) == told["bytes"] == report["bytes"]
    assert (
        told["bytes_by_module"]["vision.merger.fc1"] == wide["bytes_by_module"]["vision.merger.fc1"]
    )
    assert verify(made[kind])["ok"]
    assert verify(made[kind])["arrays"] == verify(made["wide"])["arrays"] + 15


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_gone_on_with(
    made: dict[str, Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, original, left = tmp_path / "ours", Journal.add, 25

    def add(self: Journal, name: str, digest: str) -> None:
        nonlocal left
        if not (left := left - 1):
            raise KeyboardInterrupt
        original(self, name, digest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "add", add)
        convert(made["source"], target, quantize=kind)
    for other in {None, *KINDS} - {kind}:
        with pytest.raises(InputError, match=r"ours\.partial: holds an unfinished conversion"):
            convert(made["source"], target, quantize=other)
    assert convert(made["source"], target, quantize=kind)["resumed"] == 24
    assert verify(target)["ok"]
    assert_same(load_params(target)[1], load_params(made[kind])[1])
    report, other = (
        json.loads((path / "conversion.json").read_text()) for path in (target, made[kind])
    )
    for key in ("sha256", "chunks", "quantized", "bytes"):
        assert report[key] == other[key]
    again = convert(made["source"], target, quantize=kind)  # there already, and whole
    assert again["quantized"] == report["quantized"]
    for other in {None, *KINDS} - {kind}:
        with pytest.raises(InputError, match="it was made with another quantize"):
            convert(made["source"], target, quantize=other)


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes(made: dict[str, Path], kind: str, tmp_path: Path) -> None:
    model = shutil.copytree(made[kind], tmp_path / "ours")
    data = max((model / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    # One alone may lie between the values, where nothing is read.
    for place in range(0, len(content), len(content) // 16):
        content[place] ^= 1
    data.write_bytes(content)
    assert verify(model)["corrupt"] == [str(data.relative_to(model))]
    with pytest.raises(InputError, match=r"is broken: .* differs from its digest; convert again"):
        load_params(model)


DAMAGE = {
    "no recipe": lambda said: None,
    "another group": lambda said: said | {"group": 16},
    "another width": lambda said: said | {"bits": 8, "group": None, "values": "int8"},
    "another order": lambda said: said | {"values": "two a byte, the first in its high half"},
    "a key more": lambda said: said | {"zero_point": True},
    "a key less": lambda said: {key: said[key] for key in said if key != "bits"},
    "no object": lambda said: "int4",
    "a number": lambda said: said | {"bits": True},
    "a dtype": lambda said: said | {"dtype": "int8"},
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_report_that_says_something_else(
    made: dict[str, Path], how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(made["int4"], tmp_path / "ours")
    path = model / "conversion.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps(report | {"quantize": DAMAGE[how](report["quantize"])}))
    with pytest.raises(InputError, match=r"conversion\.json differs; convert again"):
        load_params(model)
    digests.write(model)  # as if it had been made so
    assert main(["inspect", str(model)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_commands_that_need_floats(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(made["int4"])
    refused = r"int4: its weights are quantized \(int4\), for `generate`, `eval` and `train` with"
    with pytest.raises(InputError, match=refused):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    for words in (
        ["export", model, str(tmp_path / "out")],
        ["upcycle", model, str(tmp_path / "out")],
        ["convert", model, str(tmp_path / "out"), "--quantize", "int8"],
        ["convert", str(made["source"]), str(tmp_path / "out"), "--quantize", "int3"],
        ["convert", str(made["source"]), str(tmp_path / "out"), "--quantize", "w8a8"],
        ["generate", str(made["source"]), "--prompt", "?", "--quantize", "int3"],
        ["generate", model, "--prompt", "?", "--quantize", "int8"],
    ):
        capsys.readouterr()
        assert main(words) == 2, words
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and not captured.out, words
    assert list(tmp_path.iterdir()) == []


def test_another_kind_than_is_stored(made: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="is quantized as int4, and quantize 'int8' is asked for"):
        load_params(made["int4"], quantize="int8")
    assert_same(load_params(made["int4"], quantize="int4")[1], load_params(made["int4"])[1])
    # The same bits, multiplied in another way but for the tables.
    params = load_params(made["int8"], quantize="w8a8")[1]
    assert all(w.int8_products != w.grouped for w in weights(params).values())
    assert_same(jax.tree.leaves(params), jax.tree.leaves(load_params(made["int8"])[1]))
    assert fingerprint(params) != fingerprint(load_params(made["int8"])[1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_has_no_scale(tmp_path: Path, value: float) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    values = finite(dtype="bfloat16")
    values[name][3, 5] = value
    source = write(tmp_path / "source", values)
    for kind in KINDS:
        with pytest.raises(InputError, match=f"{name} holds a value that is not finite; mend"):
            convert(source, tmp_path / "ours", quantize=kind)
        with pytest.raises(InputError, match="mlp/down/kernel holds a value that is not finite"):
            load_params(source, quantize=kind)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_over_a_mesh(made: dict[str, Path], kind: str) -> None:
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    tree = param_shardings(logical_axes(MINI), abstract_params(MINI), mesh)
    alone = load_params(made[kind])[1]
    for name in ("source", kind):
        params = load_params(made[name], shardings=tree, quantize=kind)[1]
        assert_same(params, alone)
        for path, weight in weights(params).items():
            held = {shard.data.nbytes for shard in weight.values.addressable_shards}
            assert held == {weight.values.nbytes // 8}, path
            assert weight.values.sharding.mesh == weight.scale.sharding.mesh == mesh


def test_only_what_a_process_needs_is_read() -> None:
    """A quarter of the second layer's rows, and what shares a piece with them."""
    spec = param_specs(MINI)["text/layers/mlp/up/kernel"]
    block = (slice(1, 2), slice(24, 36), slice(0, 32))
    sharding = SimpleNamespace(
        addressable_devices_indices_map=lambda shape: {"a": block, "b": block}
    )
    rows = CHUNK // (32 * 2)
    found = load._blocks(spec, 2, sharding, spec.shape)  # type: ignore[arg-type]
    assert rows < 48 and {place for place, _ in found} == {(1,)}
    covered = {i for _, cut in found for i in range(cut.start, cut.stop)}
    assert set(range(24, 36)) <= covered and len(found) < 2 * math.ceil(48 / rows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_holds_one_parameter(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What numpy holds at one time is one parameter in few bits, and pieces of floats."""
    text = {"num_layers": 12, "hidden_size": 128, "mlp_dim": 512}
    config = MINI.replace(text=text, vision={"out_width": 128}, moe=None)
    source = write(tmp_path / "source", finite(config, "bfloat16"), config)
    largest = 12 * 128 * 512
    monkeypatch.setattr(store, "CHUNK_BYTES", 2**16)
    opened = folder.open_model(source)
    load_params(opened, quantize=kind)  # compiled
    tracemalloc.start()
    try:
        params = load_params(opened, quantize=kind)[1]
        kept, peak = tracemalloc.get_traced_memory()  # a CPU keeps arrays of numpy as its own
    finally:
        tracemalloc.stop()
    total = sum(weight.values.size for weight in weights(params).values())
    assert total > 3 * largest
    assert peak > largest
    assert peak - kept < 2 * largest
