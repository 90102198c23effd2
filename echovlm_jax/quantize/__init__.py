"""Weights in few bits: which ones, how wide, and in what groups."""

from echovlm_jax.quantize.packing import pack, unpack
from echovlm_jax.quantize.recipes import (
    KINDS,
    Recipe,
    abstract,
    placed,
    quantize,
    recipe,
    takes,
)

__all__ = [
    "KINDS",
    "Recipe",
    "abstract",
    "pack",
    "placed",
    "quantize",
    "recipe",
    "takes",
    "unpack",
]
