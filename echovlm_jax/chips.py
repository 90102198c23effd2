"""Accelerators: what their makers state, what suits them, topology names, and the roofline.

A compiled program's figures are those of one *device*. On most chips that is the chip; JAX sees two
devices on a v4 and a TPU7x, each with half of the chip.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from echovlm_jax.cards import CARDS
from echovlm_jax.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip's figures; None is not known.

    `flops`, `hbm_rate` and `ici_rate` are peaks of a whole chip as published, in bfloat16 FLOP/s
    and bytes/s. `ici_rate` counts both directions of all links to other chips of a slice.
    `usable_hbm` is what the compiler lets one device's program have: the limit that libtpu 0.0.52
    names when it refuses a program that is too large. On GPUs nothing plays that part.
    `network_rate` is what reaches one chip from other slices, or other hosts' cards, one direction:
    a TPU's share of the data centre's network; of cards the adapter that a node of the maker's has
    for each (HDR or NDR InfiniBand).
    """

    name: str
    flops: float
    hbm: int
    hbm_rate: float | None
    ici_rate: float | None
    usable_hbm: int | None
    devices: int = 1
    network_rate: float | None = None

    @property
    def device_hbm(self) -> int:
        """Bytes that one device's program may take: the compiler's limit, else the device's own."""
        return self.usable_hbm or self.hbm // self.devices


def _limit(gib: float) -> int:
    return int(gib * GIB)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB, 1_200e9, None, _limit(15.25), devices=2),
        Chip("v5e", 197e12, 16 * 10**9, 819e9, 400e9, _limit(15.75), network_rate=25e9 / 8),
        Chip("v5p", 459e12, 95 * 10**9, 2_765e9, 1_200e9, _limit(95.73), network_rate=50e9 / 8),
        Chip("v6e", 918e12, 32 * 10**9, 1_638e9, 800e9, _limit(31.24), network_rate=100e9 / 8),
        Chip("tpu7x", 2_307e12, 192 * GIB, None, None, _limit(94.74), devices=2),
        # In float32, as `defaults` has it: it has no bfloat16 (float16: 65e12).
        Chip("t4", 8.1e12, 16 * 10**9, 320e9, 32e9, _limit(14.7)),
        Chip("l4", 121e12, 24 * 10**9, 300e9, 64e9, None),
        Chip("a100", 312e12, 80 * 10**9, 2_039e9, 600e9, None, network_rate=200e9 / 8),
        Chip("h100", 989e12, 80 * 10**9, 3_350e9, 900e9, None, network_rate=400e9 / 8),
        Chip("h200", 989e12, 141 * 10**9, 4_800e9, 900e9, None, network_rate=400e9 / 8),
        Chip("b200", 2_250e12, 180 * 10**9, 8_000e9, 1_800e9, None, network_rate=400e9 / 8),
    )
}


# Parts of the name that JAX gives a device of each chip.
_KINDS = (
    ("v5 lite", "v5e"),
    ("v5e", "v5e"),
    ("v6 lite", "v6e"),
    ("v6e", "v6e"),
    ("v5p", "v5p"),
    ("tpu v5", "v5p"),
    ("tpu v4", "v4"),
    ("7x", "tpu7x"),
    ("t4", "t4"),
    ("l4", "l4"),
    ("a100", "a100"),
    ("h100", "h100"),
    ("h200", "h200"),
    ("b200", "b200"),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None for one that is not in CHIPS."""
    lower = device_kind.lower()
    return next((CHIPS[name] for part, name in _KINDS if part in lower), None)


class Defaults(NamedTuple):
    """How a model computes on a device, where nobody says otherwise."""

    attention: str  # of whole sequences; an implementation of `ops.attention.dispatch`
    dtype: str | None  # None: the one that the weights are stored in
    moe_dispatch: str = "dense"  # in training: of those that drop nothing, the one with least work


# The compute capability of Ampere: the first cards with bfloat16, and the first that the compiler
# of the Triton kernel takes (below, XLA:GPU says "only enabled for Ampere GPUs and up").
_AMPERE = (8, 0)


def defaults(device: Any) -> Defaults:
    """What suits a device: a `jax.Device`, or what a topology has in its place.

    TPUs alone have a grouped product that multiplies a token by its own experts and no other; for
    `ragged` XLA:GPU and XLA:CPU multiply every chosen row by all experts (jax 0.10.2).

    Cards older than Ampere, such as a T4, compute in float32. They have no bfloat16, and float16
    ends at 65,504: Qwen2-VL's activations exceed that, and its answers become gibberish
    (github.com/huggingface/transformers/issues/33294). CPUs do too: with jax 0.10.2 a bfloat16
    product takes longer there.
    """
    if device.platform == "tpu":
        return Defaults("splash", None, "ragged")
    if device.platform == "cpu":
        return Defaults("xla", "float32")
    capability = _capability(device)
    if device.platform in ("gpu", "cuda") and capability is not None:
        return Defaults("triton", None) if capability >= _AMPERE else Defaults("xla", "float32")
    return Defaults("xla", None)


def _capability(device: Any) -> tuple[int, int] | None:
    """An NVIDIA card's compute capability; None of other makers' devices."""
    said = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return None if said is None else (int(said[1]), int(said[2]))


class Topology(NamedTuple):
    """One slice's name and chip; how many chips all have, and how many devices JAX sees on them."""

    name: str
    chip: Chip
    chips: int
    devices: int


def topology(name: str, slices: int = 1) -> Topology:
    """So many slices of this name, e.g. "v5e:4x4" (16 chips), "v5p:4x4x8" (128) or "h100:8".

    Raises:
      InputError: an unknown chip, or a size that is none.
    """
    kind, _, size = name.partition(":")
    if kind not in CHIPS:
        raise InputError(
            f"topology {name!r}: chip {kind!r} is unknown; choose among {', '.join(CHIPS)},"
            " with a size, such as v5e:4x4"
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", size):
        raise InputError(
            f"topology {name!r}: its size must be one to three numbers, such as {kind}:"
            + {"v5e": "4x4", "v6e": "4x4"}.get(kind, "8" if kind in CARDS else "2x2x4")
        )
    chips = slices * math.prod(int(side) for side in size.split("x"))
    return Topology(name, CHIPS[kind], chips, chips * CHIPS[kind].devices)


class Roofline(NamedTuple):
    """Seconds that a run would take if that alone were the limit; None where a rate is unknown."""

    compute: float
    hbm: float | None
    ici: float | None
    network: float | None = None

    @property
    def seconds(self) -> float:
        """The largest: matmuls, memory and network are assumed to overlap perfectly."""
        return max(self.compute, self.hbm or 0.0, self.ici or 0.0)

    @property
    def limit(self) -> str:
        """Which of them that is."""
        return max(self._fields, key=lambda field: getattr(self, field) or 0.0)


def roofline(
    *,
    flops: float,
    hbm_bytes: float,
    collective_bytes: float,
    chip: Chip,
    network_bytes: float = 0.0,
) -> Roofline:
    """The shortest time that one device's work can take.

    Args:
      flops: what the device computes, recomputation and all.
      hbm_bytes: what goes between the device and its memory.
      collective_bytes: what the device receives from others (`hlo.Module.collective_bytes`). Half
        of `ici_rate` is for receiving, over all links at once: a collective over one axis of a
        torus that can't use every link takes longer.
      chip: its rates are shared by its devices.
      network_bytes: what it receives from other slices or hosts (`hlo.Module.network_bytes`).
    """
    share = 1 / chip.devices
    return Roofline(
        compute=flops / (chip.flops * share),
        hbm=None if chip.hbm_rate is None else hbm_bytes / (chip.hbm_rate * share),
        ici=None if chip.ici_rate is None else collective_bytes / (chip.ici_rate / 2 * share),
        network=None if chip.network_rate is None else network_bytes / (chip.network_rate * share),
    )


def mfu_upper_bound(model_flops: float, bound: Roofline, chip: Chip) -> float:
    """The share of a device's peak that useful work can reach: model FLOPs over peak and bound.

    Args:
      model_flops: the useful work of one device (`flops.Flops.total`, over all devices).
      bound: the roofline of the same run.
      chip: of that device.
    """
    return model_flops / (chip.flops / chip.devices) / bound.seconds
