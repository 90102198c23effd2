"""Where activations lie on the device mesh: logical axes in, mesh axes out.

Functions here name the logical axes of their arrays; a Layout says which mesh axes those are split
over. The mesh itself comes from the context (`jax.set_mesh`): outside of one, or with an empty
Layout, everything here leaves arrays alone, so that one piece of code serves a laptop and a pod.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from echovlm_jax.ops import Array


@dataclass(frozen=True)
class Layout:
    """Rules (logical axis, mesh axes); an axis without a rule, or None, is whole everywhere.

    Hashable, so that it can be a static argument. `mesh.activation_layout` makes the project's.

    Attributes:
      sum_dtype: what gradients of weights are added up over devices in, where their products' dtype
        is narrower.
    """

    rules: tuple[tuple[str, tuple[str, ...]], ...] = ()
    sum_dtype: str = "float32"

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """The mesh axes, of size above 1 in the context's mesh, that a logical axis is split over.

        Example: with ("batch", ("data", "fsdp")) on a mesh of data 1 and fsdp 8: ("fsdp",).
        """
        sizes = jax.sharding.get_abstract_mesh().shape
        found = next((names for name, names in self.rules if name == axis), ())
        return tuple(name for name in found if sizes.get(name, 1) > 1)

    def size(self, axis: str | None) -> int:
        """Into how many pieces a logical axis is cut."""
        sizes = jax.sharding.get_abstract_mesh().shape
        count = 1
        for name in self.mesh_axes(axis):
            count *= sizes[name]
        return count

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes, one a dimension."""
        return PartitionSpec(*[self.mesh_axes(axis) or None for axis in axes])

    def constrain(self, x: Array, *axes: str | None) -> jax.Array:
        """x, laid out by its logical axes."""
        if not self.rules or jax.sharding.get_abstract_mesh().empty:
            return jnp.asarray(x)
        return jax.lax.with_sharding_constraint(x, self.spec(*axes))

    def sums(self, dtype: Any) -> jnp.dtype:
        """The dtype of sums, over devices, of what was computed in `dtype`."""
        return jnp.promote_types(dtype, self.sum_dtype)

    def shard_map(
        self,
        function: Callable[..., Any],
        in_axes: Sequence[Sequence[str | None]],
        out_axes: Any,
    ) -> Callable[..., Any]:
        """`function` on each device's own pieces; collectives in it use mesh axis names.

        Args:
          function: takes one array for each entry of in_axes.
          in_axes: the logical axes of each argument, a tuple of one name a dimension.
          out_axes: the same for the result, or a list of them for a tuple of results.
        """
        if not self.rules or jax.sharding.get_abstract_mesh().empty:
            return function
        out = (
            tuple(self.spec(*axes) for axes in out_axes)
            if isinstance(out_axes, list)
            else self.spec(*out_axes)
        )
        return jax.shard_map(
            function,
            in_specs=tuple(self.spec(*axes) for axes in in_axes),
            out_specs=out,
            check_vma=False,
        )
