"""Uploaded files: each is taken once, by one visitor, and none stays."""

import os
import shutil
import threading
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

from echovlm_jax.errors import InputError

_STALE = 600  # seconds after which an upload that came to nothing is deleted
_EVERY = 60  # seconds between two looks for such
_TAKEN = "exam-"  # begins the name of a folder whose files are being read


@contextmanager
def taken(
    folder: Path, paths: Sequence[str], sent: Container[str] | None = None
) -> Iterator[list[Path]]:
    """Uploads, moved into a folder of their own, which is gone after the block, whatever happens.

    Equal files of one name share a path: whoever moves it first has it, and nobody deletes it under
    him.

    Args:
      folder: of all uploads.
      paths: of some of them.
      sent: the paths that uploads came to; by default all of the folder.

    Raises:
      InputError: a path is of no upload, or somebody else has taken it; the others are deleted.
    """
    own = Path(mkdtemp(prefix=_TAKEN, dir=folder))
    try:
        yield _moved(folder, own, paths, sent)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _moved(
    folder: Path, own: Path, paths: Sequence[str], sent: Container[str] | None
) -> list[Path]:
    moved: dict[str, Path] = {}
    wrong = []
    for number, path in enumerate(paths, 1):
        if path in moved:
            continue
        if not _is_upload(path, folder) or (sent is not None and path not in sent):
            wrong.append(f"file {number}: it was not sent to this page; drop it first")
            continue
        moved[path] = own / str(number) / Path(path).name
        moved[path].parent.mkdir()
        try:
            Path(path).rename(moved[path])
        except FileNotFoundError:
            line = "was sent twice at once, or waited for too long; drop it again"
            wrong.append(f"file {number}: {line}")
        if Path(path).parent != folder:
            with suppress(OSError):
                Path(path).parent.rmdir()
    if wrong:
        raise InputError(wrong[0])
    return [moved[path] for path in paths]


def _is_upload(path: str, folder: Path) -> bool:
    """Whether a path is one of a file in that folder. A URL or a link elsewhere is none."""
    found, folder = Path(path).resolve(), folder.resolve()
    if not found.is_relative_to(folder) or Path(path).is_symlink() or found.is_dir():
        return False
    return not found.relative_to(folder).parts[0].startswith(_TAKEN)  # nor somebody's exam


@contextmanager
def swept(folder: Path) -> Iterator[None]:
    """Deletes uploads that came to nothing (broken off, refused, cancelled) during the block."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(_EVERY):
            sweep(folder)

    threading.Thread(target=work, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def sweep(folder: Path) -> None:
    """Deletes uploads that nobody took for a while. Others may come and go at the same time."""
    for place, folders, files in os.walk(folder):  # which passes over a folder that has vanished
        folders[:] = [name for name in folders if not name.startswith(_TAKEN)]
        for path in (Path(place, name) for name in files):
            with suppress(OSError):
                if time.time() - path.lstat().st_mtime > _STALE:
                    path.unlink()
                    if path.parent != folder:
                        path.parent.rmdir()
