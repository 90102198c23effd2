"""The three expert dispatches side by side: work beside the chosen experts' own, and time."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from echovlm_jax.config import ModelConfig, MoEConfig, preset
from echovlm_jax.errors import InputError
from echovlm_jax.flops import Work, layer_flops
from echovlm_jax.ops.moe.dispatch import Experts, moe, route
from echovlm_jax.ops.product.einsum import einsum
from echovlm_jax.ops.product.grouped import ROW_TILE

DEFAULT = "ragged"
# (dispatch, capacity_factor, group_size)
FORMS: tuple[tuple[str, float | None, int], ...] = (
    ("dense", None, 0),
    ("ragged", None, 0),
    ("einsum", 1.0, 128),
    ("einsum", 1.25, 128),
    ("einsum", 1.25, 256),
    ("einsum", 2.0, 128),
    ("einsum", None, 128),
)


def bench_moe(
    *, size: str = "echovlm_11b", tokens: int = 2048, timed_tokens: int = 256, rounds: int = 3
) -> dict[str, Any]:
    """Counts and times router and experts of one decoder layer, forward and backward, in float32.

    Work is counted in the traced program: every product of matrices, `ragged_dot` as the rows that
    it is for. Times are of this machine, medians over rounds in which all forms take turns; here
    XLA multiplies every row of a `ragged_dot` by all experts' matrices, which the TPU's kernel does
    not do.

    Args:
      size: the preset whose sizes to use.
      tokens: tokens a device, one row of them, for the count.
      timed_tokens: the same for the time.
      rounds: number of timings of each form.

    Returns:
      ours and theirs (seconds of the default form and of dense), ratio (ours / theirs), what,
      default, layer_flops, and dispatch: for each form its name, capacity_factor, group_size,
      seconds, and extra, the products beside the chosen experts' own as a share of the whole
      layer's; extra_with_tiles adds, for ragged, the tiles of rows that two experts share and
      the TPU's kernel therefore computes twice.

    Raises:
      InputError: an unknown preset, one without experts, or a number below 1.
    """
    config = preset(size)
    experts = config.moe
    if experts is None:
        raise InputError(f"size {size} has no experts; choose a preset that has")
    for name, value in (("tokens", tokens), ("timed_tokens", timed_tokens), ("rounds", rounds)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, found {value}")
    flops = layer_flops(config, Work(rows=1, seq_len=tokens))
    own = next(term.forward + term.backward for term in flops.terms if term.name == "experts")
    layer = flops.total
    # The boundaries between experts lie inside tiles, but for luck.
    rows = tokens * experts.top_k
    shared_tiles = own * (experts.num_experts - 1) * min(ROW_TILE, rows) / rows
    seconds = _times(config, experts, timed_tokens, rounds)
    table = []
    for form, median in zip(FORMS, seconds, strict=True):
        step, args = _step(config, experts, form, tokens, abstract=True)
        extra = dot_flops(jax.make_jaxpr(step)(*args).jaxpr) - own
        tiles = shared_tiles if form[0] == "ragged" else 0
        table.append(
            {
                "name": form[0],
                "capacity_factor": form[1],
                "group_size": form[2] or None,
                "extra": extra / layer,
                "extra_with_tiles": (extra + tiles) / layer,
                "seconds": median,
            }
        )
    ours, theirs = (
        next(row["seconds"] for row in table if row["name"] == name) for name in (DEFAULT, "dense")
    )
    return {
        "ratio": ours / theirs,
        "ours": ours,
        "theirs": theirs,
        "what": f"seconds of {size}'s router and experts, forward and backward on {timed_tokens}"
        f" tokens: {DEFAULT} against dense; extra work counted at {tokens} tokens",
        "default": DEFAULT,
        "layer_flops": layer,
        "dispatch": table,
    }


def dot_flops(jaxpr: Any) -> float:
    """FLOPs of a jaxpr's matrix products, those of inner jaxprs included, loops by their length.

    `ragged_dot_general` counts as its rows times one matrix each. Of a conditional's branches the
    costliest counts; a kernel counts nothing.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ("dot_general", "ragged_dot_general"):
            numbers = eqn.params.get("ragged_dot_dimension_numbers")
            dots = numbers.dot_dimension_numbers if numbers else eqn.params["dimension_numbers"]
            lhs, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            summed = math.prod(lhs[axis] for axis in dots[0][0])
            # A ragged sum over rows makes a matrix for each group, but each row adds to one.
            groups = out[0] if numbers and numbers.lhs_ragged_dimensions[0] in dots[0][0] else 1
            total += 2 * math.prod(out) * summed / groups
        elif name == "cond":
            total += max(dot_flops(branch.jaxpr) for branch in eqn.params["branches"])
        elif name != "pallas_call":
            times = eqn.params["length"] if name == "scan" else 1
            inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
            total += times * sum(
                dot_flops(getattr(j, "jaxpr", j)) for j in filter(_is_jaxpr, inner)
            )
    return total


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def _step(
    config: ModelConfig,
    experts: MoEConfig,
    form: tuple[str, float | None, int],
    tokens: int,
    *,
    abstract: bool,
) -> tuple[Callable[..., Any], Any]:
    """The gradient of router and experts, and its arguments."""
    width, inner, count = config.text.hidden_size, experts.expert_mlp_dim, experts.num_experts
    dispatch, factor, group = form

    def objective(x: Any, router: Any, weights: Any, g: Any) -> Any:
        logits = einsum("BTD,ED->BTE", x, router)
        routing = route(logits, top_k=experts.top_k, normalize=experts.norm_topk_prob)
        y, _ = moe(
            x,
            routing,
            weights,
            dispatch=dispatch,
            capacity_factor=factor,
            group_size=group or tokens,
        )
        return jnp.vdot(y, g)

    def make(*shape: int) -> Any:
        if abstract:
            return jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.random.normal(jax.random.key(math.prod(shape)), shape) / math.sqrt(shape[-1])

    weights = Experts(
        make(count, inner, width), make(count, inner, width), make(count, width, inner)
    )
    args = make(1, tokens, width), make(count, width), weights, make(1, tokens, width)
    return jax.grad(objective, argnums=(0, 1, 2)), args


def _times(config: ModelConfig, experts: MoEConfig, tokens: int, rounds: int) -> list[float]:
    """The median seconds of each form; in every round each one runs once."""
    steps = [jax.jit(_step(config, experts, form, tokens, abstract=True)[0]) for form in FORMS]
    _, args = _step(config, experts, FORMS[0], tokens, abstract=False)
    for step in steps:
        jax.block_until_ready(step(*args))  # compiles
    seconds: list[list[float]] = [[] for _ in FORMS]
    for _ in range(rounds):
        for times, step in zip(seconds, steps, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(step(*args))
            times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in seconds]
