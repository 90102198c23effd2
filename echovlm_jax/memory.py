"""What the C library does with memory that a training step gives back."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_HUGE_PAGE = 2**21
_MOST_RESERVED = 2**34  # bytes of addresses
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")  # 2: addresses count as memory
# Free pieces that a compilation leaves between what it keeps: as many as there are, malloc's search
# of a list of them took 5 to 9 % of a small model's step.
_LEAST_FRAGMENT, _LARGEST_FRAGMENT = 2**14, 2**20
_ACCELERATORS = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*", "kfd")

_kept = False  # what the process's one malloc has been told


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
    if kept:
        _ask_for_huge_pages(libc)
    global _kept
    _kept = kept
    return kept


def give_back_fragments() -> int:
    """Gives the kernel what a compilation left in pieces, where `keep_freed_memory` is at work.

    The pieces are taken from malloc for good, so that it need not search them at each product of a
    step; what of them is used again comes from elsewhere. Holes of more than 1 MiB stay malloc's.

    Returns:
      Bytes taken.
    """
    libc = _c_library()
    if not _kept or not hasattr(libc, "mallinfo2"):  # glibc has it since 2.33
        return 0
    libc.mallinfo2.restype = _MallInfo
    info = libc.mallinfo2()
    top = libc.sbrk(0) - info.keepcost  # above it nobody's memory, below it used and free

    def take(size: int) -> int | None:
        """A free piece below the top: malloc takes the smallest that fits, and then the top."""
        start = libc.malloc(size)
        if start is not None and start < top:
            return start
        libc.free(start)
        return None

    large = []
    most = min(info.fordblks - info.keepcost, info.keepcost)
    while (size := _largest(take, libc.free, most)) > _LARGEST_FRAGMENT:
        large.append(take(size))
    page, taken, size = mmap.PAGESIZE, 0, _LARGEST_FRAGMENT
    while size >= _LEAST_FRAGMENT and info.keepcost > _LARGEST_FRAGMENT:
        while (start := take(size)) is not None:
            taken += size
            first = -(-start // page) * page
            libc.madvise(first, (start + size) // page * page - first, mmap.MADV_DONTNEED)
        size //= 2
    for start in large:
        libc.free(start)
    return taken


def _largest(take: Callable[[int], int | None], free: Callable[[int], None], most: int) -> int:
    """The size of the largest free piece, to malloc's 16 bytes; 0 where there is none."""
    least = 0
    while most - least > 16:
        size = (least + most + 1) // 2
        start = take(size)
        if start is None:
            most = size
        else:
            free(start)
            least = size
    return least


def _c_library() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
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
