"""Parameter shells: a weight product, two norms, a gated MLP."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from echovlm_jax.model.compute import PRODUCT, REMAT, Compute
from echovlm_jax.ops import Array
from echovlm_jax.ops.activations import swiglu
from echovlm_jax.ops.dropout import dropout
from echovlm_jax.ops.layout import Layout
from echovlm_jax.ops.norms import layer_norm, rms_norm
from echovlm_jax.ops.product.einsum import add_bias, einsum, weight_axes
from echovlm_jax.ops.product.weight import Quantized, Weight


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
        kernel = stored(self, "kernel", weight(self.spec, self.axes), self.shape)
        y = einsum(self.spec, x, kernel, axes=self.axes, layout=self.layout, out_dtype=out_dtype)
        y = checkpoint_name(y, PRODUCT)
        stacked, made, summed = weight_axes(self.spec)
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            inputs, _, result = re.split(",|->", self.spec)
            rest = "".join(axis for axis in inputs if axis not in summed)
            if self.has_variable("lora", "key"):
                key, keep = self.get_variable("lora", "key"), self.get_variable("lora", "keep")
                x = dropout(x, key, keep)
            low = einsum(f"{inputs},{stacked}r{summed}->{rest}r", x, a)
            y = y + einsum(f"{rest}r,{stacked}{made}r->{result}", low, b, out_dtype=y.dtype)
        if not self.bias:
            return y
        end = len(stacked + made)
        init = declared(nn.initializers.zeros, self.axes[:end], len(stacked))
        bias = self.param("bias", init, self.shape[:end])
        return add_bias(y, bias, self.layout)


class RMSNorm(nn.Module):
    """`ops.norms.rms_norm` with its scale [D]."""

    width: int
    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = declared(nn.initializers.ones, ("norm",))
        return rms_norm(x, self.param("scale", init, (self.width,)), self.eps)


class LayerNorm(nn.Module):
    """`ops.norms.layer_norm` with its scale and bias [D]."""

    width: int
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", declared(nn.initializers.ones, ("norm",)), (self.width,))
        bias = self.param("bias", declared(nn.initializers.zeros, ("norm",)), (self.width,))
        return layer_norm(x, scale, bias, self.eps)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer, arXiv 2002.05202), with three biases or none."""

    width: int
    mlp_dim: int
    layout: Layout = Layout()
    bias: bool = False
    axes: tuple[str, str] = ("mlp", "embed")

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape, axes = (self.mlp_dim, self.width), self.axes
        place: dict[str, Any] = {"bias": self.bias, "layout": self.layout}
        gate = Linear("BTD,FD->BTF", shape, axes, **place, name="gate")(x)
        up = Linear("BTD,FD->BTF", shape, axes, **place, name="up")(x)
        hidden = self.layout.constrain(swiglu(gate, up), "batch", "length", "mlp")
        return Linear("BTF,DF->BTD", shape[::-1], axes[::-1], **place, name="down")(hidden)


Axes = tuple[str, ...]


class Declared(nn.LogicallyPartitioned):
    """A parameter as its module declares it, for `params.param_specs` to read.

    Attributes:
      init: its initializer.
      stacked: how many of its first axes count copies, of which each is a weight of its own.
      inputs: how many of its last axes a product sums over; the axes between are what it makes.
    """

    init: Any = struct.field(default=None, pytree_node=False)
    stacked: int = struct.field(default=0, pytree_node=False)
    inputs: int = struct.field(default=0, pytree_node=False)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Any:
        return super().add_axis(index, params).replace(stacked=self.stacked + 1)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Any:
        return super().remove_axis(index, params).replace(stacked=self.stacked - 1)


def declared(
    init: nn.initializers.Initializer, axes: Axes, stacked: int = 0, inputs: int = 0
) -> Callable[..., Any]:
    """An initializer whose parameter carries its logical axes, and what `Declared` says."""

    def declare(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Declared:
        value = init(key, shape, dtype)
        return Declared(value, axes, init=init, stacked=stacked, inputs=inputs)

    return declare


def weight(spec: str, axes: Axes) -> Callable[..., Any]:
    """The initializer of a weight, from the einsum of its product and its logical axes.

    Normal with variance 1 / inputs (LeCun et al., Efficient BackProp, 1998); of an embedding, the
    inputs of the head that may share its table. At the released width that is nearly Qwen2's
    deviation of 0.02; a narrow model's layers would be nearly silent with that one, and learn
    slowly.
    """
    stacked, _, summed = map(len, weight_axes(spec))
    return declared(_weight_init(summed), axes, stacked, summed)


def stored(
    module: nn.Module, name: str, init: Callable[..., Any], shape: tuple[int, ...]
) -> Weight:
    """A weight of a module's: `module.param`, or the quantized one that is given in its place."""
    if module.has_variable("params", name):
        given = module.get_variable("params", name)
        if isinstance(given, Quantized) and given.shape == shape:
            return given
    return module.param(name, init, shape)


@functools.cache
def _weight_init(inputs: int) -> nn.initializers.Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return nn.initializers.normal(math.prod(shape[-inputs:]) ** -0.5)(key, shape, dtype)

    return init


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
