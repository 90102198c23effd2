"""The PyTorch side of the parity tests: a model's tensors under the released checkpoint's names."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from echovlm_jax.bench.torch_model import released_names, released_state
from echovlm_jax.config import ModelConfig, to_hf


def released_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients under the released checkpoint's names."""
    return released_names({k: p.grad for k, p in model.named_parameters() if p.grad is not None})


def save(model: nn.Module, config: ModelConfig, folder: Path) -> Path:
    """Writes config.json and model.safetensors as a released checkpoint has them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_hf(config, dtype="float32")))
    state = {k: v.detach().contiguous().clone() for k, v in released_state(model).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
