"""What is freed stays with the process."""

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from echovlm_jax import memory

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


# A compilation in small: pieces of many sizes, each before one that stays; then two holes.
FRAGMENTS = """
import ctypes, sys
from echovlm_jax.memory import keep_freed_memory, retire_fragments

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

if sys.argv[1] == "kept":
    assert keep_freed_memory()
else:  # as large a heap, and every piece from it
    for name, value in ((-4, 0), (-1, -1)):
        assert libc.mallopt(name, value)
    libc.free(libc.malloc(2**31))
small = [20_000 + 400 * i for i in range(1000)]  # 220 MB
large = [3 * 2**19, 30 * 2**20]
pieces, kept = [], []
for size in small + large:
    pieces.append(libc.malloc(size))
    kept.append(libc.malloc(4000 if size in small else 40 * 2**20))
    libc.memset(kept[-1], 9, 4000)
for piece in pieces:
    libc.free(piece)
taken = retire_fragments()
if sys.argv[1] != "kept":
    assert taken == 0, taken
    sys.exit()
assert 0.8 * sum(small) < taken <= 1.1 * sum(small) + 2**21, taken
for size, piece in zip(large, pieces[len(small):]):
    assert libc.malloc(size) == piece, f"the hole of {size} was cut"
assert all(ctypes.string_at(piece, 4000) == bytes([9] * 4000) for piece in kept)
assert retire_fragments() < 2**21
"""


def _unlimited() -> bool:
    """Whether addresses may be reserved, and nothing but the processor would compute."""
    resource = pytest.importorskip("resource")
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    unlimited = all(limit == resource.RLIM_INFINITY for limit in limits)
    scarce = memory._OVERCOMMIT.exists() and memory._OVERCOMMIT.read_text().strip() == "2"
    there = any(next(Path("/dev").glob(name), None) for name in memory._ACCELERATORS)
    return unlimited and not scarce and not there


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
@pytest.mark.parametrize("how", ["kept", "given back"])
def test_fragments_are_retired_and_nothing_else(how):
    """What is in use keeps its bytes, holes stay whole, and a second call finds nothing. Nothing
    at all happens where no memory is kept."""
    if not _unlimited() or not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("a machine with an accelerator, limited addresses, or an older C library")
    done = subprocess.run([sys.executable, "-c", FRAGMENTS, how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_c_library_is_asked_where_nothing_is_reserved(monkeypatch):
    monkeypatch.setattr(memory, "_reserved", False)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: 1 / 0)
    assert memory.retire_fragments() == 0
