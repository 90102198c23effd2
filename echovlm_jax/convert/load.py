"""From a model folder to parameters on devices, a shard at a time."""

import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from echovlm_jax.config import ModelConfig
from echovlm_jax.convert import few_bits, folder, table
from echovlm_jax.convert.store import ahead
from echovlm_jax.errors import InputError
from echovlm_jax.model import ParamSpec, param_specs
from echovlm_jax.ops.product.weight import Quantized
from echovlm_jax.quantize import Recipe, abstract, placed, recipe, takes
from echovlm_jax.storage import writer as store
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
      quantize: a kind of `quantize.KINDS`, for what `quantize.takes` says, or with a tree of
        shardings for the parameters that are `Quantized` there. They are rounded on the host, which
        holds one of them at a time, and pieces of floats. By default as stored.

    Returns:
      The configuration and the nested dict of `jax.Array` (see `model.abstract_params`), and of
      `Quantized`.

    Raises:
      InputError: no model there, damaged data, or one that is quantized in another way.
    """
    named = isinstance(model, str | os.PathLike)
    opened = folder.open_model(model, quantized=True) if named else model
    target = folder.as_dtype(dtype)
    how = _how(opened, quantize)
    specs = param_specs(opened.config)
    if shardings is None or isinstance(shardings, Sharding):
        given = shardings or jax.sharding.SingleDeviceSharding(default_device())
        wanted = {path: _few(path, spec, how, given) for path, spec in specs.items()}
    else:
        wanted = table.flatten(shardings)
        if odd := sorted(wanted.keys() ^ specs.keys()):
            raise InputError(f"shardings: {odd[0]} is not in both the shardings and the model")

    def load(path: str, spec: ParamSpec) -> Any:
        where = wanted[path]
        if not isinstance(where, Quantized):
            return _load(opened, path, spec.shape, target, where)
        assert how is not None
        read = _read_few if opened.few_bits else _round
        return read(opened, path, spec, how, where)

    return opened.config, table.unflatten({path: load(path, spec) for path, spec in specs.items()})


def _how(model: folder.StoredModel, kind: str | None) -> Recipe | None:
    """The recipe of the parameters to be."""
    asked, there = kind and recipe(kind), model.few_bits
    if there is None or not asked:
        return asked or (there.how if there else None)
    if (asked.bits, asked.group) != (there.how.bits, there.how.group):
        raise InputError(
            f"{model.folder}: is quantized as {there.kind}, and quantize {kind!r} is asked for; leave"
            " that out, or give the checkpoint that it was converted from"
        )
    return asked


def _few(path: str, spec: ParamSpec, how: Recipe | None, sharding: Sharding) -> Any:
    """The sharding of a parameter, or of its values and scale where it is quantized."""
    if how is None or not takes(path, spec):
        return sharding
    form = abstract(spec, how)
    if isinstance(sharding, NamedSharding):
        return placed(form, sharding)
    return replace(form, values=sharding, scale=sharding)


def _load(
    model: folder.StoredModel,
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype | None,
    sharding: Sharding,
) -> jax.Array:
    target = dtype or model.dtypes[path]

    def read(indices: Sequence[Index], take: Take) -> None:
        def cast(number: int, where: Index, values: np.ndarray) -> None:
            take(number, where, folder.cast(values, target, path))

        model.read_blocks(path, indices, cast)

    return to_devices(read, shape, target, sharding)
