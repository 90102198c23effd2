"""The mixture of routed experts, in three forms that compute the same sum.

`dense` runs every expert on every token, or, where tokens are so few that they choose fewer experts
than there are, the chosen ones alone; `ragged` sorts each device's tokens by expert and
multiplies group by group; `einsum` gives every expert a fixed number of places in each group of
tokens. The first two never drop a token.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from echovlm_jax.errors import InputError
from echovlm_jax.ops import Array
from echovlm_jax.ops.activations import swiglu
from echovlm_jax.ops.layout import Layout
from echovlm_jax.ops.moe import einsum as by_capacity
from echovlm_jax.ops.moe import ragged
from echovlm_jax.ops.moe.routing import Experts, Routing, load_balancing_loss, route
from echovlm_jax.ops.product.einsum import einsum
from echovlm_jax.ops.product.weight import one_of

__all__ = ["DISPATCHES", "Experts", "Routing", "load_balancing_loss", "moe", "route"]

DISPATCHES = ("dense", "ragged", "einsum")


def moe(
    x: Float[Array, "B T D"],
    routing: Routing,
    experts: Experts,
    *,
    dispatch: str = "dense",
    valid: Bool[Array, "B T"] | None = None,
    capacity_factor: float | None = None,
    group_size: int = 256,
    layout: Layout = Layout(),
) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
    """Σ over a token's experts of weight · expert(x), in x's dtype.

    Args:
      x: tokens.
      routing: each token's experts, which are different ones, and their weights.
      experts: the weights, of any float dtype.
      dispatch: "dense", "ragged" or "einsum".
      valid: which tokens count; the others get 0 and take no expert's place. All by default.
      capacity_factor: einsum's places for each expert and group, as a multiple of what an even
        load needs. None: as many as can ever be needed.
      group_size: einsum's tokens a group.
      layout: splits x over "batch" and "length", the experts over "expert", their width over
        "mlp". The mesh axes of "expert" have to be the last ones of "batch".

    Returns:
      The sums, and how many choices of valid tokens found no place (0 but for einsum with a
      capacity_factor). Such a choice adds nothing to its token's sum.

    Raises:
      InputError: an unknown dispatch, or a capacity_factor or group_size that isn't positive.

    Example: 4 experts, 2 choices a token, groups of 256 and a capacity_factor of 1.25: an expert
    has 1.25 · 2 · 256 / 4 = 160 places in a group.
    """
    if dispatch not in DISPATCHES:
        raise InputError(f"moe_dispatch {dispatch!r} is unknown; choose {', '.join(DISPATCHES)}")
    if capacity_factor is not None and not capacity_factor > 0:
        raise InputError(f"capacity_factor must be above 0 or None, found {capacity_factor}")
    if group_size < 1:
        raise InputError(f"group_size must be at least 1, found {group_size}")
    if valid is None:
        valid = jnp.ones(x.shape[:2], bool)
    if dispatch == "einsum":
        return by_capacity.moe(
            x,
            routing,
            experts,
            valid,
            capacity_factor=capacity_factor,
            group_size=group_size,
            layout=layout,
        )
    form = ragged.moe if dispatch == "ragged" else _dense
    pairs, count = routing.expert.size, experts.gate.shape[0]
    if dispatch == "dense" and pairs < count and layout.size("expert") == 1:
        form = _chosen
    return form(x, routing, experts, valid, layout=layout), jnp.zeros((), jnp.int32)


def _dense(
    x: Float[Array, "B T D"],
    routing: Routing,
    experts: Experts,
    valid: Bool[Array, "B T"],
    *,
    layout: Layout,
) -> Float[Array, "B T D"]:
    """Every expert on every token: no sorting, no capacity, and E / k times the products needed.

    Experts that are split over devices are gathered: every device runs all of them.
    """
    chosen = jax.nn.one_hot(routing.expert, experts.gate.shape[0], dtype=jnp.float32)
    weight = jnp.einsum("BTkE,BTk,BT->BTE", chosen, routing.weight, valid.astype(jnp.float32))
    inner, outer = (
        ("expert", "expert_mlp", "expert_embed"),
        ("expert", "expert_embed", "expert_mlp"),
    )
    axes = ("batch", "length", None, "mlp")
    gate, up = (
        layout.constrain(einsum("BTD,EFD->BTEF", x, w, axes=inner, layout=layout), *axes)
        for w in (experts.gate, experts.up)
    )
    hidden = swiglu(gate, up) * weight.astype(x.dtype)[..., None]
    return einsum("BTEF,EDF->BTD", hidden, experts.down, axes=outer, layout=layout)


def _chosen(
    x: Float[Array, "B T D"],
    routing: Routing,
    experts: Experts,
    valid: Bool[Array, "B T"],
    *,
    layout: Layout,
) -> Float[Array, "B T D"]:
    """Each token with its own experts, one after another: no other expert's weights are read.

    With fewer (token, choice) pairs than experts, as when one answer is decoded, this reads less
    memory than all experts are, and reading is what decoding takes its time for.
    """
    rows = jnp.reshape(x, (-1, 1, 1, x.shape[-1]))
    sums = []
    for n, row in enumerate(rows):
        b, t = divmod(n, x.shape[1])
        total = jnp.zeros_like(row)
        for choice in range(routing.expert.shape[-1]):
            number = routing.expert[b, t, choice]
            gate, up, down = (one_of(weight, number) for weight in experts)
            hidden = swiglu(*(einsum("BTD,FD->BTF", row, w, layout=layout) for w in (gate, up)))
            hidden = hidden * routing.weight[b, t, choice].astype(x.dtype)
            total = total + einsum("BTF,DF->BTD", hidden, down, layout=layout)
        sums.append(jnp.where(valid[b, t], total, 0))
    return jnp.reshape(jnp.concatenate(sums), x.shape)
