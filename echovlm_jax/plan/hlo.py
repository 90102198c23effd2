"""What a compiled program does on one device: read from the text of its HLO module.

`read(compiled.as_text())` counts matmul FLOPs, bytes that collectives move, bytes that go through
the device's memory, kernels that the compiler can't see into, and the largest arrays. Everything is
per device and per run of the program. The body of a loop counts as often as the loop turns, which
XLA's own cost analysis leaves out (it counts a body once).
"""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from echovlm_jax.plan.hlo_collectives import Collective, collective
from echovlm_jax.plan.hlo_loops import Branches, Loop, count_runs
from echovlm_jax.plan.hlo_memory import SCHEDULING, arrays_made, traffic
from echovlm_jax.plan.hlo_text import Computation, Instruction, Shape, Text, parse


class Matmul(NamedTuple):
    """A dot or a convolution: the FLOPs of one run, and how often it runs."""

    op_name: str
    flops: float
    count: float


class CustomCall(NamedTuple):
    """A call of something that isn't HLO, such as a Mosaic kernel.

    `flops` is what the kernel's author declared (its cost estimate), 0 where he declared nothing.
    It is not in the module's `matmul_flops`.
    """

    target: str
    name: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    flops: float
    op_name: str
    count: float


class Buffer(NamedTuple):
    """An array in main memory and the instruction that makes it; `count` of them are alike."""

    shape: Shape
    opcode: str
    op_name: str
    count: int


class Transfer(NamedTuple):
    """Instructions alike that move something between main memory and the chip, `count` runs in all.

    Bytes are those of one run; `shape` is the largest operand's.
    """

    op_name: str
    opcode: str
    shape: str
    read: float
    written: float
    count: float


class Module(NamedTuple):
    """What `read` returns.

    `hbm_bytes`, and `hbm_read`, the part that is read, are an estimate: operands and results,
    filled up to whole tiles, of every instruction outside fusions, where they lie in main memory.
    Reading a slice and updating one in place count as the slice. What the compiler keeps on chip
    counts where it is copied in and out; what a kernel reads twice counts once; each branch of a
    conditional counts, unless `branches` says how often.
    """

    devices: int
    matmuls: tuple[Matmul, ...]
    collectives: tuple[Collective, ...]
    custom_calls: tuple[CustomCall, ...]
    loops: tuple[Loop, ...]
    buffers: tuple[Buffer, ...]  # the largest, largest first
    transfers: tuple[Transfer, ...]  # those that read most, over all runs, first
    hbm_bytes: float
    hbm_read: float

    @property
    def matmul_flops(self) -> float:
        """Two for every multiply-add of dots and convolutions."""
        return sum(matmul.flops * matmul.count for matmul in self.matmuls)

    @property
    def collective_bytes(self) -> dict[str, float]:
        """What one device receives, by kind of collective."""
        total: dict[str, float] = defaultdict(float)
        for one in self.collectives:
            total[one.kind] += one.wire_bytes * one.count
        return dict(total)

    @property
    def collective_dtypes(self) -> dict[str, dict[str, float]]:
        """`collective_bytes` of each kind by the dtype of what travels, as HLO names it."""
        total: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for one in self.collectives:
            whole = sum(shape.bytes for shape in one.operands) or 1.0
            for shape in one.operands:
                part = one.wire_bytes * shape.bytes / whole
                total[one.kind][shape.dtype] += part * one.count
        return {kind: dict(dtypes) for kind, dtypes in total.items()}

    @property
    def network_bytes(self) -> float:
        """What one device receives from other granules."""
        return sum(c.network_bytes * c.count for c in self.collectives)

    @property
    def unknown_loops(self) -> tuple[str, ...]:
        """Loops whose turns can't be read; their bodies counted once."""
        return tuple(loop.name for loop in self.loops if loop.trips is None)


def read(
    text: str | Text,
    *,
    buffers: int = 20,
    granules: Sequence[int] = (),
    branches: Branches | None = None,
) -> Module:
    """Reads a compiled module.

    Args:
      text: `compiled.as_text()`, of CPU, TPU or GPU; or that, parsed.
      buffers: how many of the largest arrays, and of the largest transfers, to return.
      granules: the slice or host of each device, in the mesh's order; empty: all are in one.
      branches: see `hlo_loops.count_runs`.

    Raises:
      ValueError: the text has no ENTRY computation.
    """
    module = parse(text) if isinstance(text, str) else text
    runs = count_runs(module, branches or {})
    matmuls, collectives, calls = [], [], []
    made: Counter[tuple[Shape, str, str]] = Counter()
    moves: dict[tuple[str, str, str, float, float], float] = defaultdict(float)
    for name, count in runs.counts.items():
        here = module.computations[name]
        for i in here.body.values():
            if flops := matmul_flops(i, here):
                matmuls.append(Matmul(i.op_name, flops, count))
            elif found := collective(i, here, module.devices, runs.fused, granules):
                collectives.append(found._replace(count=count))
            elif call := custom_call(i, here):
                calls.append(call._replace(count=count))
        if name not in runs.fused:
            for i in here.body.values():
                moved = traffic(i, here, module)
                if moved.read or moved.written:
                    moves[i.op_name, i.opcode, _largest(i, here), *moved] += count
            made.update(arrays_made(here, is_entry=name == module.entry))
    largest = sorted(made.items(), key=lambda item: -item[0][0].padded_bytes)[:buffers]
    transfers = [Transfer(*key, count) for key, count in moves.items()]
    return Module(
        devices=module.devices,
        matmuls=tuple(matmuls),
        collectives=tuple(collectives),
        custom_calls=tuple(calls),
        loops=runs.loops,
        buffers=tuple(Buffer(*key, count) for key, count in largest),
        transfers=tuple(sorted(transfers, key=lambda t: -t.read * t.count)[:buffers]),
        hbm_bytes=sum((t.read + t.written) * t.count for t in transfers),
        hbm_read=sum(t.read * t.count for t in transfers),
    )


def _largest(i: Instruction, here: Computation) -> str:
    """The largest array that an instruction takes, or makes where it takes none."""
    taken = [shape for name in i.operands for shape in here.body[name].shapes]
    return str(max(taken or i.shapes, key=lambda shape: shape.bytes))


# --- FLOPs ----------------------------------------------------------------------------------------


def matmul_flops(i: Instruction, here: Computation) -> float:
    """Of one run of an instruction: 0 of what is no product."""
    if i.opcode == "dot":
        return _dot_flops(i, here)
    return _convolution_flops(i, here) if i.opcode == "convolution" else 0.0


def _operand(i: Instruction, here: Computation, index: int) -> Shape:
    return here.body[i.operands[index]].shapes[0]


def _dot_flops(i: Instruction, here: Computation) -> float:
    left = _operand(i, here, 0).dims
    depth = math.prod(left[d] for d in i.numbers("lhs_contracting_dims"))
    return 2.0 * math.prod(i.shapes[0].dims) * depth


def _convolution_flops(i: Instruction, here: Computation) -> float:
    """Multiply-adds that meet two values; those with padding or between dilated values don't count.

    XLA:TPU writes matmuls as convolutions: what the left side is batched over and what is summed
    beyond one dimension become windows, batched sides by a dilation that lets each meet its own.
    """
    labels = i.attribute("dim_labels") or ""
    left, right, out = re.split(r"_|->", labels)
    sizes = [_operand(i, here, k).dims for k in (0, 1)]
    result = i.shapes[0].dims
    flops = 2.0 * sizes[0][left.index("b")] * sizes[0][left.index("f")]
    flops *= result[out.index("f")]
    for key in ("feature_group_count", "batch_group_count"):
        flops /= (i.numbers(key) or [1])[0]
    # A missing attribute of the window is 1 for every spatial dimension (padding: 0).
    window = dict(part.split("=") for part in (i.attribute("window") or "").split())
    for n in range(sum(label.isdigit() for label in out)):
        low, _ = _at(window, "pad", n, "0_0").split("_")
        flops *= _meetings(
            out=result[out.index(str(n))],
            size=sizes[0][left.index(str(n))],
            kernel=sizes[1][right.index(str(n))],
            stride=int(_at(window, "stride", n, "1")),
            low=int(low),
            size_dilation=int(_at(window, "lhs_dilate", n, "1")),
            kernel_dilation=int(_at(window, "rhs_dilate", n, "1")),
        )
    return flops


def _at(window: dict[str, str], key: str, n: int, default: str) -> str:
    return window[key].split("x")[n] if key in window else default


@functools.lru_cache(maxsize=4096)
def _meetings(
    *,
    out: int,
    size: int,
    kernel: int,
    stride: int,
    low: int,
    size_dilation: int,
    kernel_dilation: int,
) -> int:
    """In one dimension: pairs of output and kernel positions that fall on a value of the input."""
    step = size_dilation // math.gcd(size_dilation, kernel_dilation)
    last = (size - 1) * size_dilation
    count = 0
    for position in range(out):
        first = position * stride - low
        # Kernel positions k of one residue fall on a value, where 0 <= first + k·dilation <= last.
        hit = next(
            (k for k in range(step) if (first + k * kernel_dilation) % size_dilation == 0), None
        )
        if hit is None:
            continue
        least = max(0, -(first // kernel_dilation))
        most = min(kernel - 1, (last - first) // kernel_dilation)
        least += (hit - least) % step
        count += max(0, (most - least) // step + 1)
    return count


# --- Kernels --------------------------------------------------------------------------------------


def custom_call(i: Instruction, here: Computation) -> CustomCall | None:
    """The call of what isn't HLO that an instruction makes, run once; None where it makes none."""
    target = (i.attribute("custom_call_target") or "").strip('"')
    if i.opcode != "custom-call" or not target or target in SCHEDULING:
        return None
    declared = re.search(r'"cost_estimate":\{"flops":"?(\d+)', i.rest)
    return CustomCall(
        target=target,
        name=re.sub(r"(\.\d+|\.clone)*$", "", i.name),
        operands=tuple(shape for name in i.operands for shape in here.body[name].shapes),
        results=i.shapes,
        flops=float(declared[1]) if declared else 0.0,
        op_name=i.op_name,
        count=1.0,
    )
