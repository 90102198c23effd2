"""Blocks of a quantized weight that lies in a file, as floats on the host."""

from collections.abc import Callable

import numpy as np

from echovlm_jax.ops.product.weight import Quantized

Index = tuple[slice, ...]


def read_block(
    form: Quantized, index: Index, read: Callable[[str, Index], np.ndarray]
) -> np.ndarray:
    """One block of the weight in float32.

    Args:
      form: of `abstract`.
      index: a slice with start and stop for each axis of the weight.
      read: one block of "values" or of "scale".
    """
    made = form.stacked + form.outputs
    if not form.grouped:
        scale = read("scale", index[:made])
        scale = scale.reshape(*scale.shape, *(1,) * form.inputs)
        return read("values", index).astype(np.float32) * scale
    *lead, last = index
    size = form.values.shape[-1]
    groups = slice(last.start // size, -(-last.stop // size))
    values = read("values", (*lead, groups, slice(0, size))).astype(np.float32)
    outputs = index[form.stacked : made]
    scale = read("scale", (*index[: form.stacked], *lead[made:], groups, *outputs))
    # [*stacked, *groups, *outputs] → [*stacked, *outputs, *groups]
    scale = np.moveaxis(scale, range(-form.outputs, 0), range(form.stacked, made))
    wide = (values * scale[..., None]).reshape(*values.shape[:-2], -1)
    first = last.start - groups.start * size
    return wide[..., first : first + last.stop - last.start]
