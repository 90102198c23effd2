"""The training loss: cross-entropy whose logits never exist whole."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from echovlm_jax.ops import Array
from echovlm_jax.ops.collectives import all_gather
from echovlm_jax.ops.layout import Layout
from echovlm_jax.ops.product.einsum import einsum
from echovlm_jax.ops.product.weight import Quantized, as_operand, in_chunks

IGNORE = -100  # a label that does not count
# What a label weighs, in a sample with n of them: 1, 1 / √n or 1 / n.
WEIGHTINGS = ("token", "square_root", "sample")
# Bytes of logits that one device holds at a time. Smaller saves memory and runs more, narrower
# products.
LOGIT_BYTES = 128 * 2**20


class _Running(NamedTuple):
    """What a pass over the vocabulary has found so far, for each token; float32 [B, T]."""

    log_sum: jax.Array  # log Σ exp(logit)
    label: jax.Array  # the label's logit


def token_losses(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"] | Quantized,
    labels: Int[Array, "B T"],
    *,
    layout: Layout = Layout(),
    logit_bytes: int = LOGIT_BYTES,
) -> Float[Array, "B T"]:
    """Cross-entropy of each token in float32: log Σ_v exp(h · w_v) − h · w_label.

    The vocabulary goes by in chunks: of [B, T, V] only [B, T, V / chunks] exists at a time, in the
    backward pass too, which computes each chunk again where there are several. On a mesh each chunk
    of the head is gathered when its turn comes and its gradient scattered at once: where there are
    several, the head is never whole either.

    Args:
      hidden: after the final norm; its dtype is the dtype of the product.
      head: the output head, laid out as ("vocab", "embed").
      labels: of the same positions (already shifted); IGNORE gives 0.
      layout: where they lie.
      logit_bytes: of logits that one device may hold at a time.
    """
    if isinstance(head, Quantized) and layout.rules:
        head = as_operand(head, hidden.dtype)  # split as the wide one is
    batch, length = hidden.shape[:2]
    tokens = batch // layout.size("batch") * (length // layout.size("length"))
    vocab = head.shape[0] // layout.size("vocab")
    chunks = _chunks(vocab, 4 * tokens, logit_bytes)
    vocab_axes, embed_axes = layout.mesh_axes("vocab"), layout.mesh_axes("embed")

    def local(hidden: Array, head: Array, labels: Array) -> jax.Array:
        width = vocab // chunks
        first = jax.lax.axis_index(vocab_axes) * vocab if vocab_axes else 0
        # The sum over chunks of the gradient of `hidden` is one of float32 this way.
        wide = hidden.astype(jnp.float32)

        def step(running: _Running, chunk: tuple[jax.Array, jax.Array]) -> tuple[_Running, None]:
            number, weight = chunk
            kinds = {"dtype": hidden.dtype, "sum_dtype": layout.sums(hidden.dtype)}
            if not isinstance(weight, Quantized):
                weight = all_gather(weight, embed_axes, 1, **kinds)
            x = wide.astype(hidden.dtype)
            logits = einsum("BTD,VD->BTV", x, weight, out_dtype=jnp.float32)
            place = labels - (first + number * width)
            inside = (place >= 0) & (place < width)
            found = jnp.take_along_axis(logits, jnp.clip(place, 0, width - 1)[..., None], axis=-1)
            return _Running(
                jnp.logaddexp(running.log_sum, jax.nn.logsumexp(logits, axis=-1)),
                running.label + jnp.where(inside, found[..., 0], 0.0),
            ), None

        start = _Running(
            jnp.full(labels.shape, -jnp.inf, jnp.float32), jnp.zeros(labels.shape, jnp.float32)
        )
        pieces: Any = in_chunks(head, chunks)
        # One chunk's logits are as many as may be held: they wait for the backward pass.
        kept = step if chunks == 1 else jax.checkpoint(step, prevent_cse=False)
        numbers = jnp.arange(chunks)
        log_sum, label = jax.lax.scan(kept, start, (numbers, pieces))[0]
        if vocab_axes:
            top = jax.lax.stop_gradient(jax.lax.pmax(jax.lax.stop_gradient(log_sum), vocab_axes))
            log_sum = top + jnp.log(jax.lax.psum(jnp.exp(log_sum - top), vocab_axes))
            label = jax.lax.psum(label, vocab_axes)
        return jnp.where(labels == IGNORE, 0.0, log_sum - label)

    run = layout.shard_map(
        local,
        [("batch", "length", None), ("vocab", "embed"), ("batch", "length")],
        ("batch", "length"),
    )
    return run(hidden, head, labels)


def label_weights(
    labels: Int[Array, "B T"], segment_ids: Int[Array, "B T"], weighting: str = "token"
) -> Float[Array, "B T"]:
    """What each label weighs in the loss, float32; 0 where there is none.

    A report has a hundred labels and a diagnosis four: where every label weighs the same, the loss
    is the reports'. With "sample" each answer weighs as much as any other, with "square_root" as
    the root of its length (as in InternVL 2.5, arXiv 2412.05271).

    Args:
      labels: IGNORE is none.
      segment_ids: number of the sample that each position belongs to, 0 of padding.
      weighting: one of WEIGHTINGS.
    """
    counted = (jnp.asarray(labels) != IGNORE).astype(jnp.float32)
    if weighting == "token":
        return counted
    length = counted.shape[1]
    # [B, T + 1]: samples of a row are numbered from 1, and there are at most as many as tokens.
    numbers = jax.vmap(lambda n, ids: jax.ops.segment_sum(n, ids, length + 1))(counted, segment_ids)
    n = jnp.maximum(jnp.take_along_axis(numbers, jnp.asarray(segment_ids), axis=1), 1)
    return counted / (n if weighting == "sample" else jnp.sqrt(n))


def _chunks(vocab: int, bytes_per_column: int, most: int) -> int:
    """The fewest equal chunks of the vocabulary whose logits stay within `most` bytes."""
    return next(
        n
        for n in range(1, vocab + 1)
        if vocab % n == 0 and (vocab // n * bytes_per_column <= most or n == vocab)
    )
