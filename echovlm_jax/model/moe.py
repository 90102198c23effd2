"""The second path of a decoder layer: routed experts and a shared expert."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from echovlm_jax.config import MoEConfig
from echovlm_jax.model.compute import Compute
from echovlm_jax.model.layers import GatedMLP, Linear, stored, weight
from echovlm_jax.ops import Array
from echovlm_jax.ops.moe.dispatch import Experts, Routing, moe, route
from echovlm_jax.ops.product.einsum import einsum
from echovlm_jax.ops.product.weight import Weight, as_operand


class ExpertWeights(nn.Module):
    """One stacked weight of the routed experts: [E, out, in].

    A low-rank update from the collection "lora", `a` [E, rank, in] and `b` [E, out, rank], is added
    to it: how tokens meet experts is then the same with and without.
    """

    spec: str
    shape: tuple[int, int, int]
    axes: tuple[str, str, str]

    @nn.compact
    def __call__(self) -> Weight:
        kernel = stored(self, "kernel", weight(self.spec, self.axes), self.shape)
        if not self.has_variable("lora", "a"):
            return kernel
        a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
        return as_operand(kernel, b.dtype) + einsum("Eor,Eri->Eoi", b, a)


class RoutedExperts(nn.Module):
    """Stacked gated-silu experts."""

    config: MoEConfig
    width: int

    @nn.compact
    def __call__(self) -> Experts:
        count, inner, outer = self.config.num_experts, self.config.expert_mlp_dim, self.width
        # Not `embed`: that may be split over the mesh axis which splits the experts already.
        wide = ("ECD,EFD->ECF", (count, inner, outer), ("expert", "expert_mlp", "expert_embed"))
        back = ("ECF,EDF->ECD", (count, outer, inner), ("expert", "expert_embed", "expert_mlp"))
        return Experts(
            gate=ExpertWeights(*wide, name="gate")(),
            up=ExpertWeights(*wide, name="up")(),
            down=ExpertWeights(*back, name="down")(),
        )


class MoE(nn.Module):
    """Σ_{e in top-k} p_e · Expert_e(u) + sigmoid(w_s · u) · Shared(u), routed in float32."""

    config: MoEConfig
    width: int
    compute: Compute = Compute()

    def _route(self, logits: Array) -> Routing:
        """`route` on each device's own tokens: XLA would gather them all to sort four numbers."""
        tokens = ("batch", "length", None)
        choose = functools.partial(
            route, top_k=self.config.top_k, normalize=self.config.norm_topk_prob
        )
        mapped = self.compute.layout.shard_map(
            lambda logits: tuple(choose(logits)), [tokens], [tokens, tokens]
        )
        return Routing(*mapped(logits))

    @nn.compact
    def __call__(self, u: Array, valid: Array | None = None) -> tuple[Array, Array, Array]:
        """
        Args:
          u: [B, T, D].
          valid: [B, T] bool, which are tokens, and not padding; None = all.

        Returns:
          The mixture [B, T, D], the router logits [B, T, E] in float32, and how many choices of
          tokens found no room at their expert [].
        """
        c = self.config
        place: dict[str, Any] = {"layout": self.compute.layout}
        shape = (c.num_experts, self.width)
        router = Linear("BTD,ED->BTE", shape, ("router", "embed"), **place, name="router")
        logits = router(u.astype(jnp.float32))
        routing = self._route(logits)
        routed, dropped = moe(
            u,
            routing,
            RoutedExperts(c, self.width, name="experts")(),
            dispatch=self.compute.moe_dispatch,
            # PyTorch shows padding to the experts too, and a loss on a row's first token sees it.
            valid=None if self.compute.moe_dispatch == "dense" else valid,
            capacity_factor=self.compute.capacity_factor,
            layout=self.compute.layout,
        )
        shape, axes = (1, self.width), ("gate", "embed")
        gate = Linear("BTD,FD->BTF", shape, axes, **place, name="shared_gate")(u)
        shared = GatedMLP(self.width, c.shared_mlp_dim, self.compute.layout, name="shared")(u)
        return routed + jax.nn.sigmoid(gate) * shared, logits, dropped
