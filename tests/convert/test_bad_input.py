"""Bad checkpoints: each is refused in one line that names what is wrong, and leaves nothing."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from echovlm_jax.config import to_hf
from echovlm_jax.convert import convert, export, inspect, load_params, safetensors
from echovlm_jax.convert.to_torch import parse_size
from echovlm_jax.convert.upcycle import upcycle
from echovlm_jax.errors import InputError
from echovlm_jax.storage import digests as sums
from echovlm_jax.storage.arrays import Reader
from tests.convert.checkpoints import DENSE, MINI, Tensors, digests, new_name, tensors, write

HEAD = "lm_head.weight"
NORM = "model.norm.weight"


def refused(source: Path, says: str) -> None:
    target = source.parent / "ours"
    with pytest.raises(InputError, match=says) as caught:
        convert(source, target)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert not target.exists() and not target.with_name("ours.partial").exists()


def changed(tmp_path: Path, **changes: np.ndarray | None) -> Path:
    values: Tensors = tensors()
    for name, value in changes.items():
        if value is None:
            del values[name]
        else:
            values[name] = value
    return write(tmp_path / "source", values)


def raw(header: object, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "BF16") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_missing_shard(tmp_path: Path) -> None:
    source = write(tmp_path / "source", tensors(), shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    refused(source, r"model-00002-of-00003\.safetensors: is missing, and model\.safe.*index")


def test_truncated_shard(tmp_path: Path) -> None:
    source = write(tmp_path / "source", tensors(), shards=3)
    shard = source / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    for keep in (len(data) - 1, len(data) // 2):
        shard.write_bytes(data[:keep])
        refused(source, r"00002-of-00003\.safetensors: truncated: tensor \S+ ends at byte")
    shard.write_bytes(data[:20])
    refused(source, r"00002-of-00003\.safetensors: truncated: the header says")
    shard.write_bytes(b"")
    refused(source, r"not a safetensors file")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (raw({}, b"", length=2**62), "header of 4611686018427387904 bytes"),
        (raw({}, b"", length=99_999_999), "truncated: the header says 99999999"),
        (raw({"a": entry(0, 8, [4]), "b": entry(4, 12, [4])}, bytes(12)), "'?b'? overlaps|b over"),
        (raw({"a": entry(0, 8, [4]), "b": entry(10, 18, [4])}, bytes(18)), "b leaves a gap"),
        (raw({"a": entry(0, 8, [4])}, bytes(12)), "4 bytes after the last tensor"),
        (raw({"a": entry(0, 8, [4], "F32")}, bytes(8)), "F32 needs 16 bytes, .* hold 8"),
        (raw({"a": entry(0, 8, [4], "F13")}, bytes(8)), "unknown dtype F13"),
        (raw({"a": entry(0, 8, [4], ["F32"])}, bytes(8)), "unknown dtype"),  # type: ignore[arg-type]
        (raw({"a": entry(0, 8, [-4])}, bytes(8)), r"bad shape \[-4\]"),
        (raw({"a": entry(0, 8, [2.0, 2])}, bytes(8)), "bad shape"),  # type: ignore[list-item]
        (raw({"a": entry(0, 8, [True, 4])}, bytes(8)), "bad shape"),
        (raw({"a": entry(0, 8, [2**50, 2**50])}, bytes(8)), "needs .* bytes"),
        (raw({"a": entry(0, 8, [10**400])}, bytes(8)), "bad shape"),
        (raw({"a": entry(0, 2, [1] * 33)}, bytes(2)), "bad shape"),
        (raw({"a": entry(8, 0, [4])}, bytes(8)), "bad data_offsets"),
        (raw({"a": entry(-8, 0, [4])}, bytes(8)), "bad data_offsets"),
        (raw({"a": {"dtype": "BF16", "shape": [4]}}, bytes(8)), "lacks dtype, shape or data_off"),
        (raw({"a": 3}, b""), "lacks dtype"),
        (raw(b'{"a":1,"a":2}', b""), "the key a twice"),
        (raw(b'{"a":1,"\\u0061":2}', b""), "the key a twice"),
        (raw([], b""), "not a JSON object"),
        (raw(b"[" * 100_000, b""), "not valid JSON"),
        (raw(b"\xff\xfe{}", b""), "not valid JSON"),
        (raw(b'{"a":' + b"9" * 5000 + b"}", b""), "not valid JSON"),
        (raw({"x\ny": 3}, b""), r"'x\\ny' lacks"),
        (raw({"x" * 10_000: 3}, b""), r"xxx\.\.\. lacks"),
    ],
)
def test_lying_headers(tmp_path: Path, content: bytes, says: str) -> None:
    source = write(tmp_path / "source", tensors())
    (source / "model.safetensors").write_bytes(content)
    refused(source, rf"model\.safetensors: .*({says})")


def test_missing_key(tmp_path: Path) -> None:
    refused(changed(tmp_path, **{NORM: None}), rf"missing tensor {NORM}; config\.json")


def test_unexpected_key(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.lora_A"
    refused(changed(tmp_path, **{name: np.zeros(3)}), rf"unexpected tensor {name}; config\.json")


def test_another_config(tmp_path: Path) -> None:
    source = write(tmp_path / "source", tensors())
    (source / "config.json").write_text(json.dumps(to_hf(DENSE)))
    refused(source, r"unexpected tensors .*moe.* and \d+ more")
    (source / "config.json").write_text(json.dumps(to_hf(MINI.replace(text={"num_layers": 3}))))
    refused(source, r"missing tensors model\.layers\.2\.\S+, .* more")


def test_doubly_mapped_key(tmp_path: Path) -> None:
    again = {new_name(NORM): tensors()[NORM]}
    refused(changed(tmp_path, **again), rf"{NORM}.* are the same parameter|the same parameter")


@pytest.mark.parametrize("shape", [(32, 64), (64, 31), (2048,)])
def test_wrong_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    value = np.zeros(shape, tensors()[HEAD].dtype)
    says = rf"{HEAD} has shape \[{', '.join(map(str, shape))}\], expected \[64, 32\]"
    refused(changed(tmp_path, **{HEAD: value}), says)


def test_dtype_that_no_weight_has(tmp_path: Path) -> None:
    source = changed(tmp_path / "float64", **{HEAD: np.zeros((64, 32), np.float64)})
    refused(source, rf"{HEAD} has the dtype float64; weights must be")


def test_dtype_option(tmp_path: Path) -> None:
    source = write(tmp_path / "source", tensors())
    for dtype in ("int8", "bf16x", "float64", "(2,"):
        with pytest.raises(
            InputError, match=f"dtype {re.escape(dtype)} is not supported; choose one of bfl"
        ):
            convert(source, tmp_path / "ours", dtype=dtype)


def test_config_without_a_needed_key(tmp_path: Path) -> None:
    source = write(tmp_path / "source", tensors())
    config = source / "config.json"
    whole = json.loads(config.read_text())
    del whole["num_hidden_layers"]
    config.write_text(json.dumps(whole))
    refused(source, r"config\.json: key num_hidden_layers is missing")
    config.write_text("{")
    refused(source, r"config\.json: is not valid JSON")
    config.write_text("[" * 100_000)
    refused(source, r"config\.json: is not valid JSON")
    config.write_bytes(b"\xff")
    refused(source, r"config\.json: is not valid JSON")
    config.unlink()
    refused(source, r"config\.json: is missing")


def test_indexes_that_disagree(tmp_path: Path) -> None:
    source = write(tmp_path / "source", tensors(), shards=2)
    index = source / "model.safetensors.index.json"
    whole = json.loads(index.read_text())

    def with_map(**weight_map: object) -> None:
        index.write_text(json.dumps({"weight_map": {**whole["weight_map"], **weight_map}}))

    first, second = sorted(set(whole["weight_map"].values()))
    with_map(extra=first)
    refused(source, rf"{first}: has no tensor extra, and model\.safetensors\.index\.json says")
    name = next(n for n, file in whole["weight_map"].items() if file == first)
    with_map(**{name: second})
    refused(source, rf"{first}: holds \S+, which .*index\.json does not list")
    for bad in ("../evil.safetensors", "/etc/passwd", "", "..", 3, None, "a/b.safetensors"):
        with_map(**{name: bad})
        refused(source, rf"{name} points to .* a shard must be a file of the same folder")
    for text in ("[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "nonsense"):
        index.write_text(text)
        refused(source, r"index\.json: (has no weight_map|is not valid JSON)")
    index.unlink()
    refused(source, r"2 weight files \(model-00001-of-00002\.safetensors, …\) but no model\.safe")


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    source = write(tmp_path / "source", tensors(), shards=2)
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shard = source / "model-00002-of-00002.safetensors"
    values = {n: v for n, v in tensors().items() if weight_map[n] == shard.name}
    save_file({**values, NORM: tensors()[NORM], HEAD: tensors()[HEAD]}, shard)
    refused(source, r"00002-of-00002\.safetensors: holds \S+, which .*index\.json does not list")


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/nonexistent/echovlm_was_here"),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_pickle(tmp_path: Path, name: str) -> None:
    """Refused with and without torch; unpickling it would raise FileNotFoundError."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(to_hf(MINI)))
    (source / name).write_bytes(pickle.dumps({"a": Bomb()}))
    refused(source, rf"{name}: (refused by torch\.load|not a safetensors|is a PyTorch file)")


def test_not_a_model(tmp_path: Path) -> None:
    for what in (convert, export):
        with pytest.raises(InputError, match="no such folder"):
            what(tmp_path / "nowhere", tmp_path / "out")
    for what in (inspect, load_params):
        with pytest.raises(InputError, match="no such folder"):
            what(tmp_path / "nowhere")
        with pytest.raises(InputError, match=r"has no config\.json"):
            what(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(MINI)))
    with pytest.raises(InputError, match=r"no weights; looked for params/_METADATA .*safetensors"):
        inspect(tmp_path)
    with pytest.raises(InputError, match=r"no weights; looked for model\.safetensors"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "params").mkdir()
    for tree in ('{"x": {"key_metadata": []}}', "[1]", "3", '{"x": [1]}', "[" * 100_000):
        (tmp_path / "params/_METADATA").write_text(f'{{"tree_metadata": {tree}}}')
        with pytest.raises(InputError, match="not a readable checkpoint"):
            inspect(tmp_path)


@pytest.mark.parametrize(
    ("report", "says"),
    [
        ({"duplicates": []}, "duplicates is not an object of strings"),
        ({"duplicates": {"x": [1]}}, "duplicates is not an object of strings"),
        ({"duplicates": {"x": "nope"}}, "duplicates says that x repeats nope"),
        ({"duplicates": {HEAD: NORM}}, rf"duplicates says that {HEAD} repeats {NORM}"),
        ({"sha256": []}, "sha256 is not an object of strings"),
    ],
)
def test_a_damaged_report(tmp_path: Path, report: dict, says: str) -> None:
    convert(write(tmp_path / "source", tensors()), tmp_path / "ours")
    (tmp_path / "ours/conversion.json").write_text(json.dumps(report))
    sums.write(tmp_path / "ours")
    for what in (inspect, lambda model: export(model, tmp_path / "back")):
        with pytest.raises(InputError, match=rf"conversion\.json: {says}.*; convert again"):
            what(tmp_path / "ours")


def test_a_training_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for folder in (run / "model", run / "checkpoints" / "4" / "extra" / "model"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(to_hf(DENSE)))
    (run / "config.json").write_text('{"model": "tiny"}')
    for command in (convert, upcycle):
        for path in (run, run / "checkpoints" / "4"):
            with pytest.raises(InputError, match="is a training run's; make a Hugging Face folder"):
                command(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_in_a_folder_of_checkpoints(tmp_path: Path) -> None:
    """Others name their folders so too; what is in one tells whose it is."""
    source = write(tmp_path / "checkpoints" / "500", tensors())
    convert(source, tmp_path / "ours")
    export(source, tmp_path / "back")
    assert digests(tmp_path / "back") == digests(source)
    load_params(source)


def test_one_weight_file_of_any_name(tmp_path: Path) -> None:
    """What convert takes, the others take."""
    source = write(tmp_path / "source", tensors())
    (source / "model.safetensors").rename(source / "foo.safetensors")
    convert(source, tmp_path / "ours")
    assert inspect(source) == inspect(tmp_path / "ours")
    export(source, tmp_path / "back")
    assert digests(tmp_path / "back") == digests(source)
    (source / "bar.safetensors").touch()
    for what in (inspect, load_params, lambda path: convert(path, tmp_path / "again")):
        with pytest.raises(InputError, match=r"2 weight files .* but no"):
            what(source)


def test_long_reasons_end_with_a_clause(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 120)
    convert(write(tmp_path / "source", tensors()), deep)
    manifest = deep / "params/manifest.ocdbt"
    manifest.write_bytes(b"nonsense" + manifest.read_bytes())
    with pytest.raises(InputError) as caught:
        Reader(deep / "params")
    text = str(caught.value)
    assert re.search(
        r'not a readable checkpoint \([A-Z_]*:? ?Error opening "zarr" driver\b.*\); conv', text
    )
    assert text.count('"') % 2 == 0 and "tensorstore_spec" not in text


def test_a_converted_folder_with_another_config(tmp_path: Path) -> None:
    convert(write(tmp_path / "source", tensors()), tmp_path / "ours")
    other = MINI.replace(text={"mlp_dim": 40})
    (tmp_path / "ours/config.json").write_text(json.dumps(to_hf(other)))
    sums.write(tmp_path / "ours")
    with pytest.raises(
        InputError, match=r"text/layers/mlp/down/kernel has shape \[2, 32, 48\], ex"
    ):
        inspect(tmp_path / "ours")


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Full)
    refused(write(tmp_path / "source", tensors()), r"bytes needed, 1,000 bytes free")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "source", tensors()) / "model.safetensors"
    entries = safetensors.read_header(path)
    name, last = list(entries.items())[-1]
    for direct in (False, True):
        fd = safetensors.open_file(path, direct=direct)
        whole = safetensors.read_values(fd, last, 0, 16)
        assert whole.tobytes() == tensors()[name].tobytes()[:32]
    path.write_bytes(path.read_bytes()[: last.offset + 10])
    for direct in (False, True):
        fd = safetensors.open_file(path, direct=direct)
        with pytest.raises(EOFError):
            safetensors.read_values(fd, last, 0, 16)


def test_sizes() -> None:
    sizes = {"5GB": 5 * 10**9, "500 MB": 5 * 10**8, "2GiB": 2**31, "1.5kb": 1500, 7: 7, "8B": 8}
    assert {text: parse_size(text) for text in sizes} == sizes
    for bad in ("", "GB", "-1GB", "5XB", "0GB", "1e9", "nan", "9" * 400, "1" + "0" * 400 + "GB"):
        with pytest.raises(InputError, match="is not a size; write it like 5GB"):
            parse_size(bad)


PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantized .awq, 4 bit"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, "quantized .gptq, 8 bit"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "quantized .bitsandbytes, 4 bit",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized .fp8"),
        ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, "quantized .hqq"),
        ({"compression_config": {"format": "pack-quantized"}}, "pack-quantized"),
    ],
)
def test_a_quantized_checkpoint_by_its_config(tmp_path: Path, told: dict, says: str) -> None:
    source = write(tmp_path / "source", tensors())
    (source / "config.json").write_text(json.dumps(to_hf(MINI) | told))
    refused(source, says + ".*give the checkpoint that it was made from")
    with pytest.raises(InputError, match=says):
        inspect(source)


@pytest.mark.parametrize("name", ["quantize_config.json", "hf_quant_config.json"])
def test_a_quantized_checkpoint_by_a_file_beside_it(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "source", tensors())
    (source / name).write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    refused(source, f"{name}: says that the weights are quantized")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({".qweight": "int32", ".qzeros": "int32", ".scales": "float16"}, "AWQ or GPTQ"),
        ({".qweight": "int32", ".scales": "float16", ".g_idx": "int32"}, "GPTQ"),
        ({".weight": "int8", ".SCB": "float32"}, "bitsandbytes, 8 bit"),
        ({".weight": "uint8", ".weight.absmax": "float32"}, "bitsandbytes, 4 bit"),
        ({".weight": "uint8", ".weight.quant_state.bitsandbytes__nf4": "uint8"}, "bitsandbytes"),
        ({".weight_packed": "int32", ".weight_scale": "float16"}, "compressed-tensors"),
        ({".weight": "float16", ".weight_scale_inv": "float32"}, "fp8"),
        ({".weight": "float16", ".weight_scale_2": "float32"}, "fp8"),
        ({".weight": "float16", ".zero_point": "float32"}, "a method with zero points"),
        ({".weight": "int8"}, "int8"),
    ],
)
def test_a_quantized_checkpoint_by_its_tensors(tmp_path: Path, names: dict, says: str) -> None:
    made = {PROJ + end: np.zeros((4, 4), kind) for end, kind in names.items()}
    source = changed(tmp_path, **{f"{PROJ}.weight": None, **made})
    refused(source, f"the weights are quantized .{says}.*{PROJ}.*give the checkpoint")


@pytest.mark.parametrize("told", [None, {}, {"quant_method": None}])
def test_a_null_is_no_quantization(tmp_path: Path, told: object) -> None:
    source = write(tmp_path / "source", tensors())
    config = to_hf(MINI) | {"quantization_config": told, "text_config": None}
    (source / "config.json").write_text(json.dumps(config))
    assert convert(source, tmp_path / "ours")["missing"] == []
