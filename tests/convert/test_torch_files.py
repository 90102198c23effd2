"""Files that PyTorch and transformers wrote themselves."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from echovlm_jax.config import to_hf  # noqa: E402
from echovlm_jax.convert import convert, export, inspect, load_params  # noqa: E402
from echovlm_jax.errors import InputError  # noqa: E402
from tests.convert.checkpoints import (  # noqa: E402
    DENSE,
    MINI,
    TIED,
    digests,
    new_name,
    tensors,
    write,
)


def as_torch(values: dict[str, np.ndarray]) -> dict:
    """The same bits as torch tensors."""
    bits = {2: np.int16, 4: np.int32}
    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return {
        name: torch.from_numpy(v.view(bits[v.itemsize]).copy()).view(kinds[v.dtype.name])
        for name, v in values.items()
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_bin_files(tmp_path: Path, dtype: str) -> None:
    values = tensors(dtype=dtype)
    wanted = digests(write(tmp_path / "wanted", values))
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(to_hf(MINI)))
    state = as_torch(values)
    # A view of a larger storage, transposed: bytes in another order than the values.
    name = "model.layers.0.self_attn.o_proj.weight"
    state[name] = state[name].T.contiguous().T
    torch.save(state, source / "pytorch_model.bin")
    assert inspect(source)["params"] == sum(v.size for v in values.values())
    convert(source, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    assert digests(tmp_path / "back") == wanted


def test_sharded_bin_files_and_a_single_pt(tmp_path: Path) -> None:
    values = tensors()
    wanted = digests(write(tmp_path / "wanted", values))
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(to_hf(MINI)))
    names = list(values)
    weight_map = {}
    for number in range(2):
        part = {new_name(n): values[n] for n in names[number::2]}
        torch.save(as_torch(part), source / f"pytorch_model-{number}.bin")
        weight_map |= dict.fromkeys(part, f"pytorch_model-{number}.bin")
    index = source / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    convert(source, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    assert digests(tmp_path / "back") == wanted
    index.unlink()
    for path in source.glob("*.bin"):
        path.unlink()
    torch.save(as_torch(values), source / "last.pt")
    for number, given in enumerate((source, source / "last.pt")):
        convert(given, tmp_path / f"pt{number}")
        export(tmp_path / f"pt{number}", tmp_path / f"pt_back{number}")
        assert digests(tmp_path / f"pt_back{number}") == wanted


def test_torch_files_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(to_hf(MINI)))
    path = source / "pytorch_model.bin"

    def refused(says: str) -> None:
        with pytest.raises(InputError, match=says) as caught:
            convert(source, tmp_path / "ours")
        assert "\n" not in str(caught.value)

    torch.save({"model": as_torch(tensors())}, path)
    refused(r"pytorch_model\.bin: is not a state dict of tensors")
    torch.save(torch.nn.Linear(2, 2), path)
    refused(r"pytorch_model\.bin: refused by torch\.load\(weights_only=True")
    torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, path)
    refused(r"tensor a has the dtype torch\.complex64")
    path.write_bytes(path.read_bytes()[:100])
    refused(r"refused by torch\.load")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    refused(r"PyTorch is not installed.*pip install torch, or save the checkpoint as safetensors")


@pytest.mark.parametrize("config", [DENSE, TIED], ids=["untied", "tied"])
def test_what_transformers_saves(tmp_path: Path, config) -> None:
    """Its own names, its own config.json; and it loads what we export."""
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(**to_hf(config))
    ).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    convert(tmp_path / "source", tmp_path / "ours")
    loaded, _ = load_params(tmp_path / "ours")
    assert loaded.text.tie_word_embeddings == config.text.tie_word_embeddings
    export(tmp_path / "ours", tmp_path / "back")
    again, info = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        tmp_path / "back", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (name, a), (_, b) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert a.dtype == b.dtype and torch.equal(a, b), name
