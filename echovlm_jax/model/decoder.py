"""The decoder: Qwen2's layer with a second, sparse path beside its MLP."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from echovlm_jax.config import ModelConfig, TextConfig
from echovlm_jax.model.cache import Cache
from echovlm_jax.model.compute import Compute
from echovlm_jax.model.layers import (
    GatedMLP,
    Linear,
    RMSNorm,
    scan_layers,
    stored,
    weight,
)
from echovlm_jax.model.moe import MoE
from echovlm_jax.ops import Array
from echovlm_jax.ops.attention.cached import Stored, cached_attention
from echovlm_jax.ops.attention.dispatch import attention
from echovlm_jax.ops.layout import Layout
from echovlm_jax.ops.product.einsum import einsum
from echovlm_jax.ops.product.weight import lookup
from echovlm_jax.ops.rope import RopeTable, apply_rope, mrope_table

_HEAD = "BTD,VD->BTV"


class Context(NamedTuple):
    """What every layer reads: rotary table, segments of the new tokens and of the cached ones."""

    table: RopeTable
    q_segments: Array  # [B, T]
    kv_segments: Array  # [B, T]
    valid: Array | None = None  # [B, T] bool: which new tokens are not padding; None = all
    cached_segments: Array | None = None  # [B, S]; None without a cache


def make_context(
    config: TextConfig, positions: Array, segments: Array, cache: Cache | None = None
) -> Context:
    """What every layer reads, from the new tokens' positions [B, 3, T] and segments [B, T]."""
    return Context(
        table=mrope_table(
            positions,
            head_dim=config.head_dim,
            theta=config.rope_theta,
            section=config.mrope_section,
        ),
        # A padded query looks at the first segment: its result is never used, and it stays equal
        # to PyTorch's, where padding hides keys and not queries.
        q_segments=jnp.where(segments == 0, 1, segments),
        kv_segments=segments,
        valid=segments != 0,
        cached_segments=None if cache is None else cache.segments,
    )


class LayerOutput(NamedTuple):
    """What one layer tells beside its result; stacked over L by the scan."""

    kv: tuple[Array, Array]  # [B, K, T, H] each
    router_logits: Array | None  # [B, T, E] float32
    coefficient: Array | None  # [B, T, 2] float32, after the softmax
    dropped: Array | None  # [], choices of tokens that found no room at their expert
    hidden: Array | None  # [B, T, D], the layer's input


class Embedding(nn.Module):
    """A table [V, D], read by token and, where tied, multiplied as the output head."""

    shape: tuple[int, int]
    layout: Layout = Layout()

    def setup(self) -> None:
        init = weight(_HEAD, ("vocab", "embed"))
        self.embedding = stored(self, "embedding", init, self.shape)

    def __call__(self, tokens: Array, dtype: Any) -> Array:
        # Every device looks up its own slice of the width for the tokens of all that share the
        # table; only then are slices exchanged for rows. The table itself never travels.
        tokens = self.layout.constrain(tokens, "lookup_batch", "length")
        x = lookup(self.embedding, tokens, dtype)
        x = self.layout.constrain(x, "lookup_batch", "length", "embed")
        return self.layout.constrain(x, "batch", "length", None)

    def attend(self, hidden: Array) -> Array:
        return einsum(_HEAD, hidden, self.embedding, out_dtype=jnp.float32)


class Attention(nn.Module):
    """Grouped-query attention with biases on q, k and v, over cached and new tokens."""

    config: TextConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self, x: Array, cached: Stored | None, context: Context
    ) -> tuple[Array, tuple[Array, Array]]:
        c = self.config
        shape = (c.num_heads, c.head_dim, c.hidden_size)
        kv_shape = (c.num_kv_heads, c.head_dim, c.hidden_size)
        axes, kv_axes = ("heads", "head_dim", "embed"), ("kv_heads", "head_dim", "embed")
        layout = self.compute.layout
        place: dict[str, Any] = {"bias": True, "layout": layout}
        q = Linear("BTD,NHD->BTNH", shape, axes, **place, name="q")(x)
        k = Linear("BTD,KHD->BTKH", kv_shape, kv_axes, **place, name="k")(x)
        v = Linear("BTD,KHD->BTKH", kv_shape, kv_axes, **place, name="v")(x)
        q, k = apply_rope(q, context.table), apply_rope(k, context.table)
        q = layout.constrain(q, "batch", None, "attn_heads", None)
        k, v = (layout.constrain(x, "batch", None, "attn_kv_heads", None) for x in (k, v))
        q, k, v = (checkpoint_name(x, "qkv") for x in (q, k, v))
        segments: dict[str, Any] = {
            "q_segments": context.q_segments,
            "kv_segments": context.kv_segments,
            "layout": layout,
        }
        if cached is None:
            implementation = self.compute.attention
            out = attention(q, k, v, causal_offset=0, implementation=implementation, **segments)
        else:
            segments["cached_segments"] = context.cached_segments
            out = cached_attention(q, k, v, cached, **segments)
        shape, axes = (shape[2], *shape[:2]), (axes[2], *axes[:2])
        out = Linear("BTNH,DNH->BTD", shape, axes, layout=layout, name="o")(out)
        return out, (k.swapaxes(1, 2), v.swapaxes(1, 2))  # as a cache has them


class DecoderLayer(nn.Module):
    """h = x + Attention(norm(x)); u = norm(h); out = h + c₀ · MoE(u) + c₁ · MLP(u).

    c = softmax(W_c u + b_c) is a pair of weights for each token. Without a mixture (`moe=None`)
    this is Qwen2's layer, out = h + MLP(u).
    """

    config: ModelConfig
    compute: Compute = Compute()
    keep_hidden: bool = False

    @nn.compact
    def __call__(
        self, x: Array, cached: Stored | None, context: Context
    ) -> tuple[Array, LayerOutput]:
        text, layout = self.config.text, self.compute.layout
        width, eps = text.hidden_size, text.rms_norm_eps
        x = layout.constrain(x, "batch", "length", None)
        attn, kv = Attention(text, self.compute, name="attn")(
            RMSNorm(width, eps, name="attn_norm")(x), cached, context
        )
        h = x + attn
        u = RMSNorm(width, eps, name="mlp_norm")(h)
        y = GatedMLP(width, text.mlp_dim, layout, name="mlp")(u)
        router_logits = coefficient = dropped = None
        if self.config.moe is not None:
            shell = Linear(
                "BTD,CD->BTC",
                (2, width),
                ("path", "embed"),
                bias=True,
                layout=layout,
                name="coefficient",
            )
            coefficient = jax.nn.softmax(shell(u.astype(jnp.float32)), axis=-1)
            moe = MoE(self.config.moe, width, self.compute, name="moe")
            mixture, router_logits, dropped = moe(u, context.valid)
            c = coefficient.astype(u.dtype)
            y = c[..., :1] * mixture + c[..., 1:] * y
        hidden = x if self.keep_hidden else None
        out = layout.constrain(h + y, "batch", "length", None)
        return out, LayerOutput(kv, router_logits, coefficient, dropped, hidden)


class Decoder(nn.Module):
    """Embedding, scanned layers, final norm and output head.

    Attributes:
      config: sizes.
      dtype: compute dtype; norms, softmax, router and logits are float32 in any case.
      keep_hidden: whether to return every layer's input.
      compute: how it is computed.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    keep_hidden: bool = False
    compute: Compute = Compute()

    def setup(self) -> None:
        text = self.config.text
        table = (text.vocab_size, text.hidden_size)
        self.embed = Embedding(table, self.compute.layout)
        layers = scan_layers(
            DecoderLayer, text.num_layers, in_axes=(0, nn.broadcast), compute=self.compute
        )
        self.layers = layers(self.config, self.compute, self.keep_hidden)
        self.final_norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        if not text.tie_word_embeddings:
            self.lm_head = Linear(_HEAD, table, ("vocab", "embed"), layout=self.compute.layout)

    def embed_tokens(self, tokens: Array) -> Array:
        """[B, T] → [B, T, D] in the compute dtype."""
        return self.embed(tokens, self.dtype)

    def __call__(
        self,
        x: Array,
        positions: Array,
        segments: Array,
        cache: Cache | None = None,
    ) -> tuple[Array, LayerOutput]:
        """
        Args:
          x: [B, T, D] embeddings, in the compute dtype.
          positions: [B, 3, T] int32.
          segments: [B, T] int32, 0 for padding.
          cache: what came before; None at the start.

        Returns:
          The normalised result [B, T, D], and the layers' outputs stacked over L.
        """
        cached = None if cache is None else cache.stored
        context = make_context(self.config.text, positions, segments, cache)
        x, outputs = self.layers(x, cached, context)
        return self.final_norm(x), outputs

    def logits(self, hidden: Array) -> Array:
        """[B, T, D] → [B, T, V] in float32, with the embedding as the head where they are tied."""
        if self.config.text.tie_word_embeddings:
            return self.embed.attend(hidden)
        return self.lm_head(hidden, out_dtype=jnp.float32)
