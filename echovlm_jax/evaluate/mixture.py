"""The mixture at work on exams: who answers for images, questions and answers."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.samples import NO_LIMIT, Limits, inputs_of, make_samples
from echovlm_jax.generate.inside import Inside, read_inside
from echovlm_jax.processing.batch import PATCH_BUCKETS, bucket, make_batch

KINDS = ("image", "question", "answer")  # of token, M; the chat template's words are the question's


class Mixture(NamedTuple):
    """Sums and means over tokens; not-a-number where there was no token of a kind."""

    shares: np.ndarray  # [L, M, E] of the choices that the tokens of a kind made; they sum to 1
    coefficient: np.ndarray  # [L, M] the mixture's weight against the dense path's, the mean
    tokens: np.ndarray  # [M] how many


class Read(NamedTuple):
    """One prompt and an answer to it, read by a model."""

    tokens: np.ndarray  # [T] int64
    kind: np.ndarray  # [T] index into KINDS
    expert: np.ndarray  # [L, T, k] the chosen experts, the best first
    coefficient: np.ndarray  # [L, T] the mixture's weight
    log_probability: float  # of the answer, the mean of its tokens, in nats


def read_answer(model: Any, inputs: Mapping[str, np.ndarray], answer: str) -> Read:
    """Reads a prompt and an answer to it, and says what the mixture did at every token.

    Args:
      model: what `load_model` gives.
      inputs: of one prompt, as `model.prepare` gives them.
      answer: its own answer, or another: a reference.

    Raises:
      InputError: the model has no mixture, or the answer is empty.
    """
    made = np.asarray(model.processor.tokenizer.encode(answer), np.int64)
    if not made.size:
        raise InputError("answer: is empty, so there is nothing to read")
    ids = np.concatenate([inputs["input_ids"], made[None]], axis=1)
    inside, first = _inside(model, {**inputs, "input_ids": ids})
    image = np.isin(ids[0], (model.config.image_token_id, model.config.video_token_id))
    kind = np.where(image, 0, 1)
    kind[ids.shape[1] - len(made) :] = 2
    logits = np.asarray(inside.router_logits)[:, 0, first:]
    chosen = np.argsort(-logits, axis=-1, kind="stable")[..., : model.config.moe.top_k]
    before = np.asarray(inside.logits[0, -len(made) - 1 : -1], np.float64)
    before -= before.max(-1, keepdims=True)
    log_p = before - np.log(np.exp(before).sum(-1, keepdims=True))
    return Read(
        tokens=ids[0],
        kind=kind,
        expert=chosen,
        coefficient=np.asarray(inside.coefficient)[:, 0, first:, 0],
        log_probability=float(log_p[np.arange(len(made)), made].mean()),
    )


def _inside(model: Any, inputs: Mapping[str, np.ndarray]) -> tuple[Inside, int]:
    """A forward pass over one row, padded on the left so that few programs are compiled; and its
    first column that is the row's own."""
    length = inputs["input_ids"].shape[1]
    columns = bucket(length)
    patches = sum(
        len(pixels)
        for key in ("pixel_values", "pixel_values_videos")
        if (pixels := inputs.get(key)) is not None
    )
    whole = {**inputs, "attention_mask": np.ones_like(inputs["input_ids"])}
    room = bucket(patches, PATCH_BUCKETS) if patches else None
    batch = make_batch(model.config, whole, seq_len=columns, max_patches=room)
    return read_inside(model.config, model.params, batch, model.dtype), columns - length


def mixture_of(read: Sequence[Read], experts: int) -> Mixture:
    """Sums up what was read.

    Args:
      read: of one model, at least one.
      experts: how many a layer has.
    """
    layers = len(read[0].expert)
    counts = np.zeros((layers, len(KINDS), experts))
    weight, tokens = np.zeros((layers, len(KINDS))), np.zeros(len(KINDS), np.int64)
    for one in read:
        for kind in range(len(KINDS)):
            own = one.kind == kind
            tokens[kind] += own.sum()
            weight[:, kind] += one.coefficient[:, own].sum(axis=1)
            for layer in range(layers):
                found = one.expert[layer, own].ravel()
                counts[layer, kind] += np.bincount(found, minlength=experts)
    with np.errstate(invalid="ignore"):
        shares = counts / counts.sum(axis=-1, keepdims=True)
        return Mixture(shares, weight / tokens, tokens)


def read_exams(
    model: Any, dataset: Any, *, kind: str = "diagnosis", limit: int | None = None, seed: int = 0
) -> dict[str, list[Read]]:
    """Reads the exams of a split with their own right answers, by organ.

    Args:
      model: what `load_model` gives.
      dataset: a `data.dataset.Dataset`.
      kind: what is asked: "report", "diagnosis" or "vqa".
      limit: number of exams, from the first; None = all.
      seed: of the wordings.

    Raises:
      InputError: as `make_samples`; an exam is too long for the model.
    """
    room = Limits(model.config.text.max_position_embeddings, NO_LIMIT, NO_LIMIT)
    found: dict[str, list[Read]] = {}
    for exam in make_samples(dataset, kinds=(kind,), limit=limit, seed=seed):
        for sample in exam:
            record = dataset.record(sample.record)
            pixels = dataset.media(sample.record)
            inputs = inputs_of(model, sample, pixels, record, room)
            read = read_answer(model, inputs, sample.reference)
            found.setdefault(sample.organ, []).append(read)
    return found


def shares_by_organ(read: Mapping[str, Sequence[Read]], experts: int, kind: str) -> np.ndarray:
    """The experts' shares [L, O, E] of one kind of token, organs in the order of their names."""
    number = KINDS.index(kind)
    shares = [mixture_of(read[organ], experts).shares[:, number] for organ in sorted(read)]
    return np.stack(shares, axis=1)


def effect_of_experts(
    model: Any,
    dataset: Any,
    layer: int,
    *,
    kind: str = "diagnosis",
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """What becomes of right answers when one expert of a layer is switched off, by organ.

    Args:
      model, dataset, kind, limit, seed: as of `read_exams`.
      layer: from 0.

    Returns:
      For each organ [E] float64: how much the mean logarithmic probability of a right answer's
      token changes, in nats, without each of the layer's experts. Below 0: the expert helps.

    Raises:
      InputError: as `read_exams` and `without_expert`.
    """
    asked = {"kind": kind, "limit": limit, "seed": seed}
    whole, params = read_exams(model, dataset, **asked), model.params
    found: dict[str, list[float]] = {organ: [] for organ in sorted(whole)}
    other = copy.copy(model)
    for expert in range(model.config.moe.num_experts):
        other.params = without_expert(params, layer, expert)
        for organ, read in read_exams(other, dataset, **asked).items():
            pairs = zip(read, whole[organ], strict=True)
            found[organ].append(fmean(a.log_probability - b.log_probability for a, b in pairs))
    return {organ: np.array(values) for organ, values in found.items()}


def without_expert(params: Any, layer: int, expert: int) -> dict[str, Any]:
    """The parameters with one routed expert switched off in one layer: it gives zero.

    Tokens still go to it, and its part of their result is missing. The other arrays are shared.

    Args:
      params: a model's; `down` of the experts may be in few bits.
      layer: from 0.
      expert: from 0.

    Raises:
      InputError: there is no such layer or expert.
    """
    experts = params["text"]["layers"]["moe"]["experts"]
    kernel = experts["down"]["kernel"]
    layers, count = kernel.shape[:2]
    if not 0 <= layer < layers or not 0 <= expert < count:
        raise InputError(
            f"layer {layer}, expert {expert}: there are {layers} layers of {count} experts, from 0"
        )
    if dataclasses.is_dataclass(kernel):  # its scale stands for all of its values
        off = dataclasses.replace(kernel, values=_zeroed(kernel.values, layer, expert))  # type: ignore[type-var]
    else:
        off = _zeroed(kernel, layer, expert)
    moe = {**params["text"]["layers"]["moe"], "experts": {**experts, "down": {"kernel": off}}}
    layers_ = {**params["text"]["layers"], "moe": moe}
    return {**params, "text": {**params["text"], "layers": layers_}}


def _zeroed(values: Any, layer: int, expert: int) -> Any:
    return jnp.asarray(values).at[layer, expert].set(0)
