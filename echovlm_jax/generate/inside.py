"""What a model's layers do while it reads: logits, routing and coefficients of every token."""

import functools
from typing import Any, NamedTuple

import jax

from echovlm_jax.config import ModelConfig
from echovlm_jax.errors import InputError
from echovlm_jax.model import EchoVLM


class Inside(NamedTuple):
    """Of every token of a batch, in float32."""

    logits: jax.Array  # [B, T, V]
    router_logits: jax.Array  # [L, B, T, E]
    coefficient: jax.Array  # [L, B, T, 2]: the weights of the mixture and of the dense path


def read_inside(config: ModelConfig, params: Any, batch: dict[str, Any], dtype: Any) -> Inside:
    """A forward pass that keeps what the mixture did.

    Args:
      config: sizes.
      params: nested dict of arrays.
      batch: a model batch (see `EchoVLM`); each shape is a program of its own.
      dtype: of the computation.

    Raises:
      InputError: the model has no mixture of experts.
    """
    if config.moe is None:
        raise InputError("this model has no mixture of experts (its config.json has no moe_*)")
    return _read(params, batch, config=config, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _read(params: Any, batch: dict[str, Any], *, config: ModelConfig, dtype: Any) -> Inside:
    model = EchoVLM(config, dtype)
    out: Any = model.apply({"params": params}, batch)
    logits: Any = model.apply({"params": params}, out.hidden, method="logits")
    return Inside(logits, out.router_logits, out.coefficient)
