"""Weights in few bits as a converted folder stores them: parameter P is P/values and P/scale.

Values of 8 bits are int8. Values of 4 bits are two a byte, as `quantize.pack` says. conversion.json
states the recipe under `quantize`; nothing is told from names or sizes.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from echovlm_jax.convert.source import WEIGHT_DTYPES
from echovlm_jax.convert.table import quoted
from echovlm_jax.errors import InputError
from echovlm_jax.model import ParamSpec
from echovlm_jax.quantize import (
    GROUP,
    KINDS,
    Recipe,
    abstract,
    pack,
    quantize,
    recipe,
    recipe_of,
    unpack,
)
from echovlm_jax.storage import writer as store
from echovlm_jax.storage.arrays import AGAIN, Index, Take

VALUES, SCALE = "values", "scale"
EMBEDDING = "text/embed/embedding"  # whose dtype is a model's
_HELD = {8: "int8", 4: "two a byte, the first in its low half"}
# Rounded at one time: few enough to stay in a core's cache, and for memory to be used again.
_ROUNDED_BYTES = 4 * 2**20

# An array's shape, dtype and shape of a chunk.
Stored = tuple[tuple[int, ...], np.dtype, tuple[int, ...]]
# A chunk's array and place in it.
Part = tuple[str, tuple[int | slice, ...]]


@dataclass(frozen=True)
class FewBits:
    """In what form a folder stores its quantized parameters.

    Attributes:
      kind: the recipe's name when it was made.
      how: the recipe.
      dtype: name of the dtype that these parameters had.
    """

    kind: str
    how: Recipe
    dtype: str

    @classmethod
    def of(cls, kind: str, dtype: str) -> Self:
        return cls(kind, recipe(kind), dtype)

    @property
    def stated(self) -> dict[str, Any]:
        """As conversion.json has it."""
        how = self.how
        held = {"bits": how.bits, "group": how.group, "values": _HELD[how.bits]}
        held |= {"qkv_bits": 8, "table_bits": 8, "table_group": GROUP}
        if how.bits == 4:
            held |= {"o_bits": 8, "expert_bits": 8}
        return {"kind": self.kind, **held, "dtype": self.dtype}

    @property
    def identity(self) -> str:
        """What tells one recipe from another, however it is called."""
        stated = {key: value for key, value in self.stated.items() if key != "dtype"}
        return json.dumps(stated, sort_keys=True)

    def arrays(self, path: str, spec: ParamSpec) -> dict[str, Stored]:
        """What is stored of a parameter, by name. A chunk has whole inputs."""
        form, lead = abstract(spec, self.how), (1,) * spec.stacked
        values, scale, bits = form.values.shape, form.scale.shape, recipe_of(spec, self.how).bits
        if bits == 4:
            values = (*values[:-1], -(-values[-1] // 2))
        rows = _chunk_rows(values[spec.stacked :])
        held = np.dtype(np.int8 if bits == 8 else np.uint8)
        return {
            f"{path}/{VALUES}": (values, held, (*lead, rows, *values[spec.stacked + 1 :])),
            f"{path}/{SCALE}": (scale, np.dtype(np.float32), (*lead, *scale[spec.stacked :])),
        }

    def cuts(self, spec: ParamSpec) -> list[slice]:
        """The chunks of one place of the stacked axes: slices of the first output axis."""
        values, _, chunk = self.arrays("", spec)[f"/{VALUES}"]
        size, step = values[spec.stacked], chunk[spec.stacked]
        return [slice(start, min(start + step, size)) for start in range(0, size, step)]

    def parts(self, path: str, spec: ParamSpec, place: tuple[int, ...]) -> list[Part]:
        """The chunks of one place, in order: each one's array and where it is in that."""
        rows = [(f"{path}/{VALUES}", (*place, cut)) for cut in self.cuts(spec)]
        return [*rows, (f"{path}/{SCALE}", place)]


def _chunk_rows(part: Sequence[int]) -> int:
    return store.chunk_shape((part[0],), int(np.prod(part[1:], dtype=np.int64)))[0]


def check_kind(kind: str | None) -> None:
    """Raises InputError for a kind that isn't stored."""
    if kind is None or not (how := recipe(kind)).int8_products:
        return
    plain = replace(how, int8_products=False)
    stored = next(name for name, other in KINDS.items() if other == plain)
    raise InputError(
        f"quantize {kind!r} is stored as {stored}: convert with that, and load it with {kind}"
    )


def read(report: Mapping[str, Any], path: Path) -> FewBits | None:
    """The form that a report states; None where it states none.

    Raises:
      InputError: another than is known here: guessed at, weights would be misread.
    """
    if (said := report.get("quantize")) is None:
        return None
    try:
        found = FewBits(said["kind"], Recipe(said["bits"], said["group"]), said["dtype"])
        known = found.stated == said and _is_known(found)
    except (KeyError, TypeError):
        known = False
    if not known:
        raise InputError(
            f"{path}: quantize is {quoted(json.dumps(said))}, which this version can't read;"
            f" {AGAIN}"
        )
    return found


def _is_known(found: FewBits) -> bool:
    how = found.how
    grouped = type(how.group) is int and how.group > 0
    whole = type(how.bits) is int and (grouped or (how.group is None and how.bits == 8))
    return whole and isinstance(found.kind, str) and found.dtype in WEIGHT_DTYPES


def rounded(
    rows: np.ndarray, spec: ParamSpec, how: Recipe, *, packed: bool, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of some rows of the first output axis.

    Args:
      rows: [rows, *other outputs, *inputs] of one place of the stacked axes, of any float dtype.
      spec: of the parameter.
      how: the recipe.
      packed: values of 4 bits as they are stored; otherwise int8.
      name: the parameter's or tensor's, for errors.

    Raises:
      InputError: a value is not finite.
    """
    how = recipe_of(spec, how)
    outputs, inputs = spec.shape[spec.stacked + 1 : -spec.inputs], spec.shape[-spec.inputs :]
    # As a matrix: parameters of many shapes then share a compiled program.
    inner = inputs[:-1] if how.group else ()
    matrix = rows.reshape(-1, math.prod(inputs[len(inner) :]))
    step = max(1, _ROUNDED_BYTES // matrix[:1].nbytes)
    with jax.default_device(_host()):
        made = [
            _round(matrix[start : start + step], how, packed)
            for start in range(0, len(matrix), step)
        ]
        values = np.concatenate([np.asarray(one) for one, _ in made])
        scale = np.concatenate([np.asarray(one) for _, one in made], -1)
    if not np.isfinite(scale).all():
        raise InputError(f"{name} holds a value that is not finite; mend the checkpoint")
    # [groups?, rows, *outputs, *inner] → [*inner, groups?, rows, *outputs]
    scale = scale.reshape(*scale.shape[:-1], len(rows), *outputs, *inner)
    scale = np.moveaxis(scale, range(-len(inner), 0), range(len(inner)))
    last = (*inner, *values.shape[1:]) if how.group else inputs
    return values.reshape(len(rows), *outputs, *last), scale


@functools.partial(jax.jit, static_argnames=("how", "packed"))
def _round(matrix: Any, how: Recipe, packed: bool) -> Any:
    spec = ParamSpec(matrix.shape, matrix.dtype, jax.nn.initializers.zeros, ("", ""), inputs=1)
    made = quantize(matrix, spec, how)
    values = made.values.astype(jnp.int8)
    return (pack(values) if packed and how.bits == 4 else values), made.scale


def scale_axis(spec: ParamSpec, how: Recipe) -> int:
    """Where the scales of one place have the first output axis."""
    return spec.inputs if recipe_of(spec, how).group else 0


@functools.cache
def _host() -> Any:
    """Where weights are rounded: they come from the host, and only few bits go to a device."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # the environment allows an accelerator alone
        return jax.local_devices()[0]


def read_unpacked(
    read: Callable[[Sequence[Index], Take], object],
    size: int,
    indices: Sequence[Index],
    take: Take,
) -> None:
    """`Reader.read_blocks` of values of 4 bits: int4, in place of the bytes that are stored.

    Args:
      read: of the stored values.
      size: of the values' last axis.
      indices: blocks of the values.
      take: as there.
    """
    whole = [(*index[:-1], slice(0, -(-size // 2))) for index in indices]

    def spread(number: int, where: Index, packed: np.ndarray) -> None:
        last = indices[number][-1]
        inside = (*where[:-1], slice(0, last.stop - last.start))
        take(number, inside, unpack(packed)[..., last].view(jnp.int4))

    read(whole, spread)
