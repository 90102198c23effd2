"""The second path of a decoder layer: routed experts and a shared expert."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from echovlm_jax.config import MoEConfig
from echovlm_jax.model.layers import WEIGHT_INIT, GatedMLP, Linear, partitioned
from echovlm_jax.ops import Array
from echovlm_jax.ops.moe_dispatch import Experts, moe, route


class ExpertWeights(nn.Module):
    """One stacked weight of the routed experts: [E, out, in]."""

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", partitioned(WEIGHT_INIT, self.axes), self.shape)


class RoutedExperts(nn.Module):
    """Stacked gated-silu experts."""

    config: MoEConfig
    width: int

    @nn.compact
    def __call__(self) -> Experts:
        inner = (self.config.num_experts, self.config.expert_mlp_dim, self.width)
        outer = (self.config.num_experts, self.width, self.config.expert_mlp_dim)
        axes = ("expert", "expert_mlp", "embed")
        return Experts(
            gate=ExpertWeights(inner, axes, name="gate")(),
            up=ExpertWeights(inner, axes, name="up")(),
            down=ExpertWeights(outer, (axes[0], axes[2], axes[1]), name="down")(),
        )


class MoE(nn.Module):
    """Σ_{e in top-k} p_e · Expert_e(u) + sigmoid(w_s · u) · Shared(u), routed in float32."""

    config: MoEConfig
    width: int

    @nn.compact
    def __call__(self, u: Array) -> tuple[Array, Array]:
        """[B, T, D] → the mixture [B, T, D] and the router logits [B, T, E] in float32."""
        c = self.config
        router = Linear(
            "BTD,ED->BTE", (c.num_experts, self.width), ("router", "embed"), name="router"
        )
        logits = router(u.astype(jnp.float32))
        routing = route(logits, top_k=c.top_k, normalize=c.norm_topk_prob)
        routed = moe(u, routing, RoutedExperts(c, self.width, name="experts")())
        gate = Linear("BTD,FD->BTF", (1, self.width), ("gate", "embed"), name="shared_gate")(u)
        shared = GatedMLP(self.width, c.shared_mlp_dim, name="shared")(u)
        return routed + jax.nn.sigmoid(gate) * shared, logits
