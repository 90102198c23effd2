"""Weights in few bits: which ones, how wide, and in what groups."""

from echovlm_jax.quantize.blocks import read_block
from echovlm_jax.quantize.recipes import (
    KINDS,
    Recipe,
    abstract,
    placed,
    quantize,
    recipe,
    takes,
)

__all__ = ["KINDS", "Recipe", "abstract", "placed", "quantize", "read_block", "recipe", "takes"]
