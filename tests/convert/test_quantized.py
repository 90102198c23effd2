"""Checkpoints that others quantized: read as the floats that the program itself makes of them."""

import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from echovlm_jax.cli import main
from echovlm_jax.convert import convert, export, folder, inspect, load_params
from echovlm_jax.convert.dequantize import codes
from echovlm_jax.errors import InputError
from echovlm_jax.storage import writer as store
from echovlm_jax.storage.verify import verify
from tests.convert import quantized_checkpoints as made
from tests.convert.checkpoints import new_name, same_bits
from tests.convert.quantized_checkpoints import Checkpoint, torch, written

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GROUP = {"strategy": "group", "group_size": 32}
KINDS: dict[str, Callable[[], Checkpoint]] = {
    "awq": made.awq,
    "awq, whole columns": lambda: made.awq(-1),
    "awq, bfloat16": lambda: made.awq(dtype=BF16),
    **{f"gptq {n}": lambda n=n: made.gptq(n) for n in (2, 3, 4, 8)},
    **{f"gptq v2 {n}": lambda n=n: made.gptq(n, form="gptq_v2") for n in (2, 3, 4, 8)},
    "gptq, desc_act": lambda: made.gptq(act=True),
    "gptq 3, desc_act": lambda: made.gptq(3, form="gptq_v2", act=True),
    "gptq, whole columns": lambda: made.gptq(group=-1),
    "w4a16": lambda: made.compressed("pack-quantized", num_bits=4, **GROUP),
    "w4a16, zero points": lambda: made.compressed(
        "pack-quantized", num_bits=4, symmetric=False, **GROUP
    ),
    "w4a16, channel, zero points": lambda: made.compressed(
        "pack-quantized", FP16, num_bits=4, symmetric=False, strategy="channel"
    ),
    "w8a16": lambda: made.compressed("pack-quantized", num_bits=8, strategy="channel"),
    "w2a16": lambda: made.compressed("pack-quantized", FP32, num_bits=2, **GROUP),
    "w8a8": lambda: made.compressed(
        "int-quantized", num_bits=8, strategy="channel", activations=True
    ),
    "w8a8, zero points": lambda: made.compressed(
        "int-quantized", num_bits=8, symmetric=False, strategy="channel", activations=True
    ),
    "w8a8, tensor": lambda: made.compressed("int-quantized", FP16, num_bits=8, strategy="tensor"),
    "w4a8, group": lambda: made.compressed("int-quantized", num_bits=4, **GROUP),
    "nf4": made.nf4,
    "nf4, float16": lambda: made.nf4(FP16, block=128),
    "nf4, float32": lambda: made.nf4(FP32, double=False),
    "nf4, blocks of 4096": lambda: made.nf4(block=4096, double=False),
    "nf4, stored as bfloat16": lambda: made.nf4(storage=BF16),
    "fp4": lambda: made.nf4(FP32, kind="fp4"),
    "int8": made.int8,
    "int8, no dtype": lambda: made.int8(None),
}


def assert_same(a: dict, b: dict) -> None:
    """Bit for bit, but for zero's sign: bitsandbytes 0.50.2 has a +0 for fp4's -0 with AVX-512."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert same_bits(one + 0, other + 0), path


@pytest.mark.parametrize("kind", KINDS)
def test_the_programs_own_weights(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, read as they are and converted, in pieces of a few rows."""
    monkeypatch.setattr(store, "CHUNK_BYTES", 1000)
    checkpoint = KINDS[kind]()
    source = checkpoint.write(tmp_path / "source")
    floats = written(tmp_path / "floats", checkpoint.floats, {"torch_dtype": None})
    wanted = load_params(floats)[1]
    assert_same(load_params(source)[1], wanted)
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0
    assert_same(load_params(tmp_path / "ours")[1], wanted)
    assert not verify(tmp_path / "ours")["corrupt"]


def test_what_is_made_of_it_is_a_checkpoint_of_floats(tmp_path: Path) -> None:
    """Converted, exported and inspected; nothing says any more that it was quantized."""
    checkpoint = made.gptq(act=True)
    source = checkpoint.write(tmp_path / "source")
    (source / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    report = convert(source, tmp_path / "ours")
    assert report["dequantized"] == "gptq, 4 bit" and report["dtype"] == "float16"
    assert convert(source, tmp_path / "ours")["dequantized"] == "gptq, 4 bit"
    for model in (source, tmp_path / "ours"):
        assert inspect(model)["dtype"] == "float16"
        export(model, tmp_path / f"{model.name}-out")
        config = json.loads((tmp_path / f"{model.name}-out/config.json").read_text())
        assert "quantization_config" not in config
        assert not (tmp_path / f"{model.name}-out/quantize_config.json").exists()
        assert_same(load_params(tmp_path / f"{model.name}-out")[1], load_params(source)[1])


def test_rounded_again_or_cast(tmp_path: Path) -> None:
    checkpoint = made.awq()
    source = checkpoint.write(tmp_path / "source")
    floats = written(tmp_path / "floats", checkpoint.floats, {})
    for how in ({"quantize": "int8"}, {"dtype": "bfloat16"}):
        name = "-".join(how.values())
        convert(source, tmp_path / name, **how)
        convert(floats, tmp_path / f"{name}-floats", **how)
        a, b = (load_params(tmp_path / each)[1] for each in (name, f"{name}-floats"))
        assert_same(a, b)


def test_several_shards_and_newer_names(tmp_path: Path) -> None:
    """The parts of a weight may lie in several files, and have the prefixes of newer exporters."""
    checkpoint = made.awq()
    source = checkpoint.write(tmp_path / "source")
    wanted = load_params(source)[1]
    stored = {new_name(name): value for name, value in checkpoint.stored.items()}
    shards = [dict(list(stored.items())[n::3]) for n in range(3)]
    (source / "model.safetensors").unlink()
    where = {}
    for number, tensors in enumerate(shards):
        save_file({n: t.contiguous() for n, t in tensors.items()}, source / f"{number}.safetensors")
        where |= dict.fromkeys(tensors, f"{number}.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_same(load_params(source)[1], wanted)
    with pytest.raises(InputError, match=r"is quantized \(awq, 4 bit\); convert without --delete"):
        convert(source, tmp_path / "ours", delete_source_shards=True)


def test_a_file_of_pytorch(tmp_path: Path) -> None:
    checkpoint = made.gptq(8)
    source = checkpoint.write(tmp_path / "source")
    wanted = load_params(source)[1]
    (source / "model.safetensors").unlink()
    torch.save(checkpoint.stored, source / "pytorch_model.bin")
    assert_same(load_params(source)[1], wanted)


@pytest.mark.parametrize("newer", [False, True])
def test_biases_of_a_model_without_them(tmp_path: Path, newer: bool) -> None:
    """AutoGPTQ stores one of every module, as in Qwen's own GPTQ files; those of zeros are none."""
    checkpoint = made.gptq()
    wanted = load_params(checkpoint.write(tmp_path / "without"))[1]
    kept = [name for name in checkpoint.stored if name.endswith(".bias")]
    for name in made.linears(vision=False):
        outputs = checkpoint.stored[f"{name}.scales"].shape[1]
        checkpoint.stored.setdefault(f"{name}.bias", torch.zeros(outputs, dtype=FP16))
    stored = checkpoint.stored
    assert len([name for name in stored if name.endswith(".bias")]) == len(kept) + 8
    if newer:
        stored = {new_name(name): value for name, value in stored.items()}
    source = written(tmp_path / "source", stored, checkpoint.settings)
    assert_same(load_params(source)[1], wanted)
    last = f"{new_name(LAST) if newer else LAST}.bias"
    for value in (1.0, float("nan")):
        stored[last] = torch.zeros(64, dtype=FP16)
        stored[last][5] = value
        other = written(tmp_path / str(value), stored, checkpoint.settings)
        with pytest.raises(InputError, match=f"unexpected tensor {last}; config.json has no place"):
            load_params(other)


def test_another_reader_of_awq() -> None:
    """compressed-tensors has a converter of AutoAWQ's checkpoints."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    checkpoint = made.awq()
    name = "model.layers.1.mlp.down_proj"
    parts = {n: t for n, t in checkpoint.stored.items() if n.startswith(f"{name}.")}
    stored = AutoAWQConverter(group_size=32).process(parts)
    args = QuantizationArgs(num_bits=4, symmetric=False, **GROUP)
    read = BaseCompressor.get_value_from_registry("pack-quantized").decompress(
        {n.removeprefix(f"{name}."): t for n, t in stored.items()},
        QuantizationScheme(targets=["Linear"], weights=args),
    )
    assert torch.equal(read["weight"], checkpoint.floats[f"{name}.weight"])


@given(st.data())
def test_dense_integers(data: st.DataObject) -> None:
    bits = data.draw(st.integers(1, 8))
    rows, words = data.draw(st.integers(1, 3)), bits * data.draw(st.integers(1, 3))
    numbers = st.lists(st.integers(0, 2**bits - 1), min_size=words * 32 // bits * rows)
    wanted = np.array(data.draw(numbers)[: words * 32 // bits * rows]).reshape(rows, -1)
    assert (codes(made.as_words(wanted, bits).numpy(), bits) == wanted).all()


def test_one_module_is_in_memory(tmp_path: Path) -> None:
    """Converting holds the stored tensors of one module, and pieces of floats."""
    source, _ = folder.open_checkpoint(made.awq().write(tmp_path / "source"))
    names = [f"{name}.weight" for name in made.linears(vision=False)]
    names.sort(key=lambda name: source.tensors[name].shape, reverse=True)
    tracemalloc.start()
    try:
        source.tensors[names[0]].read(0, 64)
        one = tracemalloc.get_traced_memory()[0]
        for name in names:
            source.tensors[name].read(0, 64)
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(names) == 14 and kept < 1.5 * one


LAST = "model.layers.1.mlp.down_proj"  # [64, 96]
STATE = f"{LAST}.weight.quant_state.bitsandbytes__nf4"
Spoil = Callable[[dict], object]


def cut(name: str, axis: int = 0) -> Spoil:
    def change(stored: dict) -> None:
        stored[name] = stored[name].narrow(axis, 0, stored[name].shape[axis] - 1)

    return change


def put(name: str, value: object) -> Spoil:
    return lambda stored: stored.update({name: value})


def without(name: str) -> Spoil:
    return lambda stored: stored.pop(name)


def state(**changes: object) -> Spoil:
    def change(stored: dict) -> None:
        told = json.loads(bytes(stored[STATE].tolist())) | changes
        stored[STATE] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)

    return change


def outside(name: str, value: int) -> Spoil:
    def change(stored: dict) -> None:
        stored[name] = stored[name].clone()
        stored[name].view(-1)[5] = value

    return change


DAMAGED: dict[str, tuple[str, Spoil, str]] = {
    "awq scales": ("awq", without(f"{LAST}.scales"), "scales is missing beside qweight, qzeros"),
    "awq qzeros": ("awq", without(f"{LAST}.qzeros"), "qzeros is missing"),
    "awq qweight": ("awq", without(f"{LAST}.qweight"), "qweight is missing"),
    "awq group": ("awq", cut(f"{LAST}.qweight"), "95 inputs, not a multiple of group_size 32"),
    "awq columns": ("awq", cut(f"{LAST}.qzeros", 1), r"shape \[3, 7\], expected \[3, 8\]"),
    "awq dtype": ("awq", put(f"{LAST}.scales", torch.ones(3, 64).int()), "scales is int32, exp"),
    "awq twice": ("awq", put(f"{LAST}.weight", torch.ones(64, 96).half()), "is there beside qw"),
    "awq another's": ("awq", put(f"{LAST}.g_idx", torch.ones(96).int()), "quantized .GPTQ; tens"),
    "awq rank": ("awq", put(f"{LAST}.qweight", torch.ones(96).int()), r"expected \['any', 'any'"),
    "gptq group -1": ("gptq 4", outside(f"{LAST}.g_idx", -1), "a group outside 0 to 2"),
    "gptq group 3": ("gptq 4", outside(f"{LAST}.g_idx", 3), "a group outside 0 to 2"),
    "gptq g_idx": ("gptq 4", cut(f"{LAST}.g_idx"), r"shape \[95\], expected \[96\]"),
    "gptq no g_idx": ("gptq, desc_act", without(f"{LAST}.g_idx"), "desc_act is not false"),
    "gptq 3 rows": ("gptq 3", cut(f"{LAST}.qweight"), "does not hold integers of 3 bits"),
    "gptq zero": ("gptq 4", outside(f"{LAST}.qzeros", -1), "the zero point -1, unclear"),
    "w4a16 scale": ("w4a16", without(f"{LAST}.weight_scale"), "weight_scale is missing"),
    "w4a16 shape": ("w4a16", without(f"{LAST}.weight_shape"), "weight_shape is missing"),
    "w4a16 size": ("w4a16", put(f"{LAST}.weight_shape", torch.tensor([64, -96])), "says 64 x -96"),
    "w4a16 other": ("w4a16", put(f"{LAST}.weight_shape", torch.tensor([64, 128])), r"\[64, 16\]"),
    "w4a16 groups": ("w4a16", cut(f"{LAST}.weight_scale", 1), r"\[64, 2\], expected \[64, 3\]"),
    "w4a16 zeros": ("w4a16, zero points", without(f"{LAST}.weight_zero_point"), "symmetric is fal"),
    "w8a8 rows": ("w8a8", cut(f"{LAST}.weight_scale"), r"\[63, 1\], expected \[64, 1\]"),
    "w8a8 dense": ("w8a8", put(f"{LAST}.weight", torch.ones(64, 96)), "is float32, expected int8"),
    "nf4 state": ("nf4", without(STATE), "quant_state.bitsandbytes__nf4 is missing beside"),
    "nf4 absmax": ("nf4", cut(f"{LAST}.weight.absmax"), r"shape \[95\], expected \[96\]"),
    "nf4 nested": ("nf4", cut(f"{LAST}.weight.nested_quant_map"), r"expected \[256\]"),
    "nf4 not nested": ("nf4", without(f"{LAST}.weight.nested_absmax"), "absmax is uint8, expected"),
    "nf4 shape": ("nf4", state(shape=[64, 97]), "does not hold 64 x 97 nibbles, as"),
    "nf4 block": ("nf4", state(blocksize=100), "is not a state of nf4 or fp4"),
    "nf4 dtype": ("nf4", state(dtype="int8"), "is not a state of nf4 or fp4"),
    "nf4 kind": ("nf4", state(quant_type="nf5"), "is not a state of nf4 or fp4"),
    "nf4 sizes": ("nf4", state(shape=[10**9, 10**9]), "is not a state of nf4 or fp4"),
    "nf4 text": ("nf4", put(STATE, torch.full((9,), 91, dtype=torch.uint8)), "is not a state"),
    "nf4 table": ("nf4", outside(f"{LAST}.weight.quant_map", 3), "is not the table of nf4"),
    "int8 scale": ("int8", cut(f"{LAST}.SCB"), r"shape \[63\], expected \[64\]"),
    "int8 order": (
        "int8",
        put(f"{LAST}.weight_format", torch.tensor(1).byte()),
        "rows are not stored as they are",
    ),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_what_is_stored_is_not_what_the_method_stores(
    tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, spoil, says = DAMAGED[fault]
    checkpoint = KINDS[kind]()
    spoil(checkpoint.stored)
    source = checkpoint.write(tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 2
    told = capsys.readouterr().err
    assert re.search(says, told) and str(source) in told, told
    assert told.count("\n") == 1 and len(told) < 600
    assert not (tmp_path / "ours").exists()


UNREAD: dict[str, tuple[str, dict, str]] = {
    "gemv": ("awq", {"version": "gemv"}, "with version gemv, which is not read .gemm are"),
    "awq 3": ("awq", {"bits": 3}, "with bits 3, which is not read .4 are"),
    "no group": ("awq", {"group_size": None}, "group_size is None, which is not a size"),
    "group 0": ("awq", {"group_size": 0}, "group_size is 0, which is not a size"),
    "group 1.5": ("awq", {"group_size": 1.5}, "group_size is 1.5, which is not a size"),
    "marlin": ("gptq 4", {"is_marlin_format": True}, "with is_marlin_format True"),
    "marlin form": ("gptq 4", {"checkpoint_format": "marlin"}, "with checkpoint_format marlin"),
    "two forms": ("gptq 4", {"format": "gptq_v2"}, "and checkpoint_format and format differ"),
    "5 bits": ("gptq 4", {"bits": 5}, "with bits 5, which is not read .2, 3, 4, 8 are"),
    "dynamic": ("gptq 4", {"dynamic": {"+:.*": {"bits": 8}}}, r"in another way \(dynamic\)"),
    "no method": ("awq", {"quant_method": None}, "method that it doesn't name.*and only awq, gptq"),
    "eetq": ("awq", {"quant_method": "eetq"}, "eetq.*and only awq, gptq, compressed-tensors"),
    "hqq": ("awq", {"quant_method": "hqq"}, "hqq.*and only awq"),
    "fp8": ("w8a8", {"format": "float-quantized"}, "with format float-quantized"),
    "sparse": ("w8a8", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "they are sparse"),
    "rotated": ("w8a8", {"transform_config": {"config_groups": {"R1": {}}, "x": 1}}, "transform"),
    "no groups": ("w8a8", {"config_groups": None}, "config_groups does not say how"),
    "nothing": ("w8a8", {"config_groups": {"a": {"targets": []}}}, "does not say how weights"),
    "two": (
        "w8a8",
        {"config_groups": {n: {"weights": {"num_bits": n, "group_size": -1}} for n in (4, 8)}},
        "its config_groups differ",
    ),
    "float": (
        "w8a8",
        {"config_groups": {"a": {"weights": {"num_bits": 8, "type": "float"}}}},
        "with type float",
    ),
}


@pytest.mark.parametrize("what", UNREAD)
def test_settings_that_are_not_read(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, changes, says = UNREAD[what]
    checkpoint = KINDS[kind]()
    checkpoint.settings["quantization_config"] |= changes
    source = checkpoint.write(tmp_path / "source")
    for words in (["convert", str(source), str(tmp_path / "ours")], ["inspect", str(source)]):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert re.search(says, told) and f"{source}/config.json: quantization_config" in told, told
        assert "that it was made from" in told and told.count("\n") == 1 and len(told) < 600


def test_where_the_settings_are(tmp_path: Path) -> None:
    """compression_config is compressed-tensors' older key; text_config may hold either."""
    checkpoint = KINDS["w4a16"]()
    wanted = load_params(checkpoint.write(tmp_path / "root"))[1]
    told = checkpoint.settings["quantization_config"] | {"quant_method": None}
    for name, settings in {
        "older": {"compression_config": told},
        "inside": {"text_config": checkpoint.settings | {"hidden_size": None}},
    }.items():
        source = written(tmp_path / name, checkpoint.stored, settings)
        assert_same(load_params(source)[1], wanted)
        convert(source, tmp_path / f"{name}-ours")
        config = json.loads((tmp_path / f"{name}-ours/config.json").read_text())
        assert "compression_config" not in config
        assert "quantization_config" not in config.get("text_config", {})
