"""The vision transformer and its merger: patches in, tokens of the decoder's width out.

Qwen2-VL's (arXiv 2409.12191) and Qwen2.5-VL's (arXiv 2502.13923), which differ in fields of
VisionConfig: the norm, the MLP, and layers whose patches attend in windows of their frame.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from echovlm_jax.config import VisionConfig
from echovlm_jax.model.compute import Compute
from echovlm_jax.model.layers import GatedMLP, LayerNorm, Linear, RMSNorm, scan_layers
from echovlm_jax.ops import Array
from echovlm_jax.ops.activations import quick_gelu
from echovlm_jax.ops.attention.dispatch import attention
from echovlm_jax.ops.layout import Layout
from echovlm_jax.ops.rope import RopeTable, apply_rope, vision_table
from echovlm_jax.ops.windows import take_cells, window_order

EPS = 1e-6  # of all norms here, in both models
# What a compiled program calls the condition, where a layer may be of either kind.
WINDOWS_OR_FRAMES = "windows_or_frames"


class Places(NamedTuple):
    """Which patches may attend to one another: those of equal number; 0 = padding.

    Attributes:
      frames: [B, P] int32; None where all layers attend in windows.
      windows: [B, P] int32, each window one run; None where no layer does.
    """

    frames: Array | None = None
    windows: Array | None = None


class VisionAttention(nn.Module):
    """Attention in both directions inside one frame, or one window of it.

    Where there are both, `windowed` [] bool tells which. The loop over layers has one body then,
    with a condition in it: compared with loops over the layers of each kind, the whole model took
    two thirds of the time to compile, and no weights are copied from one loop to the other.
    """

    config: VisionConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self, x: Array, table: RopeTable, places: Places, windowed: Array | None = None
    ) -> Array:
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
        frames, windows = places

        def attend(q: Array, k: Array, v: Array, ids: Any, reach: int | None = None) -> Array:
            return attention(
                q,
                k,
                v,
                q_segments=ids,
                kv_segments=ids,
                causal_offset=None,
                implementation=self.compute.attention,
                layout=layout,
                reach=reach,
            )

        def in_windows(q: Array, k: Array, v: Array) -> Array:
            return attend(q, k, v, windows, c.window_patches)

        def in_frames(q: Array, k: Array, v: Array) -> Array:
            return attend(q, k, v, frames)

        if frames is not None and windows is not None:
            with jax.named_scope(WINDOWS_OR_FRAMES):
                out = jax.lax.cond(windowed, in_windows, in_frames, q, k, v)
        else:
            out = (in_frames if windows is None else in_windows)(q, k, v)
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


def norm(config: VisionConfig, name: str) -> nn.Module:
    """A norm of the tower's width."""
    if config.norm == "rms":
        return RMSNorm(config.width, EPS, name=name)
    return LayerNorm(config.width, EPS, name=name)


def _mlp(config: VisionConfig, layout: Layout, name: str) -> nn.Module:
    if config.mlp == "gated":
        axes = ("vision_mlp", "vision_embed")
        return GatedMLP(config.width, config.mlp_dim, layout, bias=True, axes=axes, name=name)
    return VisionMLP(config, layout, name=name)


class VisionBlock(nn.Module):
    """One pre-norm block, in nn.scan's form: (carry, shared inputs) → (carry, None)."""

    config: VisionConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self, x: Array, table: RopeTable, places: Places, windowed: Array | None
    ) -> tuple[Array, None]:
        c, layout = self.config, self.compute.layout
        x = layout.constrain(x, "batch", "length", None)
        attn = VisionAttention(c, self.compute, name="attn")
        x = x + attn(norm(c, "norm1")(x), table, places, windowed)
        x = x + _mlp(c, layout, "mlp")(norm(c, "norm2")(x))
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
        x = norm(c, "ln_q")(x)
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
        places, windowed = Places(frames=segments), None
        if c.window is not None:
            windows = window_order(segments, positions, window=c.window, unit=c.merge_unit)
            # From here to the merger patches lie window by window. Frames stay where they are.
            moved = (take_cells(x, windows.order) for x in (patches, positions, segments))
            patches, positions, segments = moved
            some, every = any(c.windowed), all(c.windowed)
            places = Places(None if every else segments, windows.ids if some else None)
            windowed = jnp.array(c.windowed) if some and not every else None
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
        axes = (nn.broadcast, nn.broadcast, 0)
        blocks = scan_layers(VisionBlock, c.depth, in_axes=axes, compute=self.compute)
        x, _ = blocks(c, self.compute, name="blocks")(x, table, places, windowed)
        x = Merger(c, self.compute.layout, name="merger")(x)
        return x if c.window is None else take_cells(x, windows.back)
