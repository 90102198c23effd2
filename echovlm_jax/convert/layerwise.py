"""A forward pass that holds one decoder layer at a time: proof on a machine smaller than the model.

The released model takes 47 GB in float32. Read layer by layer from its folder it needs the vision
tower (2.7 GB) or one layer (1.5 GB), whichever runs.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from echovlm_jax.convert.folder import StoredModel
from echovlm_jax.convert.table import leaf_shapes, unflatten
from echovlm_jax.model.decoder import DecoderLayer, LayerOutput, make_context
from echovlm_jax.model.echovlm import Batch, Output, insert_images
from echovlm_jax.model.vision import VisionEncoder
from echovlm_jax.ops import Array
from echovlm_jax.ops.norms import rms_norm
from echovlm_jax.ops.product.einsum import einsum

_LAYERS = "text/layers/"
_HEAD_ROWS = 16384  # of the embedding and the output head that are in memory at once


def forward(model: StoredModel, batch: Batch) -> tuple[Output, np.ndarray]:
    """What `EchoVLM.__call__` and `.logits` give in float32, with keep_hidden.

    Args:
      model: an opened MODEL folder.
      batch: a model batch (see `EchoVLM`).

    Returns:
      The output, in numpy arrays, and the logits [B, T, V].
    """
    config = model.config
    text = config.text
    image_tokens = None
    if "patches" in batch:
        tower = VisionEncoder(config.vision)
        image_tokens = jax.jit(tower.apply)(
            {"params": _read_tree(model, "vision/")},
            batch["patches"],
            batch["patch_segment_ids"],
            batch["patch_positions"],
        )
    used, inverse = np.unique(np.asarray(batch["tokens"]), return_inverse=True)
    x = jnp.asarray(_embeddings(model, used)[inverse.reshape(batch["tokens"].shape)])
    if image_tokens is not None:
        x = insert_images(x, image_tokens, batch["patch_index"])
    layer = jax.jit(DecoderLayer(config, keep_hidden=True).apply)
    context = make_context(text, batch["positions"], batch["segment_ids"])
    outputs: list[LayerOutput] = []
    for index in range(text.num_layers):
        params = _read_tree(model, _LAYERS, index)
        x, output = layer({"params": params}, x, None, context)
        outputs.append(jax.tree.map(np.asarray, output))
    hidden = rms_norm(x, _read(model, "text/final_norm/scale"), text.rms_norm_eps)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *outputs)
    output = Output(
        hidden=np.asarray(hidden),
        kv=stacked.kv,
        router_logits=stacked.router_logits,
        coefficient=stacked.coefficient,
        dropped=stacked.dropped,
        layer_inputs=stacked.hidden,
        image_tokens=None if image_tokens is None else np.asarray(image_tokens),
    )
    return output, _logits(model, hidden)


def _embeddings(model: StoredModel, tokens: np.ndarray) -> np.ndarray:
    """The embeddings [N, D] of ascending tokens [N]."""
    found = []
    for row in range(0, model.config.text.vocab_size, _HEAD_ROWS):
        inside = tokens[(row <= tokens) & (tokens < row + _HEAD_ROWS)] - row
        if inside.size:
            rows = _read(model, "text/embed/embedding", slice(row, row + _HEAD_ROWS))
            found.append(rows[inside].astype(np.float32))
    return np.concatenate(found)


def _logits(model: StoredModel, hidden: Array) -> np.ndarray:
    tied = model.config.text.tie_word_embeddings
    path = "text/embed/embedding" if tied else "text/lm_head/kernel"
    rows = range(0, model.config.text.vocab_size, _HEAD_ROWS)
    pieces = (_read(model, path, slice(row, row + _HEAD_ROWS)) for row in rows)
    product = jax.jit(lambda h, w: einsum("BTD,VD->BTV", h, w))
    return np.concatenate([product(hidden, piece) for piece in pieces], axis=-1)


def _read_tree(model: StoredModel, prefix: str, layer: int | None = None) -> dict[str, Any]:
    """The parameters below `prefix`, as stored; of one layer only, if given."""
    rows = slice(None) if layer is None else slice(layer, layer + 1)
    paths = [path for path in leaf_shapes(model.config) if path.startswith(prefix)]
    read = {path: _read(model, path, rows) for path in paths}
    if layer is not None:
        read = {path: values[0] for path, values in read.items()}
    return unflatten({path.removeprefix(prefix): values for path, values in read.items()})


def _read(model: StoredModel, path: str, rows: slice = slice(None)) -> np.ndarray:
    """Some rows of a parameter, as stored."""
    shape = leaf_shapes(model.config)[path]
    ends = slice(*rows.indices(shape[0])[:2])
    return model.read(path, (ends, *(slice(0, size) for size in shape[1:])))
