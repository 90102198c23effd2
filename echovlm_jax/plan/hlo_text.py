"""The grammar of XLA's HLO text: computations, instructions, shapes. What they mean is in `hlo`.

The grammar is described at openxla.org/xla/operation_semantics and openxla.org/xla/shapes (layouts
and tiles). Read here: the text of a compiled module, on CPU and TPU.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Shape(NamedTuple):
    """One array. `bytes` are its values'; `padded_bytes` has the layout's tiles filled up."""

    dtype: str
    dims: tuple[int, ...]
    bytes: float
    padded_bytes: float
    space: int  # 0: the device's main memory; others are on chip (on TPU 1 is VMEM) or the host's

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    """One line of a computation; `rest` is all that comes after the opcode's opening bracket."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    rest: str

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The arrays of its result, tuples flattened."""
        return shapes(self.type)

    @property
    def op_name(self) -> str:
        """The JAX operation that it comes from, e.g. "jit(step)/jvp()/while/body/dot_general"."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match.group(1) if match else ""

    def attribute(self, key: str) -> str | None:
        """What stands behind `key=`: a word, or the inside of its braces."""
        match = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([^\s,]+))", self.rest)
        return None if match is None else next(g for g in match.groups() if g is not None)

    def names(self, key: str) -> list[str]:
        """The computations that an attribute names."""
        return re.findall(r"[^\s,%]+", self.attribute(key) or "")

    def numbers(self, key: str) -> list[int]:
        """The whole numbers of an attribute, e.g. of lhs_contracting_dims={1,2}."""
        return [int(n) for n in re.findall(r"\d+", self.attribute(key) or "")]


class Computation(NamedTuple):
    """A function of the module: its instructions by name, in order."""

    name: str
    body: dict[str, Instruction]
    root: Instruction
    parameters: dict[int, str]


class Text(NamedTuple):
    """A module. `devices` is how many run it together, partitions times replicas."""

    computations: dict[str, Computation]
    entry: str
    devices: int


# The type comes before the opcode, which is the first word that an opening bracket follows.
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([^\s=%]+) = (.*?) ([a-z][\w-]*)\((.*)$", re.S)
_COMPUTATION = re.compile(r"(ENTRY )?%?([^\s(]+) .*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_BRACKET = re.compile(r"[()]")
_SHAPE = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_TILE = re.compile(r"T\(([\d,*]*)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = re.compile(r"\d+")


def parse(text: str) -> Text:
    """Splits a module's text. Raises ValueError where it has no ENTRY computation."""
    computations: dict[str, Computation] = {}
    entry, name, root, body = "", "", "", {}
    parameters: dict[int, str] = {}
    for line in _lines(text):
        if line == "}":
            if body:
                computations[name] = Computation(name, body, body[root], parameters)
            name = ""
        elif not line.startswith(" "):
            match = _COMPUTATION.match(line)
            if match:
                name, root, body, parameters = match[2], "", {}, {}
                entry = name if match[1] else entry
        elif name and (match := _INSTRUCTION.match(line)):
            is_root, own, kind, opcode, rest = match.groups()
            body[own] = Instruction(own, opcode, kind, _operands(opcode, rest), rest)
            root = own if is_root or not root else root
            if opcode == "parameter":
                parameters[int(rest.split(")")[0])] = own
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    header = text[: text.find("\n")]
    sizes = [re.search(rf"{key}=(\d+)", header) for key in ("num_partitions", "replica_count")]
    return Text(computations, entry, math.prod(int(size[1]) for size in sizes if size))


def _lines(text: str) -> Iterator[str]:
    """Lines; an instruction whose attributes hold line breaks (kernel metadata) comes as one."""
    pending: list[str] = []
    for line in text.splitlines():
        if line == "}" or line.startswith(("  %", "  ROOT ", "%", "ENTRY ")):
            if pending:
                yield "\n".join(pending)
            pending = [line]
        elif pending and line:
            pending.append(line)
    if pending:
        yield "\n".join(pending)


def _operands(opcode: str, rest: str) -> tuple[str, ...]:
    if opcode in ("constant", "parameter"):
        return ()
    depth = 1
    for match in _BRACKET.finditer(rest):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return tuple(_NAME.findall(rest, 0, match.start()))
    return tuple(_NAME.findall(rest))


@functools.lru_cache(maxsize=65536)
def shapes(type_text: str) -> tuple[Shape, ...]:
    """The arrays of a type, tuples flattened: "(f32[2,3]{1,0}, s32[])" has two."""
    return tuple(_shape(*match.groups()) for match in _SHAPE.finditer(type_text))


def _shape(dtype: str, dims_text: str, order: str | None, layout: str | None) -> Shape:
    dims = tuple(int(size) for size in re.findall(r"\d+", dims_text))
    bits = _BITS.search(dtype)  # bf16, f8e4m3fn, s4; a token has no values
    width = int(bits[0]) / 8 if bits else float(dtype == "pred")
    size = padded = width * math.prod(dims)
    tile = _TILE.search(layout or "")
    if tile and order and "*" not in tile[1]:
        # Minor dimensions first. The first tile decides how far an array is filled up; those
        # behind it, T(8,128)(2,1), say how the inside of a tile is ordered.
        tiles = [int(n) for n in reversed(tile[1].split(","))]
        minor = [dims[int(i)] for i in order.split(",")]
        full = [-(-size // n) * n for size, n in zip(minor, tiles, strict=False)]
        padded = width * math.prod(full + minor[len(full) :])
    space = _SPACE.search(layout or "")
    return Shape(dtype, dims, size, padded, int(space[1]) if space else 0)
