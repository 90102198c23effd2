"""How often each computation of an HLO module runs: loops multiply what is inside of them.

XLA:CPU states a loop's turns; XLA:TPU leaves them to be read from the condition (a comparison with
a number), the state that goes in, and the step in the body, which need not be 1: the loops that
overlap a matmul with its collective take two steps in a turn. What passes through an outer loop
unchanged is followed to where it comes from.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Mapping
from graphlib import TopologicalSorter
from typing import NamedTuple

from echovlm_jax.plan.hlo_text import Computation, Instruction, Text


class Loop(NamedTuple):
    """A while loop, entered `count` times for `trips` turns each (None: they can't be read)."""

    name: str
    trips: int | None
    count: float


def _called(i: Instruction) -> list[str]:
    """The computations that an instruction runs, scalar functions of reductions left out."""
    if i.opcode in ("fusion", "async-start"):
        return i.names("calls")
    if i.opcode == "call":
        return i.names("to_apply")
    if i.opcode == "while":
        return [*i.names("condition"), *i.names("body")]
    if i.opcode == "conditional":
        # In the order of `branches`' shares: what runs where the condition is false comes first.
        keys = ("branch_computations", "false_computation", "true_computation")
        return [name for key in keys for name in i.names(key)]
    return []


# A part of a conditional's op_name → the shares of its runs with a false and a true condition.
Branches = Mapping[str, tuple[float, float]]


class Runs(NamedTuple):
    """How often a module's computations run.

    Attributes:
      counts: of each computation that does; one that never runs, such as the addition of a
        reduction, is left out.
      fused: those inside fusions.
      loops: all while loops.
      calls: of each instruction that runs computations, how often one run of it runs each.
    """

    counts: dict[str, float]
    fused: set[str]
    loops: tuple[Loop, ...]
    calls: dict[str, list[tuple[str, float]]]


def count_runs(module: Text, branches: Branches) -> Runs:
    """Each branch of a conditional counts as run, unless `branches` says how often each is taken,
    which HLO doesn't."""
    callers: dict[str, set[str]] = {name: set() for name in module.computations}
    for name, computation in module.computations.items():
        for i in computation.body.values():
            for callee in _called(i):
                callers[callee].add(name)
    counts: dict[str, float] = defaultdict(float, {module.entry: 1})
    fused: set[str] = set()
    loops: list[Loop] = []
    calls: dict[str, list[tuple[str, float]]] = {}
    constants: dict[str, dict[int, int]] = {}
    for name in TopologicalSorter(callers).static_order():
        here, count = module.computations[name], counts[name]
        for i in here.body.values() if count else ():
            callees = _called(i)
            if not callees:
                continue
            times = [1.0] * len(callees)
            if i.opcode == "while":
                trips = _trips(i, here, module, constants)
                loops.append(Loop(i.name, trips, count))
                times = [1.0 if trips is None else float(trips)] * len(callees)
            shares = next((s for part, s in branches.items() if part in i.op_name), None)
            if i.opcode == "conditional" and shares is not None and len(callees) == 2:
                times = list(shares)
            calls[i.name] = list(zip(callees, times, strict=True))
            for callee, often in calls[i.name]:
                counts[callee] += count * often
            if i.opcode == "fusion" or name in fused:
                fused.update(callees)
    ran = {name: count for name, count in counts.items() if count}
    return Runs(ran, fused, tuple(loops), calls)


def _trips(
    loop: Instruction, here: Computation, module: Text, constants: dict[str, dict[int, int]]
) -> int | None:
    """Turns of a loop: stated by the compiler (CPU), else from its start, step and limit.

    Args:
      constants: of each loop body seen so far, the elements of its state that stay at a known
        number; the body's and the condition's are added.
    """
    condition, body = (module.computations[loop.names(key)[0]] for key in ("condition", "body"))
    state = here.body[loop.operands[0]]
    start = {
        k: value.offset
        for k, name in enumerate(state.operands if state.opcode == "tuple" else ())
        if (value := _value(name, here, module, constants)) and value.index is None
    }
    after = body.root.operands if body.root.opcode == "tuple" else ()
    kept = {
        k: start[k]
        for k, name in enumerate(after)
        if k in start and _value(name, body, module, constants) == _Value(k, 0)
    }
    constants[body.name] = constants[condition.name] = kept
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    compared = _compared(condition, module, constants)
    if compared is None:
        return None
    (index, shift), limit = compared
    step = _value(after[index], body, module, constants) if index < len(after) else None
    if index not in start or step is None or step.index != index or step.offset <= 0:
        return None
    return max(0, -(-(limit - start[index] - shift) // step.offset))


class _Value(NamedTuple):
    """An integer of a loop: a constant (no index), or an element of the loop's state plus one."""

    index: int | None
    offset: int


def _value(
    name: str,
    here: Computation,
    module: Text,
    constants: dict[str, dict[int, int]],
    given: tuple[_Value | None, ...] | None = None,
) -> _Value | None:
    """What an instruction computes, where it is that simple; `given` are a fusion's operands."""
    follow = functools.partial(_value, here=here, module=module, constants=constants, given=given)
    i = here.body[name]
    if i.opcode == "constant":
        number = re.match(r"(-?\d+)\)", i.rest)
        return _Value(None, int(number[1])) if number else None
    if i.opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape"):
        return follow(i.operands[0])
    if i.opcode == "parameter" and given is not None:
        return given[int(i.rest.split(")")[0])]
    if i.opcode == "get-tuple-element":
        source, (index, *_) = here.body[i.operands[0]], i.numbers("index")
        if source.opcode == "tuple":
            return follow(source.operands[index])
        if source.opcode == "parameter" and given is None:
            known = constants.get(here.name, {}).get(index)
            return _Value(index, 0) if known is None else _Value(None, known)
    if i.opcode == "fusion":
        inner = module.computations[i.names("calls")[0]]
        operands = tuple(follow(operand) for operand in i.operands)
        return _value(inner.root.name, inner, module, constants, operands)
    if i.opcode in ("add", "subtract"):
        a, b = (follow(operand) for operand in i.operands)
        if i.opcode == "add" and a and a.index is None:
            a, b = b, a
        if a and b and b.index is None:
            return _Value(a.index, a.offset + (b.offset if i.opcode == "add" else -b.offset))
    return None


def _compared(
    condition: Computation, module: Text, constants: dict[str, dict[int, int]]
) -> tuple[tuple[int, int], int] | None:
    """(element of the state, what is added to it) and the limit that it stays below."""
    root, here, given = condition.root, condition, None
    if root.opcode == "fusion":
        given = tuple(_value(name, condition, module, constants) for name in root.operands)
        here = module.computations[root.names("calls")[0]]
        root = here.root
    if root.opcode != "compare":
        return None
    a, b = (_value(name, here, module, constants, given) for name in root.operands)
    direction = root.attribute("direction")
    if direction in ("GT", "GE"):
        a, b, direction = b, a, {"GT": "LT", "GE": "LE"}[direction]
    if not a or not b or a.index is None or b.index is not None or direction not in ("LT", "LE"):
        return None
    return (a.index, a.offset), b.offset + (direction == "LE")
