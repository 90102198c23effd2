"""What goes on beside reading and writing: digests of what is written, the next values read."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from echovlm_jax.storage import digests
from echovlm_jax.storage.arrays import Reader as Reader  # a public name, for other programs
from echovlm_jax.storage.files import in_bucket
from echovlm_jax.storage.writer import PROCESS

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def ahead(
    pool: ThreadPoolExecutor, make: Callable[[_Item], _Made], items: Iterable[_Item], count: int
) -> Iterator[_Made]:
    """What `make` gives of each item, in order; `count` are being made while one is used."""
    futures: deque[Future[_Made]] = deque()
    for item in items:
        futures.append(pool.submit(make, item))
        if len(futures) > count:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


class DataFiles:
    """The digests of a Writer's data files, each made while the file is still in the page cache.

    Args:
      folder: the Writer's folder.
      pool: the threads that read.
    """

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self._folder, self._pool = folder / f"{PROCESS}0" / "d", pool
        self._there: set[Path] = set()
        self._found: dict[Path, tuple[int, Future[str]]] = {}

    def look(self) -> None:
        """Begins to hash the files that the previous call saw; they must be durable now."""
        if in_bucket(self._folder):  # its objects have to be fetched again
            return
        for path in self._there - self._found.keys():
            size = path.stat().st_size
            self._found[path] = size, self._pool.submit(digests.of_file, path)
        self._there = set(self._folder.iterdir())

    def digests(self, base: Path) -> dict[str, str]:
        """The digests by name below `base`, of files that still exist and have not grown."""
        return {
            path.relative_to(base).as_posix(): digest.result()
            for path, (size, digest) in self._found.items()
            if path.is_file() and path.stat().st_size == size
        }
