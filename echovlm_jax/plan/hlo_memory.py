"""What an HLO module moves through main memory, and which arrays it keeps there."""

from collections.abc import Iterable, Iterator

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


def _hbm(shapes: Iterable[Shape]) -> float:
    return sum(shape.padded_bytes for shape in shapes if shape.space == 0)


def traffic(i: Instruction, here: Computation, module: Text) -> float:
    """Bytes that an instruction outside fusions reads from and writes to main memory."""
    if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")) or i.opcode == "async-start":
        return 0.0
    if i.opcode == "custom-call" and (i.attribute("custom_call_target") or "")[1:-1] in SCHEDULING:
        return 0.0
    operands = [here.body[name].shapes for name in i.operands]
    if i.opcode in ("copy-start", "slice-start"):  # (where to, where from) and the other way round
        arrays = i.shapes[:2]
        moved = min(shape.padded_bytes for shape in arrays)
        return sum(moved for shape in arrays if shape.space == 0)
    if i.opcode == "collective-permute-start":
        return _hbm(i.shapes[:2])
    if i.opcode.removesuffix("-start") in COLLECTIVES and i.opcode.endswith("-start"):
        return _hbm(i.shapes)  # a pair of operands and results
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        return _hbm(i.shapes) + (_hbm(i.shapes) if operands[0][0].space == 0 else 0.0)
    if i.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _hbm(operands[1 if i.opcode == "dynamic-update-slice" else -1])
    if i.opcode == "fusion":
        return _fusion_traffic(i, operands, module)
    return _hbm(i.shapes) + sum(_hbm(arrays) for arrays in operands)


def _fusion_traffic(i: Instruction, operands: list[tuple[Shape, ...]], module: Text) -> float:
    inner = module.computations[i.names("calls")[0]]
    if any(f'"{DONE}"' in j.rest for j in inner.body.values() if j.opcode == "custom-call"):
        return 0.0
    total = 0.0
    for k, arrays in enumerate(operands):
        if full := _hbm(arrays):
            total += _read(inner, inner.parameters[k], full, module)
    roots = inner.root.operands if inner.root.opcode == "tuple" else (inner.root.name,)
    if len(roots) != len(i.shapes):  # the start of a collective: (operand, result, flags …)
        return total + _hbm(i.shapes[1:])
    return total + sum(
        _written(inner, root, _hbm([shape]), module)
        for root, shape in zip(roots, i.shapes, strict=True)
        if shape.space == 0
    )


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
        elif user.opcode == "bitcast":
            total += _read(inner, user.name, full, module)
        elif user.opcode == "fusion":
            called = module.computations[user.names("calls")[0]]
            for k, operand in enumerate(user.operands):
                if operand == name:
                    total += _read(called, called.parameters[k], full, module)
        else:
            return full
    return min(total, full)


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
