"""What quantized weights cost a model in accuracy: its next tokens beside those of the wide one."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.data.dataset import Dataset, open_dataset
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.harness import limits_of
from echovlm_jax.evaluate.samples import Limits, Sample, inputs_of, make_samples
from echovlm_jax.load import Model, load_model
from echovlm_jax.model import EchoVLM
from echovlm_jax.processing.batch import PATCH_BUCKETS, bucket, make_batch
from echovlm_jax.progress import progress
from echovlm_jax.quantize import KINDS, quantize_params
from echovlm_jax.storage.files import as_path


def bench_quantize(
    model: str | Path, *, data: str | Path = "phantom", split: str = "test", exams: int = 50
) -> dict[str, Any]:
    """Compares the predictions of each answer's tokens, given the exam and the answer before them.

    Args:
      model: a MODEL folder; it is computed in float32.
      data: a dataset's folder, or "phantom".
      split: one of the dataset.
      exams: number of exams, from the first; each is asked for what its record answers.

    Returns:
      tokens, what, wide_loss and wide_bytes, and in `kinds` by kind of `quantize.KINDS`:
      top1_agreement, the share of tokens whose likeliest is the wide model's; mean_kl, the
      divergence KL(wide ‖ quantized) in nats; loss, the mean cross-entropy of the references; and
      bytes of the parameters.

    Raises:
      InputError: the model or data can't be used, or no answer fits.
    """
    loaded = load_model(model, dtype="float32")
    wide = loaded.params
    forms = {kind: quantize_params(wide, loaded.config, kind) for kind in KINDS}
    sums = {kind: np.zeros(3) for kind in KINDS}
    tokens, wide_loss = 0, 0.0
    dataset = open_dataset(data, split)
    samples = [sample for exam in make_samples(dataset, limit=exams) for sample in exam]
    limits = limits_of(loaded, as_path(model), 0, None)
    with progress(len(samples), "answer", "compare") as tick:
        for sample in samples:
            tick(1)
            if (found := _answer(loaded, dataset, sample, limits)) is None:
                continue
            batch, at, wanted = found
            own = _log_probabilities(loaded.config, wide, batch, at)
            wide_loss -= own[np.arange(len(wanted)), wanted].sum()
            tokens += len(wanted)
            for kind, params in forms.items():
                near = _log_probabilities(loaded.config, params, batch, at)
                same = (near.argmax(-1) == own.argmax(-1)).sum()
                divergence = (np.exp(own) * (own - near)).sum()
                loss = -near[np.arange(len(wanted)), wanted].sum()
                sums[kind] += [same, divergence, loss]
    if not tokens:
        raise InputError(f"{data}: split {split!r} has no answer that fits")
    result = {
        kind: {
            "top1_agreement": float(same / tokens),
            "mean_kl": float(divergence / tokens),
            "loss": float(loss / tokens),
            "bytes": _bytes(forms[kind]),
        }
        for kind, (same, divergence, loss) in sums.items()
    }
    return {
        "what": "next tokens of the references, with quantized weights against the wide ones",
        "tokens": tokens,
        "wide_loss": float(wide_loss / tokens),
        "wide_bytes": _bytes(wide),
        "kinds": result,
    }


def _bytes(params: Any) -> int:
    """Of the parameters; two int4 share a byte."""
    leaves = jax.tree.leaves(params)
    return sum(x.size // 2 if x.dtype == jnp.int4 else x.nbytes for x in leaves)


def _answer(
    model: Model, dataset: Dataset, sample: Sample, limits: Limits
) -> tuple[Mapping[str, np.ndarray], np.ndarray, np.ndarray] | None:
    """A model batch of one row, the columns that predict a reference's tokens, and these; None
    where it does not fit."""
    try:
        record = dataset.record(sample.record)
        inputs = inputs_of(model, sample, dataset.media(sample.record), record, limits)
    except InputError:
        return None
    answer = np.asarray(model.processor.tokenizer.encode(sample.reference), np.int64)
    prompt = inputs["input_ids"].shape[1]
    if not len(answer) or prompt + len(answer) > limits.seq_len:
        return None
    ids = np.concatenate([inputs["input_ids"], answer[None]], axis=1)
    whole = {**inputs, "input_ids": ids, "attention_mask": np.ones_like(ids)}
    patches = sum(len(inputs[key]) for key in inputs if key.startswith("pixel_values"))
    columns = bucket(ids.shape[1])
    room = bucket(patches, PATCH_BUCKETS) if patches else None
    batch = make_batch(model.config, whole, seq_len=columns, max_patches=room)
    start = columns - len(answer) - 1  # padding comes first
    return batch, np.arange(start, start + len(answer)), answer


@functools.partial(jax.jit, static_argnames="config")
def _next_tokens(params: Any, batch: Any, at: Any, *, config: ModelConfig) -> Any:
    model = EchoVLM(config)
    out: Any = model.apply({"params": params}, batch)
    logits: Any = model.apply({"params": params}, out.hidden[:, at], method="logits")
    return jax.nn.log_softmax(logits[0], axis=-1)


def _log_probabilities(
    config: ModelConfig, params: Any, batch: Mapping[str, np.ndarray], at: np.ndarray
) -> np.ndarray:
    """[n, V] in float64, of what follows these columns."""
    filled = np.pad(at, (0, bucket(len(at)) - len(at)), mode="edge")
    found = _next_tokens(params, dict(batch), filled, config=config)
    return np.asarray(found, np.float64)[: len(at)]
