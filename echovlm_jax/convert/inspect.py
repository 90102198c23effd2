"""The parameters of a model folder, counted without reading weights."""

import math
import os
from collections import Counter
from typing import Any

from echovlm_jax.convert import folder
from echovlm_jax.model import param_specs
from echovlm_jax.quantize import takes


def inspect(model: str | os.PathLike[str]) -> dict[str, Any]:
    """Counts a model folder's parameters.

    Returns:
      params, bytes, dtype ("bfloat16", or "bfloat16+float32" where they are mixed), by_module:
      parameters by module, e.g. {"text.layers.attn": 12, …}, which add up to params, and
      bytes_by_module; of a quantized model, quantized {kind: bytes} and quantize, the recipe.

    Raises:
      InputError: no model there.
    """
    opened = folder.open_model(model, quantized=True)
    form = opened.quantized
    params, nbytes, kinds = Counter[str](), Counter[str](), Counter[str]()
    for path, spec in param_specs(opened.config).items():
        module = ".".join(path.split("/")[:-1][:3])
        arrays, kind = {path: (spec.shape, opened.dtypes[path], ())}, opened.dtypes[path].name
        if form and takes(path, spec):
            arrays, kind = form.arrays(path, spec), form.kind
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in arrays.values())
        params[module] += math.prod(spec.shape)
        nbytes[module] += size
        kinds[kind] += size
    return {
        "params": params.total(),
        "bytes": nbytes.total(),
        "dtype": "+".join(sorted(kinds)),
        "by_module": dict(params),
        "bytes_by_module": dict(nbytes),
        **({"quantized": {form.kind: kinds[form.kind]}, "quantize": form.stated} if form else {}),
    }
