"""Small checkpoints for the tests, written and read by the `safetensors` package, not by ours."""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from echovlm_jax.config import ModelConfig, MoEConfig, TextConfig, VisionConfig, to_hf
from echovlm_jax.convert import table

MINI = ModelConfig(
    text=TextConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=8, mlp_dim=48, mrope_section=(1, 1, 2),
    ),
    vision=VisionConfig(depth=2, width=32, out_width=32, num_heads=2, mlp_dim=64),
    moe=MoEConfig(num_experts=3, top_k=2, expert_mlp_dim=16, shared_mlp_dim=24),
    bos_token_id=0, eos_token_id=2, vision_start_token_id=3, vision_end_token_id=4,
    vision_pad_token_id=5, image_token_id=6, video_token_id=7,
)  # fmt: skip
DENSE = MINI.replace(moe=None)
TIED = DENSE.replace(text={"tie_word_embeddings": True})

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
Tensors = dict[str, np.ndarray]


def new_name(name: str) -> str:
    """A released tensor name as newer exporters write it."""
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model."):
        return name.replace("model.", "model.language_model.", 1)
    return name


def tensors(config: ModelConfig = MINI, dtype: str = "bfloat16", seed: int = 0) -> Tensors:
    """Every tensor of the configuration as random bits: NaNs with payloads and infinities too."""
    rng = np.random.default_rng(seed)
    kind = DTYPES[dtype]
    return {
        name: np.frombuffer(rng.bytes(slot.size * kind.itemsize), kind).reshape(slot.shape)
        for name, slot in table.slots(config).items()
    }


def finite(config: ModelConfig = MINI, dtype: str = "float32", seed: int = 0) -> Tensors:
    """The same with ordinary values, for casts."""
    rng = np.random.default_rng(seed)
    slots = table.slots(config).items()
    return {name: rng.normal(size=slot.shape).astype(DTYPES[dtype]) for name, slot in slots}


def write(folder: Path, values: Tensors, config: ModelConfig = MINI, shards: int = 1) -> Path:
    """A checkpoint folder; with several shards, every shard gets some of every module."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_hf(config)))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(values, folder / "model.safetensors")
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        names = list(values)[number::shards]
        save_file({name: values[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def digests(folder: Path) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Every tensor of a folder: dtype, SHA-256 of its bytes, shape."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(file).items():
            assert name not in out
            digest = hashlib.sha256(value.tobytes()).hexdigest()
            out[name] = (value.dtype.name, digest, value.shape)
    return out


def same_bits(a: object, b: object) -> bool:
    x, y = np.asarray(a), np.asarray(b)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
