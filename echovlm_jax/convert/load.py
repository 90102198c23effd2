"""From a model folder to parameters on devices, a shard at a time."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.convert import folder, table
from echovlm_jax.errors import InputError
from echovlm_jax.model import param_specs
from echovlm_jax.ops.product.weight import Quantized
from echovlm_jax.quantize import quantize as few_bits
from echovlm_jax.quantize import recipe
from echovlm_jax.storage.arrays import Index, Take, to_devices


def load_params(
    model: str | os.PathLike[str] | folder.StoredModel,
    *,
    dtype: Any = None,
    shardings: Any = None,
    quantize: str | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads a MODEL folder.

    Args:
      model: a folder in Hugging Face form, one that `convert` made or a training run's; or what
        `open_model` gave for it.
      dtype: bfloat16, float32 or float16 to cast to; by default as stored.
      shardings: a tree like the parameters' of `jax.sharding.Sharding`, or one for all of them.
        Only this process' shards are read then, and the host holds 1 GiB of them at a time, or
        one. Without it, whole parameters go to the default device one after another.
      quantize: a kind of `quantize.KINDS`: for the parameters that are `Quantized` in `shardings`.

    Returns:
      The configuration and the nested dict of `jax.Array` (see `model.abstract_params`).

    Raises:
      InputError: no model there, or damaged data.
    """
    opened = folder.open_model(model) if isinstance(model, str | os.PathLike) else model
    target = folder.as_dtype(dtype)
    shapes = table.leaf_shapes(opened.config)
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        wanted = dict.fromkeys(shapes, shardings)
    else:
        wanted = table.flatten(shardings)
        if odd := sorted(wanted.keys() ^ shapes.keys()):
            raise InputError(f"shardings: {odd[0]} is not in both the shardings and the model")
    specs = param_specs(opened.config)

    def load(path: str, shape: tuple[int, ...]) -> Any:
        where = wanted[path]
        if not isinstance(where, Quantized):
            return _load(opened, path, shape, target, where)
        made = _load(opened, path, shape, target, None)
        return jax.device_put(few_bits(made, specs[path], recipe(quantize or "")), where)

    return opened.config, table.unflatten(
        {path: load(path, shape) for path, shape in shapes.items()}
    )


def _load(
    model: folder.StoredModel,
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype | None,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    target = dtype or model.dtypes[path]

    def read(indices: Sequence[Index], take: Take) -> None:
        def cast(number: int, where: Index, values: np.ndarray) -> None:
            take(number, where, folder.cast(values, target, path))

        model.read_blocks(path, indices, cast)

    return to_devices(read, shape, target, sharding)
