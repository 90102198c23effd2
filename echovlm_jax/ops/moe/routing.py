"""Routing tokens to experts: which experts, with what weight, and how evenly.

The routed experts are one gated-silu MLP each, with weights stacked over E; `dispatch.moe`
computes them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from echovlm_jax.ops import Array
from echovlm_jax.ops.product.weight import Weight


class Routing(NamedTuple):
    """Each token's experts, best first, and the weights of their results (float32)."""

    expert: Int[Array, "B T k"]
    weight: Float[Array, "B T k"]


class Experts(NamedTuple):
    """Weights of the routed experts, in torch's [out, in] order."""

    gate: Weight  # [E, F, D]
    up: Weight  # [E, F, D]
    down: Weight  # [E, D, F]


def route(logits: Float[Array, "B T E"], *, top_k: int, normalize: bool) -> Routing:
    """Softmax over all experts in float32, then the top k.

    Args:
      logits: router logits.
      top_k: experts a token goes to.
      normalize: whether the k weights are scaled to sum to 1 (`norm_topk_prob`).
    """
    weight, expert = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), top_k)
    if normalize:
        weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    return Routing(expert, weight)


def load_balancing_loss(
    router_logits: Float[Array, "L B T E"], counted: Bool[Array, "B T"], *, top_k: int
) -> Float[Array, ""]:
    """Switch Transformer's balancing loss (arXiv 2101.03961, eq. 4 to 6), layers concatenated.

    E · Σ_{k,e} f[k, e] · P[e], with f the fraction of counted tokens whose k-th choice is e, and P
    the mean router probability of e. An even load gives top_k.

    Args:
      router_logits: of every layer.
      counted: which are tokens, and not padding.
      top_k: experts a token goes to.
    """
    layers, _, _, experts = router_logits.shape
    probability = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
    _, choice = jax.lax.top_k(probability, top_k)
    mask = counted.astype(jnp.float32)
    total = layers * jnp.sum(mask)
    chosen = jax.nn.one_hot(choice, experts, dtype=jnp.float32)
    fraction = jnp.einsum("LBTkE,BT->kE", chosen, mask) / total
    mean = jnp.einsum("LBTE,BT->E", probability, mask) / total
    return experts * jnp.einsum("kE,E->", fraction, mean)


def balancing_part(
    router_logits: Float[Array, "L B T E"],
    counted: Bool[Array, "B T"],
    chosen: Float[Array, "E"],
    tokens: Float[Array, ""],
) -> jax.Array:
    """A part's share of a whole batch's `load_balancing_loss`: over all parts they add up to it.

    E · Σ_e f_e · P_e, [] float32, with f_e = chosen_e / (L · tokens), of the whole batch, and P_e
    the sum of the part's probabilities over the same. f has no gradient, so that of the sum is the
    batch's too.

    Args:
      router_logits, counted: of the part, as of `load_balancing_loss`.
      chosen: how often each expert was chosen in all layers, for all tokens of the batch.
      tokens: of the batch.
    """
    layers, _, _, experts = router_logits.shape
    probability = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
    weight = counted.astype(jnp.float32)
    total = jnp.einsum("LBTE,BT->E", probability, weight, precision="highest")
    return experts * jnp.sum(chosen * total) / (layers * tokens) ** 2


def balancing_losses(
    router_logits: Float[Array, "L B T E"], counted: Bool[Array, "B T"], *, top_k: int
) -> jax.Array:
    """`load_balancing_loss` of each row by itself; 0 for a row without tokens.

    A row is a packed one of a few thousand tokens. No part of a batch needs to know what others
    chose, as `balancing_part` does; in exchange, a row of one organ has to be even by itself.
    Returns float32 [B].
    """
    some = jnp.any(counted, axis=-1)

    def one(logits: Array, counted: Array) -> Array:
        return load_balancing_loss(logits[:, None], counted[None], top_k=top_k)

    losses = jax.vmap(one, in_axes=(1, 0))(router_logits, counted | ~some[:, None])
    return jnp.where(some, jnp.asarray(losses), 0.0)
