"""Which arrays go between devices in an HLO module, how far, and who takes part."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from echovlm_jax.plan.hlo_memory import COLLECTIVES, START
from echovlm_jax.plan.hlo_text import Computation, Instruction, Shape

_BETWEEN_SLICES = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}


class Collective(NamedTuple):
    """One collective operation; bytes are those of one run.

    `wire_bytes` is what one device receives with ring algorithms, n devices in a group: all-gather
    result · (n-1)/n; reduce-scatter operand · (n-1)/n; all-reduce 2 · operand · (n-1)/n; all-to-all
    operand · (n-1)/n; collective-permute and broadcast the result. A ragged all-to-all moves what
    sizes at run time say: an even load is assumed, operand · (n-1)/n.

    `network_bytes` is the part that comes from other granules (slices, or hosts), where a group's
    n = m · g devices are in g of them: first among the m, then each device for its 1/m among the g.
    What TPU slices exchange by way of their hosts is that part alone.
    """

    kind: str
    operands: tuple[Shape, ...]
    group_size: int  # for a permute: how many devices receive something
    wire_bytes: float
    result_bytes: float
    op_name: str
    count: float
    network_bytes: float = 0.0


def _begins(i: Instruction, here: Computation) -> bool:
    """False for a repetition of a collective that has begun before.

    XLA:TPU spreads one collective over several fusions, so that it runs beside their matmuls: it
    stands in each of them, and only the first hands it to the custom call that starts it.
    """
    return "async_collective_fusion_config" not in i.rest or any(
        i.name in user.operands and user.attribute("custom_call_target") == f'"{START}"'
        for user in here.body.values()
    )


def collective(
    i: Instruction, here: Computation, devices: int, fused: set[str], granules: Sequence[int] = ()
) -> Collective | None:
    """The collective that an instruction begins, run once; None where it begins none."""
    if i.opcode == "recv":
        return _between_slices(i)
    kind = i.opcode.removesuffix("-start")
    if kind not in COLLECTIVES or not _begins(i, here):
        return None
    names = i.operands[:1] if kind in ("ragged-all-to-all", "collective-permute") else i.operands
    operands = tuple(shape for name in names for shape in here.body[name].shapes)
    size = sum(shape.bytes for shape in operands)
    n = _group_size(i, devices)
    if kind == "all-reduce" and here.name in fused and _only_sliced(i, here):
        # XLA:TPU's fused form of a reduce-scatter: each device keeps its slice of the sum.
        kind = "reduce-scatter"
    others = (n - 1) / n if n else 0.0
    result, wire = {
        "all-gather": (size * n, size * n * others),
        "reduce-scatter": (size / max(n, 1), size * others),
        "all-reduce": (size, 2 * size * others),
        "collective-permute": (size, size if n else 0.0),
        "collective-broadcast": (size, size),
    }.get(kind, (size, size * others))
    found = Collective(kind, operands, n, wire, result, i.op_name, 1.0)
    return found._replace(network_bytes=_crossing(found, groups(i, devices), granules))


def _between_slices(i: Instruction) -> Collective:
    """TPU slices exchange arrays by way of their hosts. A program has them as a send and a recv,
    which say what becomes of the arrays, and who takes part: as slices by devices, {1,2}x{0:3}, as
    groups, {{100000,200000},…}, or as pairs, {{100000->200000},…}. No byte is on a slice's links.

    Raises:
      ValueError: it says so in another form, which a newer compiler may write; or it is no such
        exchange, and nothing that the programs read so far had.
    """
    said = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.rest)
    target = re.search(r'_xla_megascale_target=(?:"(.*?)"|\{(\{.*?\})\})', i.rest)
    by_slice, listed = target.groups() if target else (None, None)
    sizes = {
        sum(map(_span, group.split(",")))
        for group in re.findall(r"\{([\d,:]+)\}x\{", by_slice or "")
    }
    sizes |= {group.count(",") + 1 for group in re.findall(r"\{([\d,]+)\}", listed or "")}
    sizes |= {2} if "->" in (listed or "") else set()
    if said is None or said[1] not in _BETWEEN_SLICES or not sizes:
        form = i.rest.partition("frontend_attributes=")[2][:300]
        raise ValueError(f"who takes part in {i.name} is written in an unknown form: {form}")
    kind, n = _BETWEEN_SLICES[said[1]], max(sizes)
    size = sum(shape.bytes for shape in i.shapes[:1])
    others = (n - 1) / n
    received = {
        "all-reduce": 2 * size * others,
        "all-gather": size * others,
        "reduce-scatter": size * n * others,
        "all-to-all": size * others,
        "collective-permute": size,
    }[kind]
    return Collective(kind, i.shapes[:1], n, 0.0, size, i.op_name, 1.0, received)


def _span(part: str) -> int:
    """Of "4" or "1:4", how many numbers."""
    first, _, last = part.partition(":")
    return int(last or first) - int(first) + 1


def _only_sliced(i: Instruction, here: Computation) -> bool:
    users = [user for user in here.body.values() if i.name in user.operands]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _crossing(
    collective: Collective, members: list[tuple[int, ...]], granules: Sequence[int]
) -> float:
    """What one device receives from other granules: on average where groups are unlike."""
    if len(set(granules)) < 2:
        return 0.0
    sent = sum(shape.bytes for shape in collective.operands)
    if collective.kind in (
        "collective-permute",
        "collective-broadcast",
    ):  # pairs, or from the first
        pairs = [(group[0], other) for group in members for other in group[1:]]
        return sent * sum(granules[a] != granules[b] for a, b in pairs) / len(granules)
    total = 0.0
    for group in members:
        g = len({granules[device] for device in group})
        m, share = len(group) / g, (g - 1) / g
        each = {
            "all-gather": collective.result_bytes / m,
            "reduce-scatter": sent / m,
            "all-reduce": 2 * sent / m,
        }.get(collective.kind, sent)
        total += len(group) * each * share
    return total / sum(len(group) for group in members)


def _group_size(i: Instruction, devices: int) -> int:
    """Devices that take part in one group; of a permute, those that receive something."""
    members = groups(i, devices)
    if "source_target_pairs" in i.rest:
        return len({target for _, target in members})
    return len(members[0])


def groups(i: Instruction, devices: int) -> list[tuple[int, ...]]:
    """Who takes part together; of a permute, pairs of (source, target).

    Groups come as lists, {{0,1},{2,3}}; counted, [2,8]<=[8,2]T(1,0) (2 groups of 8); by mesh axes,
    mesh['x'=8,'y'=2] {'x'}, where 'x':(2)4 is a piece of an axis, of size 4, after the 2 before it,
    and device_ids=([2,8]T(1,0)) behind the axes says who stands where in the mesh; {} is everybody.

    Raises:
      ValueError: another form, which a newer compiler may write.
    """
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", i.rest)
    if listed:
        inner = re.findall(r"\{([\d,]+)\}", listed[1])
        return [tuple(int(n) for n in group.split(",")) for group in inner]
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.rest)
    if counted:
        shape, dims, order = (
            [int(n) for n in (part or "").split(",") if n] for part in counted.groups()
        )
        return [tuple(group) for group in _ids(dims, order).reshape(-1, shape[-1]).tolist()]
    named = re.search(
        r"replica_groups=@?mesh\[([^\]]*)\](?:, *device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
        r" *\{([^}]*)\}",
        i.rest,
    )
    if named:
        dims, order = ([int(n) for n in (part or "").split(",") if n] for part in named.group(2, 3))
        return _mesh_groups(named[1], named[4], _ids(dims, order) if dims else None)
    if form := re.search(r"(?:replica_groups|source_target_pairs)=(?!\{\}).{,80}", i.rest):
        raise ValueError(f"who takes part in {i.name} is written in an unknown form: {form[0]}")
    return [tuple(range(devices))]


def _ids(dims: list[int], order: list[int]) -> np.ndarray:
    """Devices counted in rows of a shape, whose axes are then put in another order."""
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(order) if order else ids


def _mesh_groups(mesh: str, axes: str, order: np.ndarray | None) -> list[tuple[int, ...]]:
    sizes = {name: int(size) for name, size in re.findall(r"([^\s,=]+)=(\d+)", mesh)}
    dims: list[int] = []
    chosen: list[int] = []
    named = (part.partition(":") for part in re.split(r",\s*", axes))
    pieces: dict[str, str] = {name: piece for name, _, piece in named}
    for name, size in sizes.items():
        if pieces.get(name):
            before, own = (int(n) for n in re.findall(r"\d+", pieces[name]))
            chosen.append(len(dims) + 1)
            dims += [before, own, size // before // own]
        else:
            chosen += [len(dims)] if name in pieces else []
            dims.append(size)
    ids = (np.arange(math.prod(dims)) if order is None else order).reshape(dims)
    group = math.prod(dims[axis] for axis in chosen)
    last = range(len(dims) - len(chosen), len(dims))
    return [tuple(g) for g in np.moveaxis(ids, chosen, last).reshape(-1, group).tolist()]
