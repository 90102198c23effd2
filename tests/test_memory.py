"""What is freed stays with the process."""

import platform
import subprocess
import sys
import time

import pytest

from echovlm_jax.memory import peak_rss_bytes, spent

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


def test_what_was_spent_is_a_line():
    line = spent(time.monotonic() - 125)
    assert line.startswith("2 min 5 s, ") and line.endswith(" GiB of memory")
    assert f"{peak_rss_bytes() / 2**30:.1f} GiB" in line
