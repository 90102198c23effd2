"""In what forms a weight is stored, and how a product takes it: nothing else needs to know."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from echovlm_jax.ops import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight [*stacked, *outputs, *inputs] in few bits: each value times its scale.

    A scale belongs to one output, and to all its inputs or to a group of neighbours along the last
    input axis. Grouped values have that axis as two, [groups, group size]: XLA:TPU then computes
    value times scale where the product reads it, and never stores the wide weight.

    Attributes:
      values: int8 or int4, of the weight's shape.
      scale: float32 [*stacked, *outputs]; in groups [*stacked, *inputs but the last, groups,
        *outputs], because a TPU's memory wants a long last axis.
      outputs: number of axes of outputs.
      inputs: number of axes of inputs, of the weight.
      grouped: whether a scale is a group's.
      int8_products: whether a product rounds its activations to int8 too, with a scale for each
        result's inputs, and multiplies whole numbers. Not in groups.
    """

    values: Any
    scale: Any
    outputs: int = dataclasses.field(metadata={"static": True})
    inputs: int = dataclasses.field(metadata={"static": True})
    grouped: bool = dataclasses.field(metadata={"static": True})
    int8_products: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def stacked(self) -> int:
        """Number of stacked axes; a loop over layers takes one away."""
        return self.scale.ndim - self.outputs - (self.inputs if self.grouped else 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        if not self.grouped:
            return tuple(self.values.shape)
        *lead, groups, size = self.values.shape
        return (*lead, groups * size)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def placed(self, entries: Sequence[Any], pieces: Callable[[Any], int]) -> "Quantized":
        """How values and scale lie on a mesh: the same tree of PartitionSpec.

        Args:
          entries: what the weight's axes are split over, as in a PartitionSpec.
          pieces: into how many pieces an entry splits.
        """
        *lead, last = entries
        scales = entries[: self.stacked], entries[self.stacked : -self.inputs]
        if not self.grouped:
            values, scale = entries, [*scales[0], *scales[1]]
        else:
            *_, groups, size = self.values.shape
            by_group = last if groups % pieces(last) == 0 else None
            inside = last if by_group is None and size % pieces(last) == 0 else None
            values = [*lead, by_group, inside]
            scale = [*scales[0], *lead[self.stacked + self.outputs :], by_group, *scales[1]]
        specs = {"values": PartitionSpec(*values), "scale": PartitionSpec(*scale)}
        return dataclasses.replace(self, **specs)

    def split(self, dtype: DTypeLike) -> jax.Array:
        """The weight as an array; grouped, its last axis as two, like `values`."""
        values, scale = jnp.asarray(self.values), jnp.asarray(self.scale)
        if self.grouped:
            # [*stacked, *groups, *outputs] → [*stacked, *outputs, *groups, 1]
            made = range(self.stacked, self.stacked + self.outputs)
            scale = jnp.moveaxis(scale, range(-self.outputs, 0), made)[..., None]
        else:
            scale = scale.reshape(*scale.shape, *(1,) * self.inputs)
        return (values.astype(jnp.float32) * scale).astype(dtype)


Weight = Array | Quantized


def as_operand(weight: Weight, dtype: DTypeLike) -> jax.Array:
    """The weight as an array of a product's dtype, whatever it is stored in."""
    if isinstance(weight, Quantized):
        return weight.split(dtype).reshape(weight.shape)
    return jnp.asarray(weight, dtype)


def no_gradient(weight: Quantized) -> Quantized:
    """What `jax.custom_vjp` returns for a quantized weight: those do not train."""
    values = np.zeros(weight.values.shape, jax.dtypes.float0)
    return dataclasses.replace(weight, values=values, scale=jnp.zeros_like(weight.scale))


def one_of(weight: Weight, number: Int[Array, ""]) -> Weight:
    """One of the weights that are stacked along the first axis."""
    if not isinstance(weight, Quantized):
        return jax.lax.dynamic_index_in_dim(weight, number, keepdims=False)
    values = jax.lax.dynamic_index_in_dim(weight.values, number, keepdims=False)
    # Scales are few. Sliced by layer and by number, XLA:TPU fetches those of all layers each time.
    here = jnp.arange(weight.scale.shape[0]) == number
    here = here.reshape(-1, *[1] * (weight.scale.ndim - 1))
    scale = jnp.sum(jnp.where(here, weight.scale, 0), axis=0)
    return dataclasses.replace(weight, values=values, scale=scale)


def in_chunks(weight: Weight, chunks: int) -> Weight:
    """A head [V, D] as [chunks, V / chunks, D], for a loop over the first axis."""
    if not isinstance(weight, Quantized):
        return jnp.reshape(weight, (chunks, -1, weight.shape[1]))
    values = jnp.reshape(weight.values, (chunks, -1, *weight.values.shape[1:]))
    scale = jnp.reshape(weight.scale, (*weight.scale.shape[:-1], chunks, -1))
    return dataclasses.replace(weight, values=values, scale=jnp.moveaxis(scale, -2, 0))


def lookup(
    table: Float[Array, "V D"] | Quantized, tokens: Int[Array, "B T"], dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """The product of a table with one-hot tokens: each token's row."""
    if not isinstance(table, Quantized):
        return as_operand(jnp.take(table, tokens, axis=0), dtype)
    if jax.sharding.get_abstract_mesh().size > 1:
        return _taken(table, tokens, dtype)
    if tokens.shape[1] == 1:  # while decoding
        # Rows that are joined before they are wide make XLA:TPU copy the table; see `_one_by_one`.
        rows = [_row(table, number, dtype) for number in jnp.unstack(tokens[:, 0])]
        return jnp.concatenate(rows)[:, None]
    ways = {"tpu": _one_by_one, "default": _taken}
    ways = {name: functools.partial(way, dtype=dtype) for name, way in ways.items()}
    return jax.lax.platform_dependent(table, tokens, **ways)


def _taken(table: Quantized, tokens: Array, dtype: DTypeLike) -> jax.Array:
    values = jnp.take(table.values, tokens, axis=0)  # [B, T, D], or [B, T, groups, size]
    scale = jnp.take(table.scale, tokens, axis=-1)  # [B, T], or [groups, B, T]
    return _wide(table, values, scale, dtype).reshape(*tokens.shape, table.shape[-1])


def _one_by_one(table: Quantized, tokens: Array, dtype: DTypeLike) -> jax.Array:
    """For a gather XLA:TPU copies the whole table into another form, 0.6 GB of the released one."""
    rows = jax.lax.map(lambda number: _row(table, number, dtype)[0], tokens.reshape(-1))
    return rows.reshape(*tokens.shape, table.shape[-1])


def _row(table: Quantized, number: Array, dtype: DTypeLike) -> jax.Array:
    """One row [1, D]."""
    values = jax.lax.dynamic_slice_in_dim(table.values, number, 1, 0)
    scale = jax.lax.dynamic_slice_in_dim(table.scale, number, 1, table.scale.ndim - 1)
    return _wide(table, values, scale, dtype).reshape(1, table.shape[-1])


def _wide(table: Quantized, values: Array, scale: Array, dtype: DTypeLike) -> jax.Array:
    """Values of rows times their scales [*rows], or in groups [groups, *rows]."""
    scale = jnp.moveaxis(scale, 0, -1) if table.grouped else jnp.asarray(scale)
    return (jnp.asarray(values, jnp.float32) * scale[..., None]).astype(dtype)
