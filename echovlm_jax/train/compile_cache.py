"""Compiled programs that the processes of a job share: JAX's persistent cache, be it in a bucket.

JAX writes the programs of process 0 alone, and reads in all. So where all see one folder, process 0
of a TPU slice compiles first, and the others find what it has made; and a later try finds it too.
What is in the folder is run: only those who may run code as you do may write there.
"""

import itertools
import sys
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
    """Programs in a bucket: JAX itself would need gcsfs or s3fs. Without it all still works."""

    def __init__(self, folder: Path) -> None:
        self._path = folder

    def get(self, key: str) -> bytes | None:
        try:
            return self._object(key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            return _say(f"{self._path}: compiled programs can't be read there ({error})")

    def put(self, key: str, value: bytes) -> None:
        try:
            self._object(key).write_bytes(value)
        except OSError as error:
            _say(f"{self._path}: compiled programs can't be kept there ({error})")

    def _object(self, key: str) -> Path:
        return self._path / f"{key}-cache"


def _say(line: str) -> None:
    print(f"echovlm: {line}", file=sys.stderr, flush=True)


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
_calls = itertools.count()


def in_turn(compile: Callable[[], _Made]) -> _Made:
    """`compile()`, in process 0 before all others where it has a JAX_COMPILATION_CACHE_DIR."""
    client = distributed.global_state.client
    if client is None or jax.default_backend() not in PLATFORMS:
        return compile()
    place = f"echovlm/compiled/{next(_calls)}"
    if jax.process_index() == 0:  # it decides for all: another one's environment may be another
        given = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
        client.key_value_set(f"{place}/turns", "yes" if given else "no")
    if client.blocking_key_value_get(f"{place}/turns", _MS) == "no":
        return compile()
    made = []
    try:
        if jax.process_index() == 0:
            made.append(compile())
    finally:  # also where it fails: the others then find out for themselves
        client.wait_at_barrier(place, _MS)
    return made[0] if made else compile()
