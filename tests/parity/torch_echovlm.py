"""The PyTorch side of the parity tests: EchoVLM composed from Hugging Face's own modules.

Qwen2-VL comes from `transformers` as it is. The dual path replaces each decoder layer's MLP by a
module that holds the old MLP, Qwen2-MoE's sparse block and the coefficient, and adds them as the
paper does. The layer itself (norms, attention, residuals) stays theirs.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from echovlm_jax.config import ModelConfig, to_hf


class DualPath(nn.Module):
    """coefficient₀ · MoE(u) + coefficient₁ · MLP(u)."""

    def __init__(self, mlp: nn.Module, config: Qwen2MoeConfig) -> None:
        super().__init__()
        self.mlp = mlp
        self.moe = Qwen2MoeSparseMoeBlock(config)
        self.coefficient = nn.Linear(config.hidden_size, 2)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        c = torch.softmax(self.coefficient(u), dim=-1)
        return c[..., :1] * self.moe(u) + c[..., 1:] * self.mlp(u)


def build(config: ModelConfig, seed: int = 0, std: float = 0.1) -> nn.Module:
    """A random float32 model of `config` with eager attention; every parameter is non-trivial."""
    torch.manual_seed(seed)
    hf = Qwen2VLConfig(**to_hf(config, dtype="float32"))
    hf._attn_implementation = "eager"
    model = Qwen2VLForConditionalGeneration(hf).float().eval()
    if config.moe is not None:
        moe = Qwen2MoeConfig(
            hidden_size=config.text.hidden_size,
            num_experts=config.moe.num_experts,
            num_experts_per_tok=config.moe.top_k,
            moe_intermediate_size=config.moe.expert_mlp_dim,
            shared_expert_intermediate_size=config.moe.shared_mlp_dim,
            norm_topk_prob=config.moe.norm_topk_prob,
        )
        moe._experts_implementation = "eager"
        for layer in model.model.language_model.layers:
            layer.mlp = DualPath(layer.mlp, moe)
    with torch.no_grad():
        for name, p in model.named_parameters():
            around = (
                1.0
                if ("norm" in name and name.endswith("weight")) or "ln_q.weight" in name
                else 0.0
            )
            p.copy_(around + std * torch.randn_like(p))
    return model


def released_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors under the released checkpoint's names; a parameter's gradient is renamed alike."""
    return _rename(dict(model.named_parameters()))


def released_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients under the released checkpoint's names."""
    return _rename({k: p.grad for k, p in model.named_parameters() if p.grad is not None})


def load_released(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Puts a released checkpoint's tensors into a model that `build` made."""
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
