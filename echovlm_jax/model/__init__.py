"""The model: Linen modules as a thin shell of parameters over `ops`."""

from echovlm_jax.model.cache import Cache, extend_cache, init_cache, insert_row, place_cache
from echovlm_jax.model.compute import Compute
from echovlm_jax.model.echovlm import EchoVLM
from echovlm_jax.model.params import (
    ParamSpec,
    abstract_params,
    axes_of,
    init_params,
    logical_axes,
    param_specs,
    shapes_of,
)

__all__ = [
    "Cache",
    "Compute",
    "EchoVLM",
    "ParamSpec",
    "abstract_params",
    "axes_of",
    "extend_cache",
    "init_cache",
    "init_params",
    "insert_row",
    "logical_axes",
    "param_specs",
    "place_cache",
    "shapes_of",
]
