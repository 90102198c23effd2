"""Memory: what this process has needed, and what the C library does with what is given back."""

import ctypes
import mmap
import os
import time
from pathlib import Path

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_HUGE_PAGE = 2**21
_MOST_RESERVED = 2**34  # bytes of addresses
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")  # 2: addresses count as memory
_ACCELERATORS = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*", "kfd")


def keep_freed_memory() -> bool:
    """Without an accelerator, lets the process keep what a step frees for the next one, in huge
    pages where Linux has any.

    XLA:CPU allocates a step's temporaries anew each time. They are large, so glibc maps them and
    unmaps them, and the kernel clears every small page again: a fifth of a small model's step. The
    price: what was once needed stays with the process; large arrays of zeros are written at once,
    not when they are used; and with glibc before 2.38 a step's temporaries may not fit into the
    hole that the last step's left (its bug 14581: an aligned piece needs some bytes more than it
    leaves), so that there is room for them twice.

    Call it before JAX starts its threads: each may have an arena of its own that no longer changes.

    Returns:
      Whether glibc agreed. False on a machine with an accelerator, and with another C library.
    """
    if any(next(Path("/dev").glob(name), None) for name in _ACCELERATORS):
        return False
    try:
        libc = _c_library()
        wanted = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1))
        kept = all(libc.mallopt(name, value) for name, value in wanted)
    except (OSError, AttributeError, TypeError):
        return False
    if kept:
        _ask_for_huge_pages(libc)
    return kept


def peak_rss_bytes() -> int:
    """The most memory that this process ever had resident."""
    try:
        # Not getrusage: it counts what the process was forked from as well.
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def spent(began: float) -> str:
    """What a program has needed so far, in a line: time, memory, and the accelerators' memory.

    Args:
      began: `time.monotonic()` at its beginning.
    """
    import jax

    seconds = round(time.monotonic() - began)
    line = f"{seconds // 60} min {seconds % 60} s, {peak_rss_bytes() / 2**30:.1f} GiB of memory"
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.devices()]
    if known := [peak for peak in peaks if peak is not None]:
        line += f", {max(known) / 2**30:.1f} GiB of an accelerator's"
    return line


def _c_library() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Grows the heap over addresses that are to have huge pages; no memory is taken yet. Where
    addresses are scarce it leaves them to others."""
    import resource  # Windows has none

    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    limited = any(limit != resource.RLIM_INFINITY for limit in limits)
    if limited or not _OVERCOMMIT.exists() or _OVERCOMMIT.read_text().strip() == "2":
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    size = min(_MOST_RESERVED, there // 2)
    start = libc.malloc(size)
    if start is None:
        return
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(first, start + size - first, mmap.MADV_HUGEPAGE)
    libc.free(start)
