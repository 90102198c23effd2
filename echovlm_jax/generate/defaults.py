"""How generation is computed on a device, where nobody says otherwise."""

from typing import Any

from jax.sharding import Mesh

from echovlm_jax.chips import defaults
from echovlm_jax.mesh import activation_layout
from echovlm_jax.model import Compute
from echovlm_jax.ops.layout import Layout


def compute_on(device: Any, mesh: Mesh | None = None, *, cache: str = "") -> Compute:
    """The choices for a device, or for all of a mesh's.

    Args:
      device: one of them.
      mesh: how they share the parameters; None for one device alone.
      cache: as of `Compute`.
    """
    layout = Layout() if mesh is None else activation_layout(mesh)
    return Compute(attention=defaults(device).attention, layout=layout, cache=cache)
