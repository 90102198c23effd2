"""EchoVLM in PyTorch with the released module names, which PEFT goes by: `visual`, `model`,
`lm_head`, and in each layer `moe` and `coefficient` beside `mlp`; every expert is a module.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from echovlm_jax.config import ModelConfig, to_hf
from echovlm_jax.convert import table


class Gated(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Mixture(nn.Module):
    def __init__(self, width: int, config) -> None:
        super().__init__()
        self.top_k, self.normalize = config.top_k, config.norm_topk_prob
        self.gate = nn.Linear(width, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            Gated(width, config.expert_mlp_dim) for _ in range(config.num_experts)
        )
        self.shared_expert = Gated(width, config.shared_mlp_dim)
        self.shared_expert_gate = nn.Linear(width, 1, bias=False)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.gate(u), dim=-1)
        best, chosen = weights.topk(self.top_k, dim=-1)
        if self.normalize:
            best = best / best.sum(dim=-1, keepdim=True)
        kept = torch.zeros_like(weights).scatter(-1, chosen, best)
        routed = sum(kept[..., i : i + 1] * expert(u) for i, expert in enumerate(self.experts))
        return routed + torch.sigmoid(self.shared_expert_gate(u)) * self.shared_expert(u)


class Released(nn.Module):
    """Random float32 weights; `forward` takes what a Hugging Face model takes."""

    def __init__(self, config: ModelConfig, seed: int = 0, std: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        settings = Qwen2VLConfig(**to_hf(config, dtype="float32"))
        settings._attn_implementation = "eager"
        whole = Qwen2VLForConditionalGeneration(settings).float().eval()
        self.visual, self.model = whole.model.visual, whole.model.language_model
        self.lm_head = whole.lm_head
        self._whole = SimpleNamespace(model=whole)  # not a submodule: its names are others
        for layer in self.model.layers if config.moe else ():
            width = config.text.hidden_size
            layer.moe, layer.coefficient = Mixture(width, config.moe), nn.Linear(width, 2)
            layer.mlp.register_forward_hook(_second_path(layer))
        with torch.no_grad():
            for name, p in self.named_parameters():
                around = float(name.endswith("norm.weight") or "norm" in name.split(".")[-2])
                p.copy_(around * (not name.endswith("bias")) + std * torch.randn_like(p))
            self.visual.merger.ln_q.weight.add_(1.0)
        names = set(self.state_dict())
        assert {*table.slots(config)} <= names

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self._whole.model(**inputs).logits


def _second_path(layer: nn.Module):
    def hook(mlp: nn.Module, given: tuple, dense: torch.Tensor) -> torch.Tensor:
        c = torch.softmax(layer.coefficient(given[0]), dim=-1)
        return c[..., :1] * layer.moe(given[0]) + c[..., 1:] * dense

    return hook
