"""What an HLO module moves through main memory, and which arrays it keeps there."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from echovlm_jax.plan.hlo_text import Computation, Instruction, Shape, Text

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Names, views and allocations: they move nothing.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"),
    *("conditional", "after-all", "partition-id", "replica-id", "optimization-barrier", "domain"),
}
# Custom calls by which XLA:TPU says something about scheduling or memory, and computes nothing.
START, DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
SCHEDULING = {
    START,
    DONE,
    "AllocateBuffer",
    "ConcatBitcast",
    "Sharding",
    "AssumeGatherIndicesInBound",
    "GatherScatterIndicesBitpacked",
}


class Moved(NamedTuple):
    """Bytes that are read from main memory, and written to it."""

    read: float = 0.0
    written: float = 0.0


def _hbm(shapes: Iterable[Shape]) -> float:
    return sum(shape.padded_bytes for shape in shapes if shape.space == 0)


def traffic(i: Instruction, here: Computation, module: Text) -> Moved:
    """What an instruction outside fusions moves between main memory and the chip."""
    if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")) or i.opcode == "async-start":
        return Moved()
    if i.opcode == "custom-call" and (i.attribute("custom_call_target") or "")[1:-1] in SCHEDULING:
        return Moved()
    operands = [here.body[name].shapes for name in i.operands]
    if i.opcode in ("copy-start", "slice-start"):  # (where to, where from) and the other way round
        arrays = i.shapes[:2]
        moved = min(shape.padded_bytes for shape in arrays)
        source = operands[0][0].space
        other = next((shape.space for shape in arrays if shape.space != source), source)
        return Moved(moved * (source == 0), moved * (other == 0))
    if i.opcode == "collective-permute-start":
        return Moved(_hbm(i.shapes[:1]), _hbm(i.shapes[1:2]))
    if i.opcode.removesuffix("-start") in COLLECTIVES and i.opcode.endswith("-start"):
        sent = sum(_hbm(arrays) for arrays in operands)
        return Moved(sent, _hbm(i.shapes) - sent)  # a pair of operands and results
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        return Moved(_hbm(i.shapes) if operands[0][0].space == 0 else 0.0, _hbm(i.shapes))
    if i.opcode in ("dynamic-update-slice", "scatter"):
        put = _hbm(operands[1 if i.opcode == "dynamic-update-slice" else -1])
        return Moved(put, put)
    if i.opcode == "fusion":
        return _fusion_traffic(i, operands, module)
    return Moved(sum(_hbm(arrays) for arrays in operands), _hbm(i.shapes))


def _fusion_traffic(i: Instruction, operands: list[tuple[Shape, ...]], module: Text) -> Moved:
    inner = module.computations[i.names("calls")[0]]
    if any(f'"{DONE}"' in j.rest for j in inner.body.values() if j.opcode == "custom-call"):
        return Moved()
    read = 0.0
    for k, arrays in enumerate(operands):
        if full := _hbm(arrays):
            read += _read(inner, inner.parameters[k], full, module)
    roots = inner.root.operands if inner.root.opcode == "tuple" else (inner.root.name,)
    if len(roots) != len(i.shapes):  # the start of a collective: (operand, result, flags …)
        return Moved(read, _hbm(i.shapes[1:]))
    written = sum(
        _written(inner, root, _hbm([shape]), module)
        for root, shape in zip(roots, i.shapes, strict=True)
        if shape.space == 0
    )
    return Moved(read, written)


def _read(inner: Computation, name: str, full: float, module: Text) -> float:
    """Bytes of a fusion's parameter that are read: all, or the slices that are taken of it."""
    total = 0.0
    for user in inner.body.values():
        if name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += sum(shape.padded_bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            total += 0.0  # updated in place
        elif user.opcode == "tuple" or "async_collective_fusion_config" in user.rest:
            total += 0.0  # handed on to where the collective ends
        elif user.opcode == "copy" and user.name in (inner.root.name, *inner.root.operands):
            return full
        elif user.opcode in ("bitcast", "copy"):  # another order of what is read behind it
            total += _read(inner, user.name, full, module)
        elif user.opcode == "fusion":
            called = module.computations[user.names("calls")[0]]
            for k, operand in enumerate(user.operands):
                if operand == name and _is_view(called, called.parameters[k], module):
                    total += _read(inner, user.name, full, module)
                elif operand == name:
                    total += _read(called, called.parameters[k], full, module)
        else:
            return full
    return min(total, full)


def _is_view(inner: Computation, name: str, module: Text) -> bool:
    """Whether a fusion inside another only hands on a parameter, in another layout or shape."""
    i = inner.root
    while i.name != name:
        called = module.computations[i.names("calls")[0]] if i.opcode == "fusion" else None
        if called is not None and not _is_view(called, called.parameters[0], module):
            return False
        if called is None and i.opcode not in ("bitcast", "copy"):
            return False
        i = inner.body[i.operands[0]]
    return True


def _written(inner: Computation, name: str, full: float, module: Text) -> float:
    """Bytes of a fusion's result that are written: all, or the slice that is updated."""
    i = inner.body[name]
    if i.opcode == "bitcast":
        return _written(inner, i.operands[0], full, module)
    if i.opcode == "fusion":
        called = module.computations[i.names("calls")[0]]
        return _written(called, called.root.name, full, module)
    if i.opcode == "dynamic-update-slice":
        return sum(shape.padded_bytes for shape in inner.body[i.operands[1]].shapes)
    passed = i.opcode == "parameter" or "async_collective_fusion_config" in i.rest
    return 0.0 if passed else full


def arrays_made(here: Computation, is_entry: bool) -> Iterator[tuple[Shape, str, str]]:
    """The arrays in main memory that a computation makes, the program's arguments included."""
    for i in here.body.values():
        argument = is_entry and i.opcode == "parameter"
        if (i.opcode in _FREE and not argument) or i.opcode.endswith(("-start", "-update")):
            continue
        for shape in i.shapes:
            if shape.space == 0 and shape.bytes:
                yield shape, i.opcode, i.op_name
