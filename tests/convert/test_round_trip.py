"""Hugging Face to Orbax and back: every tensor's bits, whatever the form of the checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest

from echovlm_jax.config import preset
from echovlm_jax.convert import convert, export, inspect, table
from echovlm_jax.convert.from_torch import Journal
from echovlm_jax.errors import InputError
from echovlm_jax.storage import writer as store
from echovlm_jax.storage.arrays import Reader
from tests.convert.checkpoints import (
    DENSE,
    DTYPES,
    MINI,
    TIED,
    digests,
    finite,
    new_name,
    same_bits,
    tensors,
    write,
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks far below the tensors' sizes, so that cutting and padding happen."""
    monkeypatch.setattr(store, "CHUNK_BYTES", 3000)


@pytest.mark.parametrize(
    ("config", "dtype", "shards", "max_shard_size"),
    [
        (MINI, "bfloat16", 1, "5GB"),
        (MINI, "bfloat16", 3, "40KB"),
        (MINI, "float32", 3, "5GB"),
        (DENSE, "float16", 1, "30KB"),
        (TIED, "bfloat16", 1, "5GB"),
        (TIED, "float32", 2, 20_000),
    ],
)
def test_every_bit_comes_back(
    tmp_path: Path, config, dtype: str, shards: int, max_shard_size
) -> None:
    source = write(tmp_path / "source", tensors(config, dtype), config, shards)
    report = convert(source, tmp_path / "ours")
    exported = export(tmp_path / "ours", tmp_path / "back", max_shard_size=max_shard_size)
    assert digests(tmp_path / "back") == digests(source)
    assert (tmp_path / "back/config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (tmp_path / "back/tokenizer.json").exists()
    count = len(table.slots(config))
    size = sum(v.nbytes for v in tensors(config, dtype).values())
    assert report["tensors"] == exported["tensors"] == count
    assert report["bytes"] == exported["bytes"] == size
    assert (report["missing"], report["unexpected"], report["dtype"]) == ([], [], dtype)
    assert report["peak_rss_bytes"] > 0 and exported["seconds"] >= 0
    index = tmp_path / "back/model.safetensors.index.json"
    assert index.exists() == (max_shard_size != "5GB")
    if index.exists():
        listed = json.loads(index.read_text())
        assert listed["metadata"]["total_size"] == size
        assert set(listed["weight_map"]) == set(table.slots(config))
        assert convert(tmp_path / "back", tmp_path / "again")["bytes"] == size


def test_newer_names_and_buffers(tmp_path: Path) -> None:
    values = tensors()
    renamed = {new_name(name): value for name, value in values.items()}
    buffers = ["model.language_model.rotary_emb.inv_freq", "model.visual.rotary_pos_emb.inv_freq"]
    extra = {name: np.ones(4, np.float32) for name in buffers}
    source = write(tmp_path / "source", renamed | extra)
    report = convert(source, tmp_path / "ours")
    assert sorted(report["ignored"]) == sorted(buffers)
    export(tmp_path / "ours", tmp_path / "back")
    wanted = digests(write(tmp_path / "old", values))
    assert digests(tmp_path / "back") == wanted


def test_a_tied_head_that_repeats_the_embedding_is_kept(tmp_path: Path) -> None:
    values = tensors(TIED)
    values["lm_head.weight"] = values["model.embed_tokens.weight"].copy()
    source = write(tmp_path / "source", values, TIED)
    report = convert(source, tmp_path / "ours")
    assert report["duplicates"] == {"lm_head.weight": "model.embed_tokens.weight"}
    export(tmp_path / "ours", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(source)


def test_a_tied_head_of_its_own_is_refused(tmp_path: Path) -> None:
    values = tensors(TIED)
    head = values["model.embed_tokens.weight"].copy()
    head.view(np.uint8)[-1, -1] ^= 1
    source = write(tmp_path / "source", values | {"lm_head.weight": head}, TIED)
    with pytest.raises(InputError, match=r"lm_head\.weight differs .* tie_word_embeddings"):
        convert(source, tmp_path / "ours")


@pytest.mark.parametrize(("stored", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_cast(tmp_path: Path, stored: str, wanted: str) -> None:
    values = finite(dtype=stored)
    source = write(tmp_path / "source", values)
    report = convert(source, tmp_path / "ours", dtype=wanted)
    assert report["dtype"] == wanted
    raw = json.loads((tmp_path / "ours/config.json").read_text())
    assert raw["torch_dtype"] == wanted
    export(tmp_path / "ours", tmp_path / "back")
    expected = {name: value.astype(DTYPES[wanted]) for name, value in values.items()}
    assert digests(tmp_path / "back") == digests(write(tmp_path / "expected", expected))


def test_float16_overflow_is_refused(tmp_path: Path) -> None:
    values = finite()
    values["model.norm.weight"][3] = 1e6
    source = write(tmp_path / "source", values)
    with pytest.raises(InputError, match=r"model\.norm\.weight .* too large for float16"):
        convert(source, tmp_path / "ours", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_mixed_dtypes(tmp_path: Path) -> None:
    """Whole parameters may differ; the layers of one may not."""
    values = finite(dtype="bfloat16")
    for name, value in values.items():
        if name.endswith("moe.gate.weight"):
            values[name] = value.astype(np.float32)
    source = write(tmp_path / "source", values)
    assert convert(source, tmp_path / "ours")["dtype"] == "bfloat16+float32"
    export(tmp_path / "ours", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(source)
    odd = "model.layers.1.moe.gate.weight"
    values[odd] = values[odd].astype(np.float16)
    source = write(tmp_path / "odd", values)
    with pytest.raises(InputError, match=r"layers of one parameter; convert with --dtype"):
        convert(source, tmp_path / "never")
    assert convert(source, tmp_path / "cast", dtype="float32")["dtype"] == "float32"


def test_damage_is_found_on_export(tmp_path: Path) -> None:
    source = write(tmp_path / "source", tensors())
    convert(source, tmp_path / "ours")
    weights = tensors()["model.embed_tokens.weight"].tobytes()[:1000]
    for path in (tmp_path / "ours/params").rglob("d/*"):
        data = path.read_bytes()
        path.write_bytes(data.replace(weights, weights[:-1] + bytes([weights[-1] ^ 1])))
    with pytest.raises(InputError, match="text/embed/embedding differs from its digest"):
        export(tmp_path / "ours", tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "source"]


def test_lost_data_is_found(tmp_path: Path) -> None:
    source = write(tmp_path / "source", tensors())
    convert(source, tmp_path / "ours")
    for path in (tmp_path / "ours/params/ocdbt.process_0/d").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"convert again$") as caught:
        export(tmp_path / "ours", tmp_path / "back")
    assert "\n" not in str(caught.value)


def test_existing_targets(tmp_path: Path) -> None:
    source = write(tmp_path / "source", tensors())
    first = convert(source, tmp_path / "ours")
    before = (tmp_path / "ours/conversion.json").stat().st_mtime_ns
    assert convert(source, tmp_path / "ours") == first
    assert (tmp_path / "ours/conversion.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="exists; delete it"):
        convert(source, tmp_path / "ours", dtype="float32")
    with pytest.raises(InputError, match="exists; delete it"):
        export(tmp_path / "ours", source)
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    assert digests(source)


def test_inspect_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = tensors()
    source = write(tmp_path / "source", values, shards=2)
    convert(source, tmp_path / "ours")
    monkeypatch.setattr(Reader, "read", None)
    monkeypatch.setattr("echovlm_jax.convert.safetensors.read_values", None)
    found = inspect(tmp_path / "ours")
    assert found == inspect(source)
    assert (
        found["params"] == sum(v.size for v in values.values()) == sum(found["by_module"].values())
    )
    assert (found["bytes"], found["dtype"]) == (2 * found["params"], "bfloat16")
    assert found["by_module"]["text.layers.coefficient"] == 2 * (2 * 32 + 2)


def test_the_released_model_has_every_name() -> None:
    """11.7 B parameters and the names of the released files, without any weights."""
    slots = table.slots(preset("echovlm_11b"))
    assert round(sum(slot.size for slot in slots.values()) / 1e9, 1) == 11.7
    for name, shape in {
        "visual.blocks.31.attn.qkv.weight": (3840, 1280),
        "visual.blocks.0.attn.qkv.bias": (3840,),
        "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        "visual.merger.mlp.2.weight": (3584, 5120),
        "model.layers.27.self_attn.k_proj.weight": (512, 3584),
        "model.layers.0.self_attn.o_proj.weight": (3584, 3584),
        "model.layers.3.moe.gate.weight": (4, 3584),
        "model.layers.3.moe.experts.3.down_proj.weight": (3584, 1408),
        "model.layers.3.moe.shared_expert_gate.weight": (1, 3584),
        "model.layers.3.coefficient.bias": (2,),
        "lm_head.weight": (152064, 3584),
    }.items():
        assert slots[name].shape == shape
    assert "lm_head.weight" not in table.slots(preset("qwen2_vl_2b"))


def test_names_that_a_round_trip_would_not_miss() -> None:
    """Two tensors of one shape could change places on both ways unseen."""
    slots = table.slots(MINI)
    layer, block = "model.layers.1", "visual.blocks.0"
    for name, path, index in [
        (f"{layer}.self_attn.k_proj.weight", "text/layers/attn/k/kernel", (1,)),
        (f"{layer}.self_attn.v_proj.bias", "text/layers/attn/v/bias", (1,)),
        (f"{layer}.input_layernorm.weight", "text/layers/attn_norm/scale", (1,)),
        (f"{layer}.post_attention_layernorm.weight", "text/layers/mlp_norm/scale", (1,)),
        (f"{layer}.mlp.gate_proj.weight", "text/layers/mlp/gate/kernel", (1,)),
        (f"{layer}.moe.experts.2.up_proj.weight", "text/layers/moe/experts/up/kernel", (1, 2)),
        (f"{layer}.moe.shared_expert.gate_proj.weight", "text/layers/moe/shared/gate/kernel", (1,)),
        (f"{block}.norm1.weight", "vision/blocks/norm1/scale", (0,)),
        (f"{block}.norm2.bias", "vision/blocks/norm2/bias", (0,)),
        ("visual.merger.mlp.0.weight", "vision/merger/fc1/kernel", ()),
        ("model.embed_tokens.weight", "text/embed/embedding", ()),
        ("lm_head.weight", "text/lm_head/kernel", ()),
    ]:
        assert (slots[name].path, slots[name].index) == (path, index)


def test_a_parameter_without_a_rule_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TABLE", table.TABLE[1:])
    with pytest.raises(KeyError, match="patch_embed"):
        table.slots(MINI)


def test_pieces_cover_an_array_once() -> None:
    for part, itemsize in [
        ((7,), 4),
        ((40, 33), 2),
        ((3, 5, 4, 133), 4),
        ((1, 2000), 2),
        ((2,), 2),
    ]:
        seen = np.zeros(part, int)
        flat = np.arange(seen.size).reshape(part)
        start = 0
        for cut in store.pieces(part, itemsize):
            seen[cut] += 1
            block = flat[cut].reshape(-1)
            assert block.size * itemsize <= 3000
            assert block.tolist() == list(range(start, start + block.size))
            start += block.size
        assert (seen == 1).all()


def test_float_values_survive_as_they_are(tmp_path: Path) -> None:
    """The copy as JAX sees it: a stack of the checkpoint's tensors, reshaped."""
    values = tensors(dtype="float32")
    convert(write(tmp_path / "source", values), tmp_path / "ours")
    opened = Reader(tmp_path / "ours/params")
    shape = opened.shapes["vision/blocks/attn/qkv/kernel"]
    whole = tuple(slice(0, n) for n in shape)
    qkv = opened.read("vision/blocks/attn/qkv/kernel", whole)
    stacked = np.stack([values[f"visual.blocks.{i}.attn.qkv.weight"] for i in range(2)])
    assert same_bits(qkv, stacked.reshape(2, 3, 2, 16, 32))
    rest = (slice(0, n) for n in opened.shapes["text/layers/moe/experts/down/kernel"][2:])
    down = opened.read("text/layers/moe/experts/down/kernel", (slice(1, 2), slice(2, 3), *rest))
    assert same_bits(down[0, 0], values["model.layers.1.moe.experts.2.down_proj.weight"])


def test_journal_forgets_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, {"a": 1}) as journal:
        journal.add("x", "1")
        with pytest.raises(InputError, match="another process"):
            Journal(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"name": "y", "sha')
    with Journal(path, {"a": 1}) as journal:
        assert journal.done == {"x": "1"}
        journal.add("z", "2")
    with Journal(path, {"a": 1}) as journal:
        assert journal.done == {"x": "1", "z": "2"}
    with pytest.raises(InputError, match="another source or dtype"):
        Journal(path, {"a": 2})
