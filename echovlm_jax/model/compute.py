"""How the model is computed. A capacity_factor alone may change the result: it drops tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from echovlm_jax.errors import InputError
from echovlm_jax.ops.attention.kernels import RESIDUALS
from echovlm_jax.ops.layout import Layout

PRODUCT = "product"  # what rematerialisation calls the result of a layer's weight product
# What the backward pass finds stored of a layer; everything else it computes again. The layer's
# input is stored in any case. From the most memory to the least work, and back.
_SAVE = jax.checkpoint_policies
REMAT: Mapping[str, Callable[..., Any] | None] = {
    "none": None,  # store everything
    "dots": _SAVE.save_only_these_names(PRODUCT, RESIDUALS),  # results of the weight products
    "attention": _SAVE.save_only_these_names("qkv", RESIDUALS),
    "full": _SAVE.nothing_saveable,
}


@dataclass(frozen=True)
class Compute:
    """Static choices of a forward and backward pass.

    Attributes:
      moe_dispatch: how tokens meet experts: dense, ragged or einsum (`ops.moe.dispatch.moe`).
      capacity_factor: of the einsum dispatch; None never drops a token.
      attention: implementation for whole sequences (`ops.attention.dispatch`); a cache is read by
        `ops.attention.cached`.
      remat: what the backward pass finds stored, a key of REMAT.
      layout: where activations lie; empty on one device.
      cache: what generation keeps keys and values in: "" for the compute dtype, or "int8".
      chunk: columns of a prompt that generation reads at one time, at most.
    """

    moe_dispatch: str = "dense"
    capacity_factor: float | None = None
    attention: str = "xla"
    remat: str = "none"
    layout: Layout = Layout()
    cache: str = ""
    chunk: int = 2048

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise InputError(f"remat {self.remat!r} is unknown; choose one of {', '.join(REMAT)}")
        if self.cache not in ("", "int8"):
            raise InputError(f"cache {self.cache!r} is unknown; choose int8, or leave it out")
        if self.chunk < 1:
            raise InputError(f"chunk must be at least 1, found {self.chunk}")
