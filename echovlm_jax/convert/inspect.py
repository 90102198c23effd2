"""The parameters of a model folder, counted without reading weights."""

import math
import os
from typing import Any

from echovlm_jax.convert import folder, table


def inspect(model: str | os.PathLike[str]) -> dict[str, Any]:
    """Counts a model folder's parameters.

    Returns:
      params, bytes, dtype ("bfloat16", or "bfloat16+float32" where they are mixed) and by_module:
      parameters by module, e.g. {"text.layers.attn": 12, …}; they add up to params.

    Raises:
      InputError: no model there.
    """
    opened = folder.open_model(model)
    by_module: dict[str, int] = {}
    params = nbytes = 0
    for path, shape in table.leaf_shapes(opened.config).items():
        size = math.prod(shape)
        params += size
        nbytes += size * opened.dtypes[path].itemsize
        module = ".".join(path.split("/")[:-1][:3])
        by_module[module] = by_module.get(module, 0) + size
    return {
        "params": params,
        "bytes": nbytes,
        "dtype": "+".join(sorted({dtype.name for dtype in opened.dtypes.values()})),
        "by_module": by_module,
    }
