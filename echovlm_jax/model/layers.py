"""Parameter shells: a weight product, two norms, a gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from echovlm_jax.ops import Array
from echovlm_jax.ops.einsum import einsum
from echovlm_jax.ops.norms import layer_norm, rms_norm

WEIGHT_INIT = nn.initializers.normal(stddev=0.02)


class Linear(nn.Module):
    """A weight product with an optional bias.

    The kernel keeps PyTorch's order, outputs before inputs: converting a checkpoint moves bytes and
    never transposes them.

    Attributes:
      spec: the einsum of input and kernel, e.g. "BTD,NHD->BTNH".
      shape: the kernel's shape.
      axes: the kernel's logical axes, a name a dimension.
      bias: whether there is one; its shape is the kernel's output dimensions.
    """

    spec: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array, out_dtype: DTypeLike | None = None) -> Array:
        kernel = self.param("kernel", partitioned(WEIGHT_INIT, self.axes), self.shape)
        y = einsum(self.spec, x, kernel, out_dtype=out_dtype)
        if not self.bias:
            return y
        letters, result = self.spec.split(",")[1].split("->")
        out = [i for i, letter in enumerate(letters) if letter in result]
        shape, axes = zip(*[(self.shape[i], self.axes[i]) for i in out], strict=True)
        bias = self.param("bias", partitioned(nn.initializers.zeros, axes), shape)
        return y + bias.astype(y.dtype)


class RMSNorm(nn.Module):
    """`ops.norms.rms_norm` with its scale [D]."""

    width: int
    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = partitioned(nn.initializers.ones, ("norm",))
        return rms_norm(x, self.param("scale", init, (self.width,)), self.eps)


class LayerNorm(nn.Module):
    """`ops.norms.layer_norm` with its scale and bias [D]."""

    width: int
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", partitioned(nn.initializers.ones, ("norm",)), (self.width,))
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("norm",)), (self.width,))
        return layer_norm(x, scale, bias, self.eps)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)), without biases (Shazeer, arXiv 2002.05202)."""

    width: int
    mlp_dim: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape, axes = (self.mlp_dim, self.width), ("mlp", "embed")
        gate = Linear("BTD,FD->BTF", shape, axes, name="gate")(x)
        up = Linear("BTD,FD->BTF", shape, axes, name="up")(x)
        return Linear("BTF,DF->BTD", shape[::-1], axes[::-1], name="down")(jax.nn.silu(gate) * up)


def partitioned(init: nn.initializers.Initializer, axes: tuple[str, ...]) -> Callable[..., Any]:
    """An initializer whose parameter carries its logical axes."""
    return nn.with_logical_partitioning(init, axes)


def scan_layers(layer: type[nn.Module], length: int, in_axes: Any) -> Callable[..., Any]:
    """`length` copies of a layer as one loop: parameters are stacked, compile time stays constant.

    Args:
      layer: its call takes a carry first, and returns (carry, output).
      length: L.
      in_axes: for each further argument 0 (a slice a layer) or nn.broadcast (the same for all).
    """
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
