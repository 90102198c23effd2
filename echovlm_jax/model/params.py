"""The one description of the parameters, read off the modules that declare them."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from echovlm_jax.config import ModelConfig
from echovlm_jax.model.echovlm import EchoVLM, Params


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: [*stacked, *outputs, *inputs].

    A product of x with a weight sums over the inputs and makes the outputs; every place of the
    stacked axes, layers and experts, is a weight of its own. What is added to or scales a product's
    outputs has no inputs. A table that tokens look up is described as the output head's weight.

    Attributes:
      shape: the sizes.
      dtype: as it is initialised.
      init: the initializer: (key, shape, dtype) → values.
      axes: the logical axes, a name a dimension.
      stacked: how many axes, the first, are stacked.
      inputs: how many axes, the last, are inputs.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    init: nn.initializers.Initializer
    axes: tuple[str, ...]
    stacked: int = 0
    inputs: int = 0

    @property
    def multiply_adds(self) -> int:
        """Of one x with each of the stacked weights."""
        return math.prod(self.shape) if self.inputs else 0

    def cut(self, whole: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
        """What a tuple of one entry a dimension says of the stacked, output and input axes.

        Example: of the shape of attn/q/kernel, ((L,), (N, H), (D,)).
        """
        last = len(self.shape) - self.inputs
        return whole[: self.stacked], whole[self.stacked : last], whole[last:]


def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter by its path, as "text/layers/attn/q/kernel"."""
    return dict(_specs(config))


@functools.lru_cache  # tracing takes a second, and many places ask
def _specs(config: ModelConfig) -> dict[str, ParamSpec]:
    return describe(jax.eval_shape(lambda key: _init(config, key), jax.random.key(0)))


def describe(declared: Any) -> dict[str, ParamSpec]:
    """The parameters of a module, of its `init` under `jax.eval_shape`."""
    flat: dict[str, Any] = flatten_dict(declared, sep="/")
    return {
        path: ParamSpec(p.value.shape, p.value.dtype, p.init, p.names, p.stacked, p.inputs)
        for path, p in flat.items()
    }


def shapes_of(specs: Mapping[str, ParamSpec]) -> Params:
    """The nested dict of jax.ShapeDtypeStruct."""
    structs = {path: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for path, spec in specs.items()}
    return unflatten_dict(structs, sep="/")


def axes_of(specs: Mapping[str, ParamSpec]) -> Params:
    """The same tree of each parameter's logical axes."""
    return unflatten_dict({path: spec.axes for path, spec in specs.items()}, sep="/")


def abstract_params(config: ModelConfig) -> Params:
    """The parameters' shapes and dtypes (jax.ShapeDtypeStruct), without making them."""
    return shapes_of(param_specs(config))


def logical_axes(config: ModelConfig) -> Params:
    """The same tree with each parameter's logical axis names, a tuple of one name a dimension."""
    return axes_of(param_specs(config))


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters in float32: normal, biases 0, norm scales 1."""
    return nn.meta.unbox(jax.jit(functools.partial(_init, config))(key))


def _init(config: ModelConfig, key: jax.Array) -> Params:
    vision = config.vision
    patches = vision.merge_unit
    batch = {
        "tokens": jnp.zeros((1, 1), jnp.int32),
        "positions": jnp.zeros((1, 3, 1), jnp.int32),
        "segment_ids": jnp.ones((1, 1), jnp.int32),
        "patches": jnp.zeros((1, patches, vision.patch_dim), jnp.float32),
        "patch_segment_ids": jnp.ones((1, patches), jnp.int32),
        "patch_positions": jnp.zeros((1, patches, 2), jnp.int32),
        "patch_index": jnp.zeros((1, 1), jnp.int32),
    }
    return dict(EchoVLM(config).init(key, batch, method="forward")["params"])
