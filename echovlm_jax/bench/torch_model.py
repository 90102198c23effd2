"""EchoVLM in PyTorch, composed from Hugging Face's own modules: what ours is held against.

Qwen2-VL and Qwen2.5-VL come from `transformers` as they are. The dual path replaces each decoder
layer's MLP by a module that holds the old MLP, Qwen2-MoE's sparse block and the coefficient, and
adds them as the paper does. The layer itself (norms, attention, residuals) stays theirs.
"""

from collections.abc import Mapping
from typing import Any

from echovlm_jax.config import ModelConfig, to_hf


def build(config: ModelConfig, seed: int = 0, std: float = 0.1) -> Any:
    """A random float32 model, a torch.nn.Module with eager attention and experts, in evaluation
    mode; every parameter is non-trivial.

    Args:
      config: sizes; without a mixture it is the model that its config.json names.
      seed: seed of PyTorch's generator.
      std: deviation of the parameters from 0, or from 1 for the norms' scales.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    class DualPath(torch.nn.Module):
        """coefficient₀ · MoE(u) + coefficient₁ · MLP(u)."""

        def __init__(self, mlp: Any, config: Any) -> None:
            super().__init__()
            self.mlp = mlp
            self.moe = Qwen2MoeSparseMoeBlock(config)
            self.coefficient = torch.nn.Linear(config.hidden_size, 2)

        def forward(self, u: Any) -> Any:
            c = torch.softmax(self.coefficient(u), dim=-1)
            return c[..., :1] * self.moe(u) + c[..., 1:] * self.mlp(u)

    torch.manual_seed(seed)
    hf = AutoConfig.for_model(**to_hf(config, dtype="float32"))
    hf._attn_implementation = "eager"
    model: Any = AutoModelForImageTextToText.from_config(hf).float().eval()
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
            scale = ("norm" in name and name.endswith("weight")) or "ln_q.weight" in name
            p.copy_(float(scale) + std * torch.randn_like(p))
    return model


def set_forms(model: Any, attention: str, experts: str) -> None:
    """Chooses transformers' implementations, by its names, in a model that `build` made: of
    attention, eager or sdpa; of the experts, eager, grouped_mm or batched_mm."""
    model.set_attn_implementation(attention)
    for layer in model.model.language_model.layers:
        if hasattr(layer.mlp, "moe"):
            layer.mlp.moe.experts.config._experts_implementation = experts


def released_state(model: Any) -> dict[str, Any]:
    """The parameters under the released checkpoint's names: views, so that writing reaches the
    model."""
    return released_names(dict(model.named_parameters()))


def load_released(model: Any, tensors: Mapping[str, Any]) -> None:
    """Puts a released checkpoint's tensors into a model that `build` made."""
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        for name, place in released_state(model).items():
            place.copy_(tensors[name])


def released_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors of such a model, or their gradients, under the released names; stacked experts are
    taken apart."""
    out: dict[str, Any] = {}
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
