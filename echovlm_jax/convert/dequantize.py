"""Weights out of the tensors that quantizing programs store in their place.

A layout is a function from a `Module`, the stored tensors of one, to a `Weight`, which says what it
is made of and computes rows of it. The numbers are those of the program's own dequantization, bit
for bit: a code less its zero point is a small integer, and its product with the scale is rounded
once, to the scale's dtype; in float32 it is exact before that, so it doesn't matter whether a
program multiplies in float32 or in half precision.

Where a layout is described: AWQ and GPTQ in gptqmodel/nn_modules/qlinear (earlier AutoAWQ and
AutoGPTQ), compressed-tensors in compressed_tensors/compressors, bitsandbytes in
bitsandbytes/functional.py (`QuantState`) and nn/modules.py (`Linear8bitLt`).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from echovlm_jax.convert.source import WEIGHT_DTYPES, Tensor
from echovlm_jax.convert.table import quoted
from echovlm_jax.errors import InputError

Parts = Mapping[str, np.ndarray]
_INT32, _MANY = ("int32",), 10**9
_DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in WEIGHT_DTYPES}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of a word's eight that each nibble is of
_ROWS = 32  # computed at a time: what is between stays in the processor's cache
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_MAX_STATE_BYTES = 10_000
# What bitsandbytes' kernels have built in: NormalFloat (https://arxiv.org/abs/2305.14314, appendix
# E) and its own 4-bit float.
_TABLES = {
    "nf4": np.array([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ], np.float32),
    "fp4": np.array([
        0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3,
    ], np.float32) / np.float32(12),
}  # fmt: skip


@dataclass(frozen=True)
class Module:
    """The stored tensors of one quantized module.

    Attributes:
      where: the checkpoint, for errors.
      name: the module's, as "model.layers.0.mlp.up_proj".
      tensors: by the rest of their names, as "qweight".
    """

    where: Path
    name: str
    tensors: Mapping[str, Tensor]

    def need(
        self, part: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...] | None = None
    ) -> Tensor:
        """A tensor of the module. Raises InputError where it is missing, of another dtype or shape;
        None in a shape is any size."""
        if (found := self.tensors.get(part)) is None:
            raise self.fault(part, f"is missing beside {', '.join(sorted(self.tensors))}")
        if found.dtype.name not in dtypes:
            raise self.fault(part, f"is {found.dtype.name}, expected {' or '.join(dtypes)}")
        if shape is not None and (
            len(shape) != len(found.shape)
            or any(n is not None and n != m for n, m in zip(shape, found.shape, strict=True))
        ):
            wanted = [n if n is not None else "any" for n in shape]
            raise self.fault(part, f"has shape {list(found.shape)}, expected {wanted}")
        return found

    def fault(self, part: str, what: str) -> InputError:
        return InputError(
            f"{self.where}: {quoted(f'{self.name}.{part}')} {what}; fetch the checkpoint again, or"
            " give the one that it was quantized from"
        )


@dataclass(frozen=True)
class Weight:
    """A weight that stored tensors make.

    Attributes:
      shape: [outputs, inputs].
      dtype: of its values.
      parts: the tensors of the module that it is made of.
      rows: gives its rows [first, last) out of the parts' values.
    """

    shape: tuple[int, int]
    dtype: np.dtype
    parts: tuple[str, ...]
    rows: Callable[[Parts, int, int], np.ndarray]


def codes(words: np.ndarray, bits: int, order: Sequence[int] | None = None) -> np.ndarray:
    """Unsigned integers of `bits` that lie densely in 32-bit words [n, w], the lowest bits first:
    uint8 [n, w · 32 // bits]. An integer may go on from one word into the next.

    Args:
      order: the place that each integer of a word belongs to; by default as they lie.
    """
    unit = bits // math.gcd(bits, 32)  # words until an integer ends where a word does
    lanes = words.view(np.uint32).reshape(len(words), -1, unit)
    out = np.empty((*lanes.shape[:2], 32 * unit // bits), np.uint8)
    for n, place in enumerate(order or range(out.shape[2])):
        word, shift = divmod(n * bits, 32)
        found = lanes[..., word] >> shift
        if shift + bits > 32:
            found |= lanes[..., word + 1] << (32 - shift)
        out[..., place] = found & (2**bits - 1)
    return out.reshape(len(words), -1)


def _scaled(
    codes: np.ndarray, zeros: np.ndarray | int, scales: np.ndarray, group: np.ndarray
) -> np.ndarray:
    """(code − zero point) · scale, in the scales' dtype.

    Args:
      codes: integers [rows, inputs].
      zeros, scales: [rows, groups]; one integer for all.
      group: each input's [inputs].
    """
    out = np.empty(codes.shape, scales.dtype)
    for start in range(0, len(codes), _ROWS):
        rows = slice(start, start + _ROWS)
        values = codes[rows].astype(np.float32)
        if isinstance(zeros, int):
            values -= zeros
        else:
            values -= np.take(zeros[rows].astype(np.float32), group, axis=1)
        with np.errstate(over="ignore", invalid="ignore"):  # the program's own infinities
            values *= np.take(scales[rows].astype(np.float32), group, axis=1)
            out[rows] = values
    return out


def awq(module: Module, told: Mapping[str, Any]) -> Weight:
    """qweight [in, out / 8] and qzeros [groups, out / 8], eight nibbles a word, and scales
    [groups, out]."""
    inputs, words = module.need("qweight", _INT32, (None, None)).shape
    size = inputs if told["group_size"] == -1 else told["group_size"]
    if not inputs or inputs % size:
        raise module.fault("qweight", f"has {inputs} inputs, not a multiple of group_size {size}")
    groups = inputs // size
    module.need("qzeros", _INT32, (groups, words))
    dtype = module.need("scales", WEIGHT_DTYPES, (groups, 8 * words)).dtype
    group = np.arange(inputs) // size

    def rows(parts: Parts, first: int, last: int) -> np.ndarray:
        start, stop = first // 8, -(-last // 8)
        mine = slice(first - 8 * start, last - 8 * start)
        values, zeros = (
            codes(np.ascontiguousarray(parts[part][:, start:stop]), 4, _AWQ_ORDER)[:, mine]
            for part in ("qweight", "qzeros")
        )
        scales = parts["scales"][:, first:last]
        return _scaled(np.ascontiguousarray(values.T), zeros.T, scales.T, group)

    return Weight((8 * words, inputs), dtype, ("qweight", "qzeros", "scales"), rows)


def gptq(module: Module, told: Mapping[str, Any]) -> Weight:
    """qweight [in · bits / 32, out], packed along inputs; qzeros [groups, out · bits / 32], packed
    along outputs; scales [groups, out]; g_idx [in], the group of each input.

    In the form "gptq" a zero point is stored less one, in "gptq_v2" as it is."""
    bits, form = told["bits"], str(told.get("checkpoint_format") or told.get("format") or "gptq")
    packed, outputs = module.need("qweight", _INT32, (None, None)).shape
    inputs = packed * 32 // bits
    size = inputs if told["group_size"] == -1 else told["group_size"]
    if packed * 32 % bits or outputs * bits % 32 or not packed:
        raise module.fault("qweight", f"has a shape that does not hold integers of {bits} bits")
    groups = -(-inputs // size)
    module.need("qzeros", _INT32, (groups, outputs * bits // 32))
    scales = module.need("scales", WEIGHT_DTYPES, (groups, outputs))
    names = ["qweight", "qzeros", "scales"]
    if "g_idx" in module.tensors:
        module.need("g_idx", _INT32, (inputs,))
        names.append("g_idx")
    elif told.get("desc_act") is not False:
        raise module.fault("g_idx", "is missing, and desc_act is not false")

    def rows(parts: Parts, first: int, last: int) -> np.ndarray:
        zeros = codes(parts["qzeros"], bits)[:, first:last]
        if form.lower() == "gptq":
            if (zeros == 2**bits - 1).any():
                # One program takes it for 0, another for 2**bits, a third carries into the next.
                raise module.fault("qzeros", 'holds the zero point -1, unclear in the form "gptq"')
            zeros = zeros + 1
        group = parts.get("g_idx", np.arange(inputs) // size)
        if group.min() < 0 or group.max() >= groups:
            raise module.fault("g_idx", f"has a group outside 0 to {groups - 1}")
        values = codes(np.ascontiguousarray(parts["qweight"][:, first:last].T), bits)
        return _scaled(values, zeros.T, parts["scales"][:, first:last].T, group)

    return Weight((outputs, inputs), scales.dtype, tuple(names), rows)


def compressed_tensors(module: Module, told: Mapping[str, Any]) -> Weight:
    """weight_packed [out, in · bits / 32] with weight_shape [2], or weight [out, in] in int8;
    weight_scale [out, groups]; where it isn't symmetric weight_zero_point, packed along outputs or
    int8 as the weight is. A packed integer is stored with 2**(bits − 1) added.

    Args:
      told: what all of the config_groups say of weights.
    """
    bits, symmetric, strategy = told["num_bits"], told["symmetric"], told["strategy"]
    packed = "weight_packed" in module.tensors
    names = ["weight_packed", "weight_scale"] if packed else ["weight", "weight_scale"]
    if packed:
        shape = module.need("weight_shape", ("int64", *_INT32), (2,)).read(0, 2)
        outputs, inputs = (int(n) for n in shape)
        if not (0 < outputs < _MANY and 0 < inputs < _MANY):
            raise module.fault("weight_shape", f"says {outputs} x {inputs}")
        module.need("weight_packed", _INT32, (outputs, -(-inputs * bits // 32)))
        names.append("weight_shape")
    else:
        outputs, inputs = module.need("weight", ("int8",), (None, None)).shape
    size = told["group_size"] if strategy == "group" else inputs
    if not inputs or inputs % size:
        part = "weight_shape" if packed else "weight"
        raise module.fault(part, f"has {inputs} inputs, not a multiple of group_size {size}")
    groups = inputs // size
    one = module.tensors.get("weight_scale")
    shape = one.shape if strategy == "tensor" and one and one.shape in ((), (1,)) else (1, 1)
    shape = shape if strategy == "tensor" else (outputs, groups)
    scale = module.need("weight_scale", WEIGHT_DTYPES, shape)
    if "weight_zero_point" in module.tensors:
        kind = module.need("weight_zero_point", ("int8", *_INT32)).dtype.name
        if packed and kind == "int32":
            shape = (-(-outputs * bits // 32), groups)
        module.need("weight_zero_point", ("int8", *_INT32[:packed]), shape)
        names.append("weight_zero_point")
    elif not symmetric:
        raise module.fault("weight_zero_point", "is missing, and symmetric is false")
    if "weight_g_idx" in module.tensors:
        module.need("weight_g_idx", _INT32, (inputs,))
        names.append("weight_g_idx")
    elif told.get("actorder") in ("group", "dynamic"):
        raise module.fault("weight_g_idx", f"is missing, and actorder is {told['actorder']}")

    def rows(parts: Parts, first: int, last: int) -> np.ndarray:
        half = 2 ** (bits - 1)
        group = parts.get("weight_g_idx", np.arange(inputs) // size)
        if (group == -1).any():  # the program's way to say that there is no order
            group = np.arange(inputs) // size
        if group.min() < 0 or group.max() >= groups:
            raise module.fault("weight_g_idx", f"has a group outside 0 to {groups - 1}")
        if packed:
            values = codes(parts["weight_packed"][first:last], bits)[:, :inputs].astype(np.int16)
            values -= half
        else:
            values = parts["weight"][first:last]
        zeros: np.ndarray | int = 0
        if (stored := parts.get("weight_zero_point")) is not None:
            if stored.dtype == np.int32:
                unpacked = codes(np.ascontiguousarray(stored.T), bits)[:, :outputs].T
                stored = unpacked.astype(np.int16) - half
            stored = stored.reshape(-1, groups)
            zeros = np.broadcast_to(stored, (outputs, groups))[first:last]
        scales = parts["weight_scale"].reshape(-1, groups)
        scales = np.broadcast_to(scales, (outputs, groups))[first:last]
        return _scaled(values, zeros, scales, group)

    return Weight((outputs, inputs), scale.dtype, tuple(names), rows)


def bitsandbytes_4bit(module: Module, told: Mapping[str, Any]) -> Weight:
    """weight, nibbles of the flat values, the higher one first; weight.absmax, the largest of each
    block; weight.quant_state.bitsandbytes__*, a JSON text with sizes. With double quantization
    absmax is uint8 itself: an index into weight.nested_quant_map, times weight.nested_absmax of its
    block, plus nested_offset.
    """
    keys = [part for part in module.tensors if part.startswith("weight.quant_state.")]
    key = keys[0] if len(keys) == 1 else "weight.quant_state.bitsandbytes__nf4"
    state = _state(module, key)
    shape, kind, block = state["shape"], state["quant_type"], state["blocksize"]
    count, blocks = math.prod(shape), -(-math.prod(shape) // block)
    stored = module.need("weight", ("uint8", "bfloat16", "float16", "float32"))
    if math.prod(stored.shape) * stored.dtype.itemsize != -(-count // 2):
        raise module.fault(
            "weight", f"does not hold {shape[0]} x {shape[1]} nibbles, as {key} says"
        )
    module.need("weight.quant_map", ("float32",), (16,))
    nested, names = state["nested_blocksize"], ["weight", key, "weight.absmax", "weight.quant_map"]
    if nested:
        module.need("weight.absmax", ("uint8",), (blocks,))
        module.need("weight.nested_absmax", ("float32",), (-(-blocks // nested),))
        module.need("weight.nested_quant_map", ("float32",), (256,))
        names += ["weight.nested_absmax", "weight.nested_quant_map"]
    else:
        module.need("weight.absmax", ("float32",), (blocks,))

    def rows(parts: Parts, first: int, last: int) -> np.ndarray:
        if not np.allclose(parts["weight.quant_map"], _TABLES[kind], atol=1e-4):
            raise module.fault("weight.quant_map", f"is not the table of {kind}")
        start, stop = first * shape[1], last * shape[1]
        flat = parts["weight"].view(np.uint8).reshape(-1)[start // 2 : -(-stop // 2)]
        values = _TABLES[kind][np.stack([flat >> 4, flat & 15], axis=1).reshape(-1)]
        values = values[start % 2 :][: stop - start]
        low = start // block
        largest = parts["weight.absmax"][low : -(-stop // block)]
        if nested:
            at = np.arange(low, low + len(largest)) // nested
            largest = parts["weight.nested_quant_map"][largest] * parts["weight.nested_absmax"][at]
            largest = largest + np.float32(state["nested_offset"])
        values *= np.repeat(largest, block)[start - low * block :][: stop - start]
        return values.astype(state["dtype"]).reshape(last - first, shape[1])

    return Weight((shape[0], shape[1]), state["dtype"], tuple(names), rows)


def _state(module: Module, key: str) -> dict[str, Any]:
    """bitsandbytes' sizes, checked; nested_blocksize is 0 without double quantization."""
    tensor = module.need(key, ("uint8",), (None,))
    if tensor.shape[0] > _MAX_STATE_BYTES:
        raise module.fault(key, "is too long")
    try:
        found = json.loads(tensor.read(0, tensor.shape[0]).tobytes().decode("utf-8"))
        shape, nested = tuple(found["shape"]), "weight.nested_absmax" in module.tensors
        state = {
            "shape": shape,
            "quant_type": found["quant_type"],
            "blocksize": found["blocksize"],
            "dtype": _DTYPES[found["dtype"]],
            "nested_blocksize": found["nested_blocksize"] if nested else 0,
            "nested_offset": float(found["nested_offset"]) if nested else 0.0,
        }
        sizes = (state["blocksize"], *([state["nested_blocksize"]] if nested else []))
        whole = all(type(n) is int and 0 < n < _MANY for n in shape) and len(shape) == 2
        sized = all(type(n) is int and n in _BLOCK_SIZES for n in sizes)
        if whole and sized and state["quant_type"] in _TABLES:
            return state
    except (KeyError, TypeError, ValueError, RecursionError):
        pass
    raise module.fault(key, "is not a state of nf4 or fp4 with shape, dtype and blocksize")


def bitsandbytes_8bit(module: Module, told: Mapping[str, Any]) -> Weight:
    """weight [out, in] in int8 and SCB [out], the largest of each row: weight · SCB / 127 in
    float32, rounded to config.json's dtype, if it says one."""
    outputs, inputs = module.need("weight", ("int8",), (None, None)).shape
    module.need("SCB", ("float32",), (outputs,))
    names = ["weight", "SCB"]
    if "weight_format" in module.tensors:
        tensor = module.need("weight_format", ("uint8",), ())
        names.append("weight_format")
        if tensor.read(0, 1)[0]:
            raise module.fault("weight_format", "says that rows are not stored as they are")
    dtype = told["dtype"] or np.dtype(np.float32)

    def rows(parts: Parts, first: int, last: int) -> np.ndarray:
        values = parts["weight"][first:last] * parts["SCB"][first:last, None]
        return (values * np.float32(7.874015718698502e-3)).astype(dtype)

    return Weight((outputs, inputs), dtype, tuple(names), rows)


def as_tensor(module: Module, weight: Weight, stored: Callable[[str], Parts]) -> Tensor:
    """A weight as one tensor of the checkpoint, computed when it is read; it lies where the first
    of its parts does. `stored` gives the values of a module's parts, by its name."""

    def read(start: int, stop: int) -> np.ndarray:
        width = weight.shape[1]
        first, last = start // width, -(-stop // width)
        values = weight.rows(stored(module.name), first, last).reshape(-1)
        return values[start - first * width : stop - first * width]

    order = module.tensors[weight.parts[0]].order
    return Tensor(weight.shape, weight.dtype, order, read)
