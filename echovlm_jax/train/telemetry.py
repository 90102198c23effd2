"""What the mixture of experts does: sums over tokens, taken inside the training step.

Every figure is a sum over the tokens of a part of the batch, so that parts (accumulation steps,
devices) add up; the host divides (`train/log.py`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from echovlm_jax.ops import Array
from echovlm_jax.ops.layout import Layout

# Axes of this file beside the common ones: O organs, M kinds of token (image, text).
KINDS = ("image", "text")


def mixture_sums(
    out: Any, batch: Mapping[str, Array], *, top_k: int, organs: int, layout: Layout = Layout()
) -> dict[str, jax.Array]:
    """Sums over the tokens of a batch that are not padding, float32.

    Args:
      out: the model's Output; router_logits [L, B, T, E], coefficient [L, B, T, 2].
      batch: the model's batch; `organs` [B, T] where there is one, each token's organ by number.
      top_k: experts a token goes to.
      organs: how many organs there are; without batch["organs"] all counts are of number 0.
      layout: where activations lie.

    Returns:
      expert_counts [L, O, M, E]: how often an expert was chosen;
      router_entropy [L]: of the router's distribution over the experts, in nats;
      coefficient [L]: the weight of the mixture, against the dense path's.
    """
    tokens = (None, "batch", "length", None)
    counted = batch["segment_ids"] != 0
    group = _groups(batch, organs) * counted[..., None]

    def local(logits: Array) -> tuple[jax.Array, jax.Array]:
        """A device's own tokens: XLA would gather them all to sort four numbers."""
        chosen = jax.nn.one_hot(jax.lax.top_k(logits, top_k)[1], logits.shape[-1]).sum(-2)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        return chosen, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1, keepdims=True)

    run = layout.shard_map(local, [tokens], [tokens, tokens])
    chosen, entropy = run(jax.lax.stop_gradient(out.router_logits))
    counts = jnp.einsum("LBTE,BTG->LGE", chosen, group, precision="highest")
    layers, _, experts = counts.shape
    weight = jax.lax.stop_gradient(out.coefficient)[..., 0]
    return {
        "expert_counts": counts.reshape(layers, organs, len(KINDS), experts),
        "router_entropy": jnp.einsum("LBT,BT->L", entropy[..., 0], counted.astype(jnp.float32)),
        "coefficient": jnp.einsum("LBT,BT->L", weight, counted.astype(jnp.float32)),
    }


def _groups(batch: Mapping[str, Array], organs: int) -> jax.Array:
    """One-hot over organ and kind of token: float32 [B, T, O · M]."""
    segments = jnp.asarray(batch["segment_ids"])
    text = jnp.asarray(batch["patch_index"]) < 0 if "patch_index" in batch else segments >= 0
    organ = batch.get("organs", jnp.zeros_like(segments))
    return jax.nn.one_hot(organ * len(KINDS) + text, organs * len(KINDS))


def z_loss(router_logits: Float[Array, "L B T E"], weight: Float[Array, "B T"]) -> jax.Array:
    """Σ_tokens weight · (log Σ_e exp logit)², the mean over layers (ST-MoE, arXiv 2202.08906, 5).

    It keeps the router's logits small, where a softmax in low precision is exact.
    """
    size = jax.nn.logsumexp(router_logits, axis=-1) ** 2
    return jnp.einsum("LBT,BT->", size, weight) / router_logits.shape[0]
