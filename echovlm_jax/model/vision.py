"""The Qwen2-VL vision transformer and its merger: patches in, tokens of the decoder's width out."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from echovlm_jax.config import VisionConfig
from echovlm_jax.model.layers import LayerNorm, Linear, scan_layers
from echovlm_jax.ops import Array
from echovlm_jax.ops.activations import quick_gelu
from echovlm_jax.ops.attention import attention
from echovlm_jax.ops.rope import RopeTable, apply_rope, vision_table


class VisionAttention(nn.Module):
    """Attention in both directions inside one frame: patches of equal segment id."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Array, table: RopeTable, segments: Array) -> Array:
        c = self.config
        heads = (c.num_heads, c.head_dim)
        axes = ("vision_heads", "head_dim", "vision_embed")
        # Query, key and value are one weight in the checkpoint; C is that dimension of three.
        qkv = Linear(
            "BPD,CNHD->BPCNH", (3, *heads, c.embed_dim), ("qkv", *axes), bias=True, name="qkv"
        )(x)
        q, k, v = (qkv[:, :, i] for i in range(3))
        out = attention(
            apply_rope(q, table),
            apply_rope(k, table),
            v,
            q_segments=segments,
            kv_segments=segments,
            causal_offset=None,
        )
        proj = Linear(
            "BPNH,DNH->BPD", (c.embed_dim, *heads), (axes[2], *axes[:2]), bias=True, name="proj"
        )
        return proj(out)


class VisionMLP(nn.Module):
    """fc2(quick_gelu(fc1(x))), with biases."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.config.mlp_dim, self.config.embed_dim)
        axes = ("vision_mlp", "vision_embed")
        x = quick_gelu(Linear("BPD,FD->BPF", shape, axes, bias=True, name="fc1")(x))
        return Linear("BPF,DF->BPD", shape[::-1], axes[::-1], bias=True, name="fc2")(x)


class VisionBlock(nn.Module):
    """One pre-norm block, in nn.scan's form: (carry, shared inputs) → (carry, None)."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Array, table: RopeTable, segments: Array) -> tuple[Array, None]:
        width = self.config.embed_dim
        attn = VisionAttention(self.config, name="attn")
        x = x + attn(LayerNorm(width, name="norm1")(x), table, segments)
        return x + VisionMLP(self.config, name="mlp")(LayerNorm(width, name="norm2")(x)), None


class Merger(nn.Module):
    """The projector: every merge_unit consecutive patches become one token of the decoder."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        wide = c.embed_dim * c.merge_unit
        x = LayerNorm(c.embed_dim, name="ln_q")(x)
        x = x.reshape(x.shape[0], x.shape[1] // c.merge_unit, wide)
        axes = ("merger_mlp", "merger_embed")
        x = Linear("BPD,FD->BPF", (wide, wide), axes, bias=True, name="fc1")(x)
        x = jax.nn.gelu(x, approximate=False)
        axes = ("embed", "merger_mlp")
        return Linear("BPF,DF->BPD", (c.hidden_size, wide), axes, bias=True, name="fc2")(x)


class VisionEncoder(nn.Module):
    """Patches [B, P, patch_dim] → tokens [B, P / merge_unit, hidden_size].

    Attributes:
      config: sizes.
      dtype: compute dtype; norms and softmax are float32 in any case.
    """

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, patches: Array, segments: Array, positions: Array) -> Array:
        """
        Args:
          patches: [B, P, patch_dim]; a row is (channel, time, height, width) flattened.
          segments: [B, P] int32, one id a frame, 0 for padding.
          positions: [B, P, 2] int32, (h, w) of each patch in its frame.
        """
        c = self.config
        pixels = (c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
        x = patches.reshape(*patches.shape[:2], *pixels).astype(self.dtype)
        # C, Z, Y, X: channel, time, height, width of a patch, as the checkpoint's Conv3d has them.
        x = Linear(
            "BPCZYX,DCZYX->BPD",
            (c.embed_dim, *pixels),
            ("vision_embed", "channel", "patch_t", "patch_h", "patch_w"),
            name="patch_embed",
        )(x)
        table = vision_table(positions, head_dim=c.head_dim)
        blocks = scan_layers(VisionBlock, c.depth, in_axes=(nn.broadcast, nn.broadcast))
        x, _ = blocks(c, name="blocks")(x, table, segments)
        return Merger(c, name="merger")(x)
