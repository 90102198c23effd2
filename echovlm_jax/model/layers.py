"""Parameter shells: a weight product, two norms, a gated MLP."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from echovlm_jax.model.compute import PRODUCT, REMAT, Compute
from echovlm_jax.ops import Array
from echovlm_jax.ops.activations import swiglu
from echovlm_jax.ops.dropout import dropout
from echovlm_jax.ops.einsum import add_bias, einsum
from echovlm_jax.ops.layout import Layout
from echovlm_jax.ops.norms import layer_norm, rms_norm


class Linear(nn.Module):
    """A weight product with an optional bias, and with a low-rank update where one is given.

    The update (Hu et al., arXiv 2106.09685) is read from the collection "lora": `a` [rank, *in] and
    `b` [*out, rank], its scale already in `b`. Where there are `key` and `keep` [] as well, of its
    inputs that share is kept, each by itself, and divided by it.

    The kernel keeps PyTorch's order, outputs before inputs: converting a checkpoint moves bytes and
    never transposes them.

    Attributes:
      spec: the einsum of input and kernel, e.g. "BTD,NHD->BTNH".
      shape: the kernel's shape.
      axes: the kernel's logical axes, a name a dimension.
      bias: whether there is one; its shape is the kernel's output dimensions.
      layout: where activations lie.
    """

    spec: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    bias: bool = False
    layout: Layout = Layout()

    @nn.compact
    def __call__(self, x: Array, out_dtype: DTypeLike | None = None) -> Array:
        inputs, letters, result = re.split(",|->", self.spec)
        fan_in = math.prod(
            n for n, axis in zip(self.shape, letters, strict=True) if axis not in result
        )
        kernel = self.param("kernel", partitioned(weight_init(fan_in), self.axes), self.shape)
        y = einsum(self.spec, x, kernel, axes=self.axes, layout=self.layout, out_dtype=out_dtype)
        y = checkpoint_name(y, PRODUCT)
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            rest = "".join(letter for letter in inputs if letter not in letters)
            narrow = "".join(letter for letter in letters if letter not in result)
            wide = "".join(letter for letter in letters if letter in result)
            if self.has_variable("lora", "key"):
                key, keep = self.get_variable("lora", "key"), self.get_variable("lora", "keep")
                x = dropout(x, key, keep)
            low = einsum(f"{inputs},r{narrow}->{rest}r", x, a)
            y = y + einsum(f"{rest}r,{wide}r->{result}", low, b, out_dtype=y.dtype)
        if not self.bias:
            return y
        out = [i for i, letter in enumerate(letters) if letter in result]
        shape, axes = zip(*[(self.shape[i], self.axes[i]) for i in out], strict=True)
        bias = self.param("bias", partitioned(nn.initializers.zeros, axes), shape)
        return add_bias(y, bias, self.layout)


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
    layout: Layout = Layout()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape, axes = (self.mlp_dim, self.width), ("mlp", "embed")
        place: dict[str, Any] = {"layout": self.layout}
        gate = Linear("BTD,FD->BTF", shape, axes, **place, name="gate")(x)
        up = Linear("BTD,FD->BTF", shape, axes, **place, name="up")(x)
        hidden = self.layout.constrain(swiglu(gate, up), "batch", "length", "mlp")
        return Linear("BTF,DF->BTD", shape[::-1], axes[::-1], **place, name="down")(hidden)


def weight_init(fan_in: int) -> nn.initializers.Initializer:
    """Normal with variance 1 / inputs (LeCun et al., Efficient BackProp, 1998); of an embedding,
    the inputs of the head that may share its table.

    At the released width that is nearly Qwen2's deviation of 0.02; a narrow model's layers would be
    nearly silent with that one, and learn slowly.
    """
    return nn.initializers.normal(stddev=fan_in**-0.5)


def partitioned(init: nn.initializers.Initializer, axes: tuple[str, ...]) -> Callable[..., Any]:
    """An initializer whose parameter carries its logical axes."""
    return nn.with_logical_partitioning(init, axes)


def scan_layers(
    layer: type[nn.Module], length: int, in_axes: Any, compute: Compute
) -> Callable[..., Any]:
    """`length` copies of a layer as one loop: parameters are stacked, compile time stays constant.

    Args:
      layer: its call takes a carry first, and returns (carry, output).
      length: L.
      in_axes: for each further argument 0 (a slice a layer) or nn.broadcast (the same for all).
      compute: its `remat` says what the backward pass finds stored.
    """
    if compute.remat != "none":
        # A scan's body is compiled once: nothing there could be merged with its recomputation.
        layer = nn.remat(layer, policy=REMAT[compute.remat], prevent_cse=False)
    return nn.scan(
        layer,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
