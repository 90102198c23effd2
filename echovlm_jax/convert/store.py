"""Digests of what a conversion writes, made while it is written."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from echovlm_jax.storage import digests
from echovlm_jax.storage.arrays import Reader as Reader  # of what was written
from echovlm_jax.storage.files import in_bucket
from echovlm_jax.storage.writer import PROCESS


class DataFiles:
    """The digests of the files that a Writer's values are in, each made soon after it was written,
    while it is in memory still.

    Args:
      folder: the Writer's.
      pool: reads them.
    """

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self._folder, self._pool = folder / f"{PROCESS}0" / "d", pool
        self._there: set[Path] = set()
        self._found: dict[Path, tuple[int, Future[str]]] = {}

    def look(self) -> None:
        """Takes the files that were there at the look before. What was being written then must be
        durable."""
        if in_bucket(self._folder):  # its objects have to be fetched again
            return
        for path in self._there - self._found.keys():
            size = path.stat().st_size
            self._found[path] = size, self._pool.submit(digests.of_file, path)
        self._there = set(self._folder.iterdir())

    def digests(self, base: Path) -> dict[str, str]:
        """By name below `base`, of the files that are there still and have not grown."""
        return {
            path.relative_to(base).as_posix(): digest.result()
            for path, (size, digest) in self._found.items()
            if path.is_file() and path.stat().st_size == size
        }
