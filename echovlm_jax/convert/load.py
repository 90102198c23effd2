"""From a model folder to parameters on devices, a shard at a time."""

import functools
import math
import os
from collections.abc import Sequence
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
from echovlm_jax.storage.arrays import Index, Take, default_sharding, to_devices


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
      quantize: a kind of `quantize.KINDS`, for what `quantize.takes` says; where some are
        `Quantized` in the tree of shardings, for those. They are rounded on the host, which holds
        one of them at a time, and pieces of floats. By default as stored.

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
        given = shardings or default_sharding()
        wanted = {path: _few(path, spec, how, given) for path, spec in specs.items()}
    else:
        wanted = table.flatten(shardings)
        if odd := sorted(wanted.keys() ^ specs.keys()):
            raise InputError(f"shardings: {odd[0]} is not in both the shardings and the model")
        if not any(isinstance(leaf, Quantized) for leaf in wanted.values()):
            wanted = {path: _few(path, spec, how, wanted[path]) for path, spec in specs.items()}

    def load(path: str, spec: ParamSpec) -> Any:
        where = wanted[path]
        if isinstance(where, Quantized):
            assert how is not None
            read = _read_few if opened.quantized else _round
            return read(opened, path, spec, how, where)
        if opened.quantized and takes(path, spec):
            raise InputError(
                f"{opened.folder}: {path} is quantized, and asked for in full; give the checkpoint"
                " that it was converted from"
            )
        return _load(opened, path, spec.shape, target, where)

    return opened.config, table.unflatten({path: load(path, spec) for path, spec in specs.items()})


def _how(model: folder.StoredModel, kind: str | None) -> Recipe | None:
    """The recipe of the parameters to be."""
    asked, there = kind and recipe(kind), model.quantized
    if there is None or not asked:
        return asked or (there.how if there else None)
    if (asked.bits, asked.group) != (there.how.bits, there.how.group):
        raise InputError(
            f"{model.folder}: is quantized as {there.kind}, and quantize {kind!r} is asked for;"
            " leave that out, or give the checkpoint that it was converted from"
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


def _read_few(
    model: folder.StoredModel, path: str, spec: ParamSpec, how: Recipe, where: Quantized
) -> Quantized:
    """A parameter that is stored quantized."""
    form = abstract(spec, how)
    values = functools.partial(model.read_blocks, f"{path}/{few_bits.VALUES}")
    if form.values.dtype == jnp.int4:
        values = functools.partial(few_bits.read_unpacked, values, form.values.shape[-1])
    scale = functools.partial(model.read_blocks, f"{path}/{few_bits.SCALE}")

    def load(read: Any, like: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
        return to_devices(read, like.shape, np.dtype(like.dtype), sharding)

    return replace(
        form,
        values=load(values, form.values, where.values),
        scale=load(scale, form.scale, where.scale),
    )


def _round(
    model: folder.StoredModel, path: str, spec: ParamSpec, how: Recipe, where: Quantized
) -> Quantized:
    """A parameter quantized while it is read: some rows of its outputs at a time, the next ones
    being read meanwhile."""
    form, axis = abstract(spec, how), few_bits.scale_axis(spec, how)
    values = np.empty(form.values.shape, np.int8)
    scale = np.empty(form.scale.shape, np.float32)
    blocks = _blocks(spec, model.dtypes[path].itemsize, where.values, values.shape)

    def read(block: tuple[tuple[int, ...], slice]) -> np.ndarray:
        place, rows = block
        rest = (slice(0, size) for size in spec.shape[spec.stacked + 1 :])
        found = model.read(path, (*(slice(i, i + 1) for i in place), rows, *rest))
        return found.reshape(found.shape[spec.stacked :])

    with ThreadPoolExecutor(1) as pool:
        for (place, rows), floats in zip(blocks, ahead(pool, read, blocks, 1), strict=True):
            made = few_bits.rounded(floats, spec, how, packed=False, name=path)
            values[(*place, rows)] = made[0]
            scale[(*place, *(slice(None),) * axis, rows)] = made[1]
    few = values.view(form.values.dtype)
    return replace(form, values=_put(few, where.values), scale=_put(scale, where.scale))


def _blocks(
    spec: ParamSpec, itemsize: int, sharding: Sharding, shape: tuple[int, ...]
) -> list[tuple[tuple[int, ...], slice]]:
    """Places of the stacked axes, and rows of the first output axis: those that this process needs
    for its shards of the values."""
    lead, part = spec.shape[: spec.stacked], spec.shape[spec.stacked :]
    row_bytes = math.prod(part[1:]) * itemsize
    [step] = store.chunk_shape(part[:1], row_bytes)
    cuts = [slice(start, min(start + step, part[0])) for start in range(0, part[0], step)]
    mine = {
        tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))
        for index in sharding.addressable_devices_indices_map(shape).values()
        if index is not None
    }

    def needed(block: Sequence[tuple[int, int]]) -> bool:
        return any(
            all(a < d and c < b for (a, b), (c, d) in zip(block, one, strict=False)) for one in mine
        )

    return [
        (place, cut)
        for place in np.ndindex(lead)
        for cut in cuts
        if needed([*((i, i + 1) for i in place), (cut.start, cut.stop)])
    ]


def _put(values: np.ndarray, sharding: Sharding) -> jax.Array:
    made = jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
    return jax.block_until_ready(made)  # so that the host's copy can go
