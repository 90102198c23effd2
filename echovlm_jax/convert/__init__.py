"""Between PyTorch checkpoints and ours, bit for bit.

`table` names every tensor; `source` and `safetensors` read a checkpoint, `store` reads and writes
ours; `from_torch`, `to_torch`, `inspect` and `load` are what the commands call.
"""

from echovlm_jax.convert.from_torch import convert
from echovlm_jax.convert.inspect import inspect
from echovlm_jax.convert.load import load_params
from echovlm_jax.convert.to_torch import export

__all__ = ["convert", "export", "inspect", "load_params"]
