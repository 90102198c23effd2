"""NVIDIA cards that aren't here, described to XLA:GPU, whose compiler needs no card."""

import math
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from echovlm_jax.errors import InputError


class Card(NamedTuple):
    """What XLA:GPU asks about a card, as its maker states it (the architecture's white paper and
    the table of compute capabilities in CUDA's programming guide)."""

    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    clock: float  # GHz, boost
    l2: int  # MiB
    shared: int  # KiB of a multiprocessor; one block may have 1 KiB less (Turing: all)
    lanes: int = 128  # float32 units of a multiprocessor
    threads: int = 2048  # of a multiprocessor, at most


CARDS = {
    "t4": Card((7, 5), 40, 1.59, 4, 64, lanes=64, threads=1024),
    "l4": Card((8, 9), 58, 2.04, 48, 100, threads=1536),
    "a100": Card((8, 0), 108, 1.41, 40, 164, lanes=64),
    "h100": Card((9, 0), 132, 1.98, 50, 228),
    "h200": Card((9, 0), 132, 1.98, 50, 228),
    "b200": Card((10, 0), 148, 1.965, 126, 228),
}


def card_devices(name: str, memory: int, rate: float, size: str, slices: int = 1) -> list[Any]:
    """Devices of a node, or of several, to compile for.

    Before jax is imported, the caller sets JAX_PLATFORMS=cpu, and adds
    --xla_gpu_autotune_level=0 to XLA_FLAGS: choosing kernels by trying them needs a card.

    Args:
      name: one of CARDS.
      memory: bytes of a card's own.
      rate: bytes/s of that memory.
      size: cards, or hosts × cards a host, as in 8 or 4x8.
      slices: how many of these.

    Raises:
      InputError: XLA:GPU isn't installed, or a size that is none.
    """
    sides = [int(side) for side in size.split("x")]
    if len(sides) > 2:
        raise InputError(
            f"topology {name}:{size}: cards are counted as {name}:8, or hosts × cards: {name}:4x8"
        )
    hosts, cards = sides if len(sides) == 2 else (1, sides[0])
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name=name,
            target_config=_described(CARDS[name], memory, rate),
            topology=f"{slices}x{hosts}x{cards}",
        ).devices
    except (RuntimeError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise InputError(
            f"compiling for {name} needs XLA:GPU: pip install 'echovlm-jax[plan-gpu]'"
            f" ({str(error).partition(chr(10))[0]})"
        ) from error
    assert len(found) == math.prod(sides) * slices
    return list(found)


def _described(card: Card, memory: int, rate: float) -> str:
    """XLA's GpuTargetConfigProto as text; the names are those of its device_description.proto."""
    major, minor = card.capability
    block = card.shared * 1024 - (0 if major == 7 else 1024)
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {card.cores}
  fpus_per_core: {card.lanes}
  clock_rate_ghz: {card.clock}
  device_memory_size: {memory}
  memory_bandwidth: {int(rate)}
  l2_cache_size: {card.l2 << 20}
  shared_memory_per_core: {card.shared << 10}
  shared_memory_per_block: {48 << 10}
  shared_memory_per_block_optin: {block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: {card.threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
"""
