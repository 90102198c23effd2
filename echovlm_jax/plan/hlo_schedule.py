"""How long a compiled module takes in the order that the compiler has scheduled it in.

A scheduled module lists each computation's instructions in their order. A device works on one at a
time, for as long as its products take at the peak rate, or its bytes, whichever is more. What is
split into a start and a done (a collective, a copy between memory and chip) runs beside what stands
between them; any other collective is waited for. Collectives follow one another, and so do copies;
a computation takes no less time than all its bytes need. What a turn of a loop has begun, it also
finishes. Both branches of a conditional count, unless `branches` says how often each is taken.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from echovlm_jax.plan import hlo
from echovlm_jax.plan.hlo_collectives import collective
from echovlm_jax.plan.hlo_loops import Branches, Runs, count_runs
from echovlm_jax.plan.hlo_memory import COLLECTIVES, DONE, START, traffic
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
    """What one instruction does, with all that is fused into it or wrapped by it."""

    flops: float = 0.0
    moved: float = 0.0  # bytes to and from memory
    link_seconds: float | None = None  # None: it has no collective
    begins: list[str] = field(default_factory=list)  # what another instruction ends, by name or
    ends: list[str] = field(default_factory=list)  # the collective's channel


class _Run(NamedTuple):
    """One run of a computation."""

    seconds: float
    moved: float  # bytes to and from memory
    linked: bool  # whether it has collectives


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
        self._known: dict[str, _Run] = {}

    def seconds(self, name: str) -> float:
        """Of one run of a computation, from idle to idle."""
        return self._run(name).seconds

    def _run(self, name: str) -> "_Run":
        if name not in self._known:
            self._known[name] = self._in_order(self._module.computations[name])
        return self._known[name]

    def _in_order(self, here: Computation) -> "_Run":
        now = copies = links = 0.0  # when the device, its copies and its links are idle again
        all_bytes, linked = 0.0, False
        there: dict[str, float] = {}  # when what was begun is there
        for i in here.body.values():
            if i.opcode in ("while", "conditional", "call"):
                for name, n in self._runs.calls.get(i.name, ()):
                    inside = self._run(name)
                    now = max(now, links if inside.linked else 0.0) + n * inside.seconds
                    links = max(links, now if inside.linked else 0.0)
                    all_bytes, linked = all_bytes + n * inside.moved, linked or inside.linked
                continue
            work = self._work(i, here)
            now = max(now, *(there.get(key, now) for key in work.ends), 0.0)
            all_bytes += work.moved
            begun, moving = now, work.moved / self._rates.memory
            if i.opcode in ("copy-start", "slice-start"):
                there[i.name] = copies = max(now, copies) + moving
                continue
            if work.link_seconds is not None:
                links, linked = max(begun, links) + work.link_seconds, True
            if work.begins:  # its bytes are moved as they arrive
                there.update(dict.fromkeys(work.begins, links))
                now += work.flops / self._rates.flops
            else:
                now += max(work.flops / self._rates.flops, moving)
                now = now if work.link_seconds is None else max(now, links)
            if i.opcode.endswith("-update"):
                there[i.name] = there.get(i.operands[0], now)
        seconds = max(now, copies, links, all_bytes / self._rates.memory)
        return _Run(seconds, all_bytes, linked)

    def _work(self, i: Instruction, here: Computation) -> _Work:
        work = _Work(hlo.matmul_flops(i, here))
        if call := hlo.custom_call(i, here):
            work.flops += self._kernel_flops(call)
        if here.name not in self._runs.fused:
            work.moved = sum(traffic(i, here, self._module))
        if i.opcode == "custom-call" and (target := i.attribute("custom_call_target")):
            keys = [key for name in i.operands for key in _channel(here.body[name])]
            work.begins += keys if target == f'"{START}"' else []
            work.ends += keys if target == f'"{DONE}"' else []
        devices = self._module.devices
        if found := collective(i, here, devices, self._runs.fused, self._granules):
            work.link_seconds = found.wire_bytes / self._rates.links
            work.link_seconds += found.network_bytes / self._rates.network
            work.begins += [i.name] if i.opcode.endswith("-start") or i.opcode == "recv" else []
        for name, _ in self._runs.calls.get(i.name, ()):
            inner = self._module.computations[name]
            for part in (self._work(j, inner) for j in inner.body.values()):
                work.flops += part.flops
                work.moved += part.moved
                if part.link_seconds is not None:
                    work.link_seconds = (work.link_seconds or 0.0) + part.link_seconds
                work.begins += part.begins
                work.ends += part.ends
        if i.opcode == "async-start" and work.link_seconds is not None:
            work.begins.append(i.name)
        if i.opcode.endswith("-done"):
            work.ends += i.operands[:1]
        return work


def _channel(i: Instruction) -> list[str]:
    """The mark that a collective has wherever it stands; nothing of what is none."""
    found = re.search(r"\bchannel_id=(\d+)", i.rest)
    return [found[1]] if found and i.opcode in COLLECTIVES else []
