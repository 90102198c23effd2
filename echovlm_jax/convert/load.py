"""From a model folder to parameters on devices, a shard at a time."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.convert import folder, store, table
from echovlm_jax.errors import InputError


def load_params(
    model: str | os.PathLike[str] | folder.StoredModel, *, dtype: Any = None, shardings: Any = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads a MODEL folder.

    Args:
      model: a folder in Hugging Face form, one that `convert` made or a training run's; or what
        `open_model` gave for it.
      dtype: bfloat16, float32 or float16 to cast to; by default as stored.
      shardings: a tree like the parameters' of `jax.sharding.Sharding`, or one for all of them.
        Each device's shard is then read by itself and the host holds one shard at a time. Without
        it, whole parameters go to the default device one after another.

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
    return opened.config, table.unflatten(
        {path: _load(opened, path, shape, target, wanted[path]) for path, shape in shapes.items()}
    )


def _load(
    model: folder.StoredModel,
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype | None,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(_default_device())
    # Devices that hold the same block share one read.
    blocks: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        index = index or (slice(None),) * len(shape)
        block = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        blocks.setdefault(block, []).append(device)
    arrays = []
    for block, devices in blocks.items():
        values = _read(model, path, tuple(slice(*ends) for ends in block), dtype)
        # Waited for, so that the host's copy can go before the next one is read.
        arrays += [jax.block_until_ready(jax.device_put(values, device)) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read(
    model: folder.StoredModel, path: str, index: tuple[slice, ...], dtype: np.dtype | None
) -> np.ndarray:
    """A block in the target dtype; a cast goes piece by piece, never with both copies whole."""
    if dtype is None or dtype == model.dtypes[path]:
        return model.read(path, index)
    out = np.empty(store.piece_shape(index), dtype)
    # Cut as it is stored, so that no chunk is read, and checked, twice.
    for cut in store.pieces(out.shape, model.dtypes[path].itemsize):
        where = tuple(
            slice(i.start + c.start, i.start + c.stop) for i, c in zip(index, cut, strict=True)
        )
        out[cut] = folder.cast(model.read(path, where), dtype, path)
    return out


def _default_device() -> Any:
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return device if isinstance(device, jax.Device) else jax.devices()[0]
