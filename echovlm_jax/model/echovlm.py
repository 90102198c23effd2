"""The assembly: tokens and patches in, hidden states and logits out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from echovlm_jax.config import ModelConfig
from echovlm_jax.model.cache import Cache
from echovlm_jax.model.compute import Compute
from echovlm_jax.model.decoder import Decoder, LayerOutput
from echovlm_jax.model.vision import VisionEncoder
from echovlm_jax.ops import Array

Params = dict[str, Any]
Batch = Mapping[str, Array]


class Output(NamedTuple):
    """What a forward pass returns; absent parts are None."""

    hidden: Array  # [B, T, D], after the final norm
    kv: tuple[Array, Array]  # [L, B, K, T, H] each: keys and values of these tokens
    router_logits: Array | None  # [L, B, T, E] float32
    coefficient: Array | None  # [L, B, T, 2] float32
    dropped: Array | None  # [L], choices of tokens that found no room at their expert
    layer_inputs: Array | None  # [L, B, T, D], with keep_hidden
    image_tokens: Array | None  # [B, P / merge_unit, D], with patches


class EchoVLM(nn.Module):
    """Vision encoder, projector and dual-path decoder; plain Qwen2-VL where config.moe is None.

    A batch is a dict of arrays with static shapes:

      tokens [B, T] int32, positions [B, 3, T] int32 (time, height, width),
      segment_ids [B, T] int32 (0 = padding; tokens attend only inside their segment);
      with images also patches [B, P, patch_dim], patch_segment_ids [B, P] int32 (one id a frame,
      0 = padding), patch_positions [B, P, 2] int32 (h, w), and patch_index [B, T] int32, which
      token takes which of the row's P / merge_unit image tokens (−1 for text).

    Example:
      model = EchoVLM(preset("tiny"))
      out = model.apply({"params": params}, batch)
      logits = model.apply({"params": params}, out.hidden, method="logits")

    Attributes:
      config: sizes.
      dtype: compute dtype.
      keep_hidden: whether to return every layer's input.
      compute: how it is computed: dispatch, attention, rematerialisation, layout on a mesh.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    keep_hidden: bool = False
    compute: Compute = Compute()

    def setup(self) -> None:
        self.vision = VisionEncoder(self.config.vision, self.dtype, self.compute)
        self.text = Decoder(self.config, self.dtype, self.keep_hidden, self.compute)

    def __call__(self, batch: Batch, cache: Cache | None = None) -> Output:
        x, image_tokens = self.embed(batch)
        hidden, layers = self.decode(x, batch["positions"], batch["segment_ids"], cache)
        return Output(
            hidden=hidden,
            kv=layers.kv,
            router_logits=layers.router_logits,
            coefficient=layers.coefficient,
            dropped=layers.dropped,
            layer_inputs=layers.hidden,
            image_tokens=image_tokens,
        )

    def embed(self, batch: Batch) -> tuple[Array, Array | None]:
        """The decoder's input [B, T, D], images in their places; and the image tokens."""
        x = self.text.embed_tokens(batch["tokens"])
        if "patches" not in batch:
            return x, None
        image_tokens = self.vision(
            batch["patches"], batch["patch_segment_ids"], batch["patch_positions"]
        )
        return insert_images(x, image_tokens, batch["patch_index"]), image_tokens

    def decode(
        self, x: Array, positions: Array, segments: Array, cache: Cache | None = None
    ) -> tuple[Array, LayerOutput]:
        """The decoder alone: see `Decoder.__call__`."""
        return self.text(x, positions, segments, cache)

    def logits(self, hidden: Array) -> Array:
        """[B, T, D] → [B, T, V] in float32."""
        return self.text.logits(hidden)

    def forward(self, batch: Batch) -> Array:
        """The logits of every token: [B, T, V] in float32."""
        return self.logits(self(batch).hidden)


def insert_images(x: Array, image_tokens: Array, patch_index: Array) -> Array:
    """Token embeddings [B, T, D] with image tokens [B, P / merge_unit, D] where the index says."""
    index = patch_index[..., None]
    taken = jnp.take_along_axis(image_tokens, jnp.maximum(index, 0), axis=1)
    return jnp.where(index >= 0, taken, x)
