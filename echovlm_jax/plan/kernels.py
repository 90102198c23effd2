"""FLOPs of the kernels that a compiled program calls and that its HLO does not show."""

import math
import re

from echovlm_jax.plan.hlo import CustomCall
from echovlm_jax.plan.hlo_text import Shape

# Products of a block of scores' size that splash attention's kernels make: q·k and weights·v going
# forward; going back q·k again, and what each gradient needs.
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}
_BLOCK = 512  # ops/splash.py's blocks of scores: those without a common segment are skipped
# The same of JAX's kernel for NVIDIA's cards, which skips nothing but a causal half. Going back it
# walks twice over the scores: k and v take q·k, v·gradient and two more, q those two and one.
_MHA = {"forward": 2, "backward": 7}


def kernel_flops(call: CustomCall, frame_patches: int) -> float:
    """FLOPs of all runs of one kernel on one device.

    What its author declared, else attention's by its shapes: causal attention half of the square;
    the vision tower's the blocks that its frames touch, or that its windows have steps for.

    Args:
      call: from `hlo.read`.
      frame_patches: patches of a frame, at most.
    """
    if call.flops:
        return call.flops * call.count
    if mha := re.search(r"/mha_(forward|backward)/", call.op_name):
        batch, length, heads, dim = call.operands[0].dims
        seen = length if "/vision/" in call.op_name else length / 2
        return _MHA[mha[1]] * 2.0 * batch * heads * length * dim * seen * call.count
    # A kernel in a loop over rows has no name of its own, but its place in the program names it.
    kind = re.search(r"splash_mha_(fwd|dq|dkv)", f"{call.name} {call.op_name}")
    if kind is None:
        return 0.0
    # Queries come first, after the small tables of which blocks to visit: [heads, length, width],
    # or with the last two exchanged, and a row of the batch first where there are several.
    queries = max((shape for shape in call.operands if len(shape.dims) >= 3), key=_size)
    length = max(queries.dims[-2:])
    products = _SPLASH[kind[1]]
    if kind[1] == "dkv" and not _has_dq_kernel(call):
        products += 1
    # The table's sizes: blocks of one side, and how many of the other each has steps for.
    table = call.operands[0].dims[-2:]
    keys = length / 2
    if "/vision/" in call.op_name:
        steps = length * min(table) / max(table)
        keys = min(steps, frame_patches + 2 * _BLOCK)
    return products * 2.0 * _size(queries) * keys * call.count


def _size(shape: Shape) -> int:
    return math.prod(shape.dims)


def _has_dq_kernel(call: CustomCall) -> bool:
    """Whether the queries' gradient is another kernel's: else this one returns parts of it."""
    return not any(len(shape.dims) >= 4 and shape.dims[0] > 1 for shape in call.results)
