"""BERTScore with a local model: Zhang et al. 2020, without weights by rarity or rescaling."""

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echovlm_jax.errors import InputError
from echovlm_jax.processing.files import read_json, shown
from echovlm_jax.storage.layout import CONFIG

_BATCH = 32
_DEPTH = 2 / 3  # the layer: the published choices lie at two thirds of a model's depth


def bertscore(
    references: Sequence[str], predictions: Sequence[str], folder: str | Path
) -> tuple[list[float], dict[str, str]]:
    """The F1 of each pair, from 0 to 1, and what a signature says of it.

    Every token is matched to the most similar one of the other text, by the cosine of their states
    in one layer. Longer texts than the model takes are cut.

    Args:
      references, predictions: pairs. A text without tokens scores 0.
      folder: a BERT-like model in Hugging Face form, with weights in safetensors. Nothing is
        downloaded, and no code of the folder's is run.

    Raises:
      InputError: it is no such folder, or transformers and torch are not installed.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    depth = config.get("num_hidden_layers")
    if not isinstance(depth, int) or depth < 1:
        raise InputError(f"{shown(folder)}: config.json has no num_hidden_layers")
    layer = math.ceil(depth * _DEPTH)
    model, tokenizer = _load(folder)
    most = min(int(tokenizer.model_max_length), int(config.get("max_position_embeddings", 512)) - 2)
    texts = list(dict.fromkeys([*references, *predictions]))
    known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for start in range(0, len(texts), _BATCH):
        part = texts[start : start + _BATCH]
        known |= zip(part, _states(model, tokenizer, part, layer, most), strict=True)
    scores = [_f1(*known[a], *known[b]) for a, b in zip(references, predictions, strict=True)]
    transformers = importlib.import_module("transformers")
    kind = config.get("model_type", "model")
    signed = (
        f"{folder.name} ({kind}, layer {layer} of {depth}), transformers"
        f" {transformers.__version__}; mean F1 over pairs, no idf, no rescaling"
    )
    return scores, {"bertscore": signed}


def _load(folder: Path) -> tuple[Any, Any]:
    try:
        transformers: Any = importlib.import_module("transformers")
        importlib.import_module("torch")
    except ImportError:
        raise InputError(
            "BERTScore needs transformers and torch: pip install 'echovlm-jax[bertscore]'"
        ) from None
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **local)
        model = transformers.AutoModel.from_pretrained(
            str(folder), use_safetensors=True, dtype="float32", **local
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"{shown(folder)}: transformers can't load it ({type(error).__name__}); it must have"
            " config.json, tokenizer files and model.safetensors"
        ) from None
    return model.eval().requires_grad_(False), tokenizer


def _states(
    model: Any, tokenizer: Any, texts: Sequence[str], layer: int, most: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each text its tokens' unit vectors [n, D], and which of them are no special tokens."""
    batch = tokenizer(
        list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt",
        return_special_tokens_mask=True,
    )  # fmt: skip
    special = batch.pop("special_tokens_mask").numpy().astype(bool)
    states = model(**batch, output_hidden_states=True).hidden_states[layer].numpy()
    states = states / np.maximum(np.linalg.norm(states, axis=-1, keepdims=True), 1e-12)
    mask = batch["attention_mask"].numpy().astype(bool)
    return [(s[m], ~p[m]) for s, m, p in zip(states, mask, special, strict=True)]


def _f1(a: np.ndarray, words_a: np.ndarray, b: np.ndarray, words_b: np.ndarray) -> float:
    """Special tokens may be matched to, but only words count, as in the published code."""
    if not words_a.any() or not words_b.any():
        return 0.0
    similar = a @ b.T
    recall = float(similar.max(axis=1)[words_a].mean())
    precision = float(similar.max(axis=0)[words_b].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
