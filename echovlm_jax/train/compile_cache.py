"""Compiled programs that the processes of a job share: JAX's persistent cache, be it in a bucket.

JAX writes the programs of process 0 alone, and reads in all. So where all see one folder, process 0
of a TPU slice compiles first, and the others find what it has made; and a later try finds it too.
What is in the folder is run: only those who may run code as you do may write there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax

# Nothing public gives these: a cache of one's own, and a barrier that waits as long as it takes.
from jax._src import compilation_cache, distributed
from jax._src.compilation_cache_interface import CacheInterface

from echovlm_jax.storage.files import as_path, in_bucket

_Made = TypeVar("_Made")
_MS = 3_600_000  # for process 0 to compile


class _Objects(CacheInterface):
    """Programs in a bucket: JAX itself would need gcsfs or s3fs."""

    def __init__(self, folder: Path) -> None:
        self._path = folder

    def get(self, key: str) -> bytes | None:
        try:
            return (self._path / f"{key}-cache").read_bytes()
        except FileNotFoundError:
            return None

    def put(self, key: str, value: bytes) -> None:
        (self._path / f"{key}-cache").write_bytes(value)


def use_compile_cache() -> None:
    """Lets JAX_COMPILATION_CACHE_DIR name a folder of a bucket. Raises InputError where it names
    what is neither that nor a local path."""
    place = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if not place or not in_bucket(folder := as_path(place)):
        return
    compilation_cache.get_file_cache = lambda path: (_Objects(folder), path)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # they are files of XLA's


# Elsewhere it would cost time: XLA:GPU's processes choose kernels together while they compile, and
# JAX files a program of several processes on CPUs under the process as well.
PLATFORMS = {"tpu"}


def in_turn(compile: Callable[[], _Made]) -> _Made:
    """`compile()`, in process 0 before all others where JAX_COMPILATION_CACHE_DIR is set."""
    place = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    client = distributed.global_state.client
    if not place or client is None or jax.default_backend() not in PLATFORMS:
        return compile()
    in_turn.calls += 1
    made = []
    try:
        if jax.process_index() == 0:
            made.append(compile())
    finally:  # also where it fails: the others then find out for themselves
        client.wait_at_barrier(f"echovlm/compiled/{in_turn.calls}", _MS)
    return made[0] if made else compile()


in_turn.calls = 0
