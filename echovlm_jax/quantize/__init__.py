"""Weights in few bits: which ones, how wide, and in what groups."""

from echovlm_jax.quantize.blocks import read_block
from echovlm_jax.quantize.packing import pack, unpack
from echovlm_jax.quantize.recipes import (
    GROUP,
    KINDS,
    Recipe,
    abstract,
    placed,
    quantize,
    quantize_params,
    recipe,
    recipe_of,
    takes,
)

__all__ = [
    "GROUP",
    "KINDS",
    "Recipe",
    "abstract",
    "pack",
    "placed",
    "quantize",
    "quantize_params",
    "read_block",
    "recipe",
    "recipe_of",
    "takes",
    "unpack",
]
