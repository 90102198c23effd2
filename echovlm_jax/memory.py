"""What the C library does with memory that a training step gives back."""

from __future__ import annotations

import ctypes
import mmap
import os
from bisect import bisect_left
from pathlib import Path

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_HUGE_PAGE = 2**21
_MOST_RESERVED = 2**34  # bytes of addresses
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")  # 2: addresses count as memory
_LEAST_FRAGMENT, _LARGEST_FRAGMENT = 2**14, 2**20
_ACCELERATORS = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*", "kfd")

_reserved = False  # addresses for the process's one heap


class _MallInfo(ctypes.Structure):
    """mallinfo2 of glibc's malloc.h."""

    _fields_ = [
        ("others", ctypes.c_size_t * 8),
        ("fordblks", ctypes.c_size_t),  # bytes that are free
        ("keepcost", ctypes.c_size_t),  # of these at the heap's top
    ]


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
    global _reserved
    _reserved = _reserved or (kept and _ask_for_huge_pages(libc))
    return kept


def retire_fragments() -> int:
    """Takes from malloc, for good, the free pieces that a compilation left between what it keeps.

    There are tens of thousands, and a step's every product makes malloc search them for its
    workspace: 5 to 9 % of the processor time of a small model's step. What is taken stays with the
    process, as it would anyway. Holes of more than 1 MiB stay malloc's. Does nothing unless
    `keep_freed_memory` has reserved addresses, and more of them are left than the pieces and holes
    have.

    Returns:
      Bytes taken.
    """
    libc = _c_library() if _reserved else None
    if libc is None or not hasattr(libc, "mallinfo2"):  # glibc has it since 2.33
        return 0
    libc.mallinfo2.restype = _MallInfo
    info = libc.mallinfo2()
    top = libc.sbrk(0) - info.keepcost  # where what was never used, or merged with it, begins
    below = info.fordblks - info.keepcost
    if info.keepcost < below:
        return 0

    def take(size: int) -> int | None:
        """A free piece below the top: malloc takes the smallest that fits, and then the top."""
        start = libc.malloc(size)
        if start is not None and start < top:
            return start
        libc.free(start)
        return None

    def missing(size: int) -> bool:
        start = take(size)
        libc.free(start)
        return start is None

    taken, size, holes = 0, _LARGEST_FRAGMENT, []
    sizes = range(_LARGEST_FRAGMENT + 16, below, 16)  # malloc's are multiples of 16
    try:
        while fit := bisect_left(sizes, True, key=missing):
            holes.append(take(sizes[fit - 1]))
        while size >= _LEAST_FRAGMENT:
            while taken + size <= below and take(size) is not None:
                taken += size
            size //= 2
    finally:
        for start in holes:
            libc.free(start)
    return taken


def _c_library() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    return libc


def _ask_for_huge_pages(libc: ctypes.CDLL) -> bool:
    """Grows the heap over addresses that are to have huge pages; no memory is taken yet. Where
    addresses are scarce it leaves them to others, and returns False."""
    import resource  # Windows has none

    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    limited = any(limit != resource.RLIM_INFINITY for limit in limits)
    if limited or not _OVERCOMMIT.exists() or _OVERCOMMIT.read_text().strip() == "2":
        return False
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    size = min(_MOST_RESERVED, there // 2)
    start = libc.malloc(size)
    if start is None:
        return False
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(first, start + size - first, mmap.MADV_HUGEPAGE)
    libc.free(start)
    return True
