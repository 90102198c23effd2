"""What is freed stays with the process."""

import platform
import subprocess
import sys

import pytest

from echovlm_jax.memory import give_back_fragments

# 40 MB are allocated, written and freed, again and again, by a thread as XLA's do.
PROGRAM = """
import ctypes, resource, sys, threading
from echovlm_jax.memory import keep_freed_memory

if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("not here")

SIZE = 40 * 10**6
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        there = libc.malloc(SIZE)
        libc.memset(there, 1, SIZE)
        libc.free(there)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def run():
    faults(2)
    print(faults(10))

thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


def _faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True)
    if "not here" in done.stderr:
        pytest.skip("a machine with an accelerator, or another C library")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_pages_that_are_freed_need_no_clearing_again():
    given_back, kept = _faults("given back"), _faults("kept")
    assert given_back > 1000
    assert kept < given_back / 20


# A compilation in small: pieces of many sizes, every second one kept.
FRAGMENTS = """
import ctypes
from echovlm_jax.memory import give_back_fragments, keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def fragments(sizes):
    pieces = [(libc.malloc(size), libc.malloc(4000)) for size in sizes]
    for (piece, _), size in zip(pieces, sizes):
        libc.memset(piece, 7, size)
    for piece, _ in pieces:
        libc.free(piece)
    return [kept for _, kept in pieces]

if not keep_freed_memory():
    raise SystemExit("not here")
small = [20_000 + 400 * i for i in range(1000)]  # 220 MB
kept = fragments(small)
large = libc.malloc(30 * 2**20)
fence = libc.malloc(40 * 2**20)
libc.memset(fence, 5, 64)
libc.free(large)
for piece in kept:
    libc.memset(piece, 9, 64)
before = resident()
taken = give_back_fragments()
assert 0.8 * sum(small) < taken <= 1.1 * sum(small) + 2**21, taken
assert before - resident() > 0.7 * sum(small), (before, resident())
assert libc.malloc(30 * 2**20) == large, "a large hole was cut"
assert all(ctypes.string_at(piece, 64) == bytes([9] * 64) for piece in kept)
assert ctypes.string_at(fence, 64) == bytes([5] * 64)
assert give_back_fragments() < 2**21
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_fragments_go_back_and_nothing_else():
    """What is in use keeps its bytes, large holes stay whole, and a second call finds nothing."""
    done = subprocess.run([sys.executable, "-c", FRAGMENTS], capture_output=True, text=True)
    if "not here" in done.stderr:
        pytest.skip("a machine with an accelerator, or another C library")
    assert done.returncode == 0, done.stderr


def test_fragments_are_left_where_nothing_is_kept():
    assert give_back_fragments() == 0
