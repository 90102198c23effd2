"""The model: Linen modules as a thin shell of parameters over `ops`."""

from echovlm_jax.model.cache import Cache, extend_cache, init_cache
from echovlm_jax.model.compute import Compute
from echovlm_jax.model.echovlm import EchoVLM, abstract_params, init_params, logical_axes

__all__ = [
    "Cache",
    "Compute",
    "EchoVLM",
    "abstract_params",
    "extend_cache",
    "init_cache",
    "init_params",
    "logical_axes",
]
