"""The PyTorch side of the parity tests: a model's tensors under the released checkpoint's names."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from echovlm_jax.config import ModelConfig, to_hf


def released_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors under the released checkpoint's names; a parameter's gradient is renamed alike."""
    return _rename(dict(model.named_parameters()))


def released_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients under the released checkpoint's names."""
    return _rename({k: p.grad for k, p in model.named_parameters() if p.grad is not None})


def load_released(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Puts a released checkpoint's tensors into a model that `bench.torch_model.build` made."""
    with torch.no_grad():
        for name, place in released_state(model).items():  # views: writing reaches the model
            place.copy_(tensors[name])


def _rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for name, t in tensors.items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        name = name.replace(".mlp.mlp.", ".mlp.").replace(".mlp.moe.", ".moe.")
        name = name.replace(".mlp.coefficient.", ".coefficient.")
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for e, both in enumerate(t):
                gate, up = both.chunk(2, dim=0)
                out[f"{stem}{e}.gate_proj.weight"] = gate
                out[f"{stem}{e}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(t):
                out[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = down
        else:
            out[name] = t
    return out


def save(model: nn.Module, config: ModelConfig, folder: Path) -> Path:
    """Writes config.json and model.safetensors as a released checkpoint has them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_hf(config, dtype="float32")))
    state = {k: v.detach().contiguous().clone() for k, v in released_state(model).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
