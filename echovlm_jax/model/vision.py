"""The Qwen2-VL vision transformer and its merger: patches in, tokens of the decoder's width out."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from echovlm_jax.config import VisionConfig
from echovlm_jax.model.compute import Compute
from echovlm_jax.model.layers import LayerNorm, Linear, scan_layers
from echovlm_jax.ops import Array
from echovlm_jax.ops.activations import quick_gelu
from echovlm_jax.ops.attention.dispatch import attention
from echovlm_jax.ops.layout import Layout
from echovlm_jax.ops.rope import RopeTable, apply_rope, vision_table


class VisionAttention(nn.Module):
    """Attention in both directions inside one frame: patches of equal segment id."""

    config: VisionConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array, table: RopeTable, segments: Array) -> Array:
        c = self.config
        heads = (c.num_heads, c.head_dim)
        axes = ("vision_heads", "head_dim", "vision_embed")
        # Query, key and value are one weight in the checkpoint; C is that dimension of three.
        layout = self.compute.layout
        place: dict[str, Any] = {"bias": True, "layout": layout}
        shape = (3, *heads, c.width)
        qkv = Linear("BPD,CNHD->BPCNH", shape, ("qkv", *axes), **place, name="qkv")(x)
        q, k, v = (qkv[:, :, i] for i in range(3))
        q, k = apply_rope(q, table), apply_rope(k, table)
        q, k, v = (layout.constrain(x, "batch", None, "attn_heads", None) for x in (q, k, v))
        q, k, v = (checkpoint_name(x, "qkv") for x in (q, k, v))
        out = attention(
            q,
            k,
            v,
            q_segments=segments,
            kv_segments=segments,
            causal_offset=None,
            implementation=self.compute.attention,
            layout=layout,
        )
        shape, axes = (c.width, *heads), (axes[2], *axes[:2])
        return Linear("BPNH,DNH->BPD", shape, axes, **place, name="proj")(out)


class VisionMLP(nn.Module):
    """fc2(quick_gelu(fc1(x))), with biases."""

    config: VisionConfig
    layout: Layout = Layout()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.config.mlp_dim, self.config.width)
        axes = ("vision_mlp", "vision_embed")
        place: dict[str, Any] = {"bias": True, "layout": self.layout}
        x = quick_gelu(Linear("BPD,FD->BPF", shape, axes, **place, name="fc1")(x))
        x = self.layout.constrain(x, "batch", "length", "mlp")
        return Linear("BPF,DF->BPD", shape[::-1], axes[::-1], **place, name="fc2")(x)


class VisionBlock(nn.Module):
    """One pre-norm block, in nn.scan's form: (carry, shared inputs) → (carry, None)."""

    config: VisionConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array, table: RopeTable, segments: Array) -> tuple[Array, None]:
        width, layout = self.config.width, self.compute.layout
        x = layout.constrain(x, "batch", "length", None)
        attn = VisionAttention(self.config, self.compute, name="attn")
        x = x + attn(LayerNorm(width, name="norm1")(x), table, segments)
        mlp = VisionMLP(self.config, layout, name="mlp")
        x = x + mlp(LayerNorm(width, name="norm2")(x))
        return layout.constrain(x, "batch", "length", None), None


class Merger(nn.Module):
    """The projector: every merge_unit consecutive patches become one token of the decoder."""

    config: VisionConfig
    layout: Layout = Layout()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        place: dict[str, Any] = {"bias": True, "layout": self.layout}
        wide = c.width * c.merge_unit
        x = LayerNorm(c.width, name="ln_q")(x)
        x = x.reshape(x.shape[0], x.shape[1] // c.merge_unit, wide)
        axes = ("merger_mlp", "merger_embed")
        x = Linear("BPD,FD->BPF", (wide, wide), axes, **place, name="fc1")(x)
        x = jax.nn.gelu(x, approximate=False)
        axes = ("embed", "merger_mlp")
        return Linear("BPF,DF->BPD", (c.out_width, wide), axes, **place, name="fc2")(x)


class VisionEncoder(nn.Module):
    """Patches [B, P, patch_dim] → tokens [B, P / merge_unit, out_width].

    Attributes:
      config: sizes.
      dtype: compute dtype; norms and softmax are float32 in any case.
      compute: how it is computed.
    """

    config: VisionConfig
    dtype: DTypeLike = jnp.float32
    compute: Compute = Compute()

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
            (c.width, *pixels),
            ("vision_embed", "channel", "patch_t", "patch_h", "patch_w"),
            layout=self.compute.layout,
            name="patch_embed",
        )(x)
        table = vision_table(positions, head_dim=c.head_dim)
        broadcast = (nn.broadcast, nn.broadcast)
        blocks = scan_layers(VisionBlock, c.depth, in_axes=broadcast, compute=self.compute)
        x, _ = blocks(c, self.compute, name="blocks")(x, table, segments)
        return Merger(c, self.compute.layout, name="merger")(x)
