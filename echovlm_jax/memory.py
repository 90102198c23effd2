"""What the C library does with memory that a training step gives back."""

from __future__ import annotations

import ctypes
from pathlib import Path

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_ACCELERATORS = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*", "kfd")


def keep_freed_memory() -> bool:
    """Where JAX computes on the CPU, lets the process keep what a step frees for the next one.

    XLA:CPU allocates a step's temporaries anew each time. They are large, so glibc maps them and
    unmaps them, and the kernel clears every page again: a fifth of a small model's step.

    Call it before JAX starts its threads: each may have an arena of its own that no longer changes.

    Returns:
      Whether it did. It doesn't on a machine with an accelerator, or with another C library than
      glibc.
    """
    if any(next(Path("/dev").glob(name), None) for name in _ACCELERATORS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    wanted = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1))
    return all(mallopt(name, value) for name, value in wanted)
