"""How long a compiled module takes in the order that the compiler has scheduled it in.

A scheduled module lists each computation's instructions in their order. A device works on one at a
time, for as long as its products take at the peak rate, or its bytes, whichever is more. What is
split into a start and a done (a collective, a copy between memory and chip) runs beside what stands
between them; any other collective is waited for. Collectives follow one another; so do transfers.
What a turn of a loop has begun, it also finishes.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from echovlm_jax.plan import hlo
from echovlm_jax.plan.hlo_loops import Branches, Runs, count_runs
from echovlm_jax.plan.hlo_memory import DONE, START, traffic
from echovlm_jax.plan.hlo_text import Computation, Instruction, Text


class Rates(NamedTuple):
    """What one device does in a second, at most; math.inf where that is unknown."""

    flops: float
    memory: float = math.inf  # bytes to and from its memory
    links: float = math.inf  # bytes received from other devices
    network: float = math.inf  # of them, from other slices or hosts


def scheduled_seconds(
    module: Text,
    rates: Rates,
    *,
    granules: Sequence[int] = (),
    branches: Branches | None = None,
    kernel_flops: Callable[[hlo.CustomCall], float] = lambda call: call.flops,
) -> float:
    """Seconds of one run on one device.

    Args:
      module: a compiled module, parsed.
      rates: the device's.
      granules, branches: as of `hlo.read`.
      kernel_flops: of one call of what isn't HLO.
    """
    runs = count_runs(module, branches or {})
    return _Schedule(module, rates, tuple(granules), runs, kernel_flops).seconds(module.entry)


@dataclass
class _Work:
    """What one instruction does, with all that is fused into it."""

    flops: float = 0.0
    link_seconds: float = 0.0
    starts: bool = False  # something that a later instruction ends
    ends: bool = False
    channels: tuple[str, ...] = ()  # of its collectives


class _Schedule:
    def __init__(
        self,
        module: Text,
        rates: Rates,
        granules: tuple[int, ...],
        runs: Runs,
        kernel_flops: Callable[[hlo.CustomCall], float],
    ) -> None:
        self._module, self._rates, self._granules = module, rates, granules
        self._runs, self._kernel_flops = runs, kernel_flops
        self._known: dict[str, float] = {}

    def seconds(self, name: str) -> float:
        """Of one run of a computation, from idle to idle."""
        if name not in self._known:
            self._known[name] = self._run(self._module.computations[name])
        return self._known[name]

    def _run(self, here: Computation) -> float:
        now = memory = links = 0.0  # when the device, its memory and its links are idle again
        there: dict[str, float] = {}  # when what was started is there: by its name, or channel
        for i in here.body.values():
            if i.opcode in ("while", "conditional", "call"):
                now = max(now, memory, links)
                now += sum(n * self.seconds(name) for name, n in self._runs.calls[i.name])
                continue
            work, begun = self._work(i, here), now
            if moved := sum(traffic(i, here, self._module)):
                memory = max(begun, memory) + moved / self._rates.memory
            if not work.starts:
                now = max(begun + work.flops / self._rates.flops, memory if moved else 0.0)
            ready = memory
            if work.link_seconds:
                ready = links = max(begun, links) + work.link_seconds
                now = now if work.starts else max(now, links)
            if work.starts:
                there.update(dict.fromkeys((i.name, *work.channels), ready))
            elif i.opcode.endswith("-update"):
                there[i.name] = there.get(i.operands[0], now)
            elif work.ends:
                now = max(now, *(there.get(key, now) for key in (*i.operands[:1], *work.channels)))
        return max(now, memory, links)

    def _work(self, i: Instruction, here: Computation) -> _Work:
        work = _Work(hlo.matmul_flops(i, here), ends=i.opcode.endswith("-done"))
        if call := hlo.custom_call(i, here):
            work.flops += self._kernel_flops(call)
        elif f'"{DONE}"' in i.rest and i.opcode == "custom-call":
            work.ends = True
        elif f'"{START}"' in i.rest and i.opcode == "custom-call":
            work.starts = True
        if channel := re.search(r"\bchannel_id=(\d+)", i.rest):
            work.channels = (channel[1],)
        devices = self._module.devices
        if found := hlo.collective(i, here, devices, self._runs.fused, self._granules):
            work.link_seconds = found.wire_bytes / self._rates.links
            work.link_seconds += found.network_bytes / self._rates.network
            work.starts = i.opcode.endswith("-start")
        work.starts |= i.opcode in ("copy-start", "slice-start")
        for name, _ in self._runs.calls.get(i.name, ()):
            inner = self._module.computations[name]
            for part in (self._work(j, inner) for j in inner.body.values()):
                work.flops += part.flops
                work.link_seconds += part.link_seconds
                work.starts |= part.starts
                work.ends |= part.ends
                work.channels += part.channels
            work.starts |= i.opcode == "async-start" and work.link_seconds > 0
        return work
