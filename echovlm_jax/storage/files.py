"""Durable files and folders on a file system or in a bucket, written whole or not at all.

On a file system, a file is made durable and then renamed: a power cut leaves the new content or the
old. A bucket's object is atomic by itself. A folder in a bucket is whole once it has XXH128SUMS,
which is written last.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from echovlm_jax.errors import InputError
from echovlm_jax.storage.bucket import SCHEMES, BucketPath

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|(gs|s3):")
_RESEND_SECONDS = 10.0


def as_path(place: object) -> Path:
    """A place here or in a bucket. Raises InputError for another scheme."""
    if isinstance(place, Path | BucketPath):
        return cast(Path, place)
    text = str(place)
    if text.startswith(SCHEMES):
        return cast(Path, BucketPath(text))
    if _URL.match(text):
        raise InputError(f"{text}: this scheme can't be used; give a local path, gs://… or s3://…")
    return Path(text)


def local_path(place: object) -> Path:
    """A place on a file system. Raises InputError for any other."""
    path = as_path(place)
    if in_bucket(path):
        raise InputError(
            f"{path}: must be on a file system; mount the bucket (gs://: gcsfuse, s3://:"
            " mount-s3) and give the folder, or copy it"
        )
    return path


def in_bucket(path: Path) -> bool:
    return isinstance(path, BucketPath)


def read_bytes(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes, or one more than that. Raises OSError."""
    if isinstance(path, BucketPath):
        return path.read_bytes()
    with open(path, "rb") as file:
        return file.read(limit + 1)


def write_bytes(path: Path, data: bytes | bytearray) -> None:
    """Writes a file whole.

    Raises:
      OSError: it can't be written; the old content is kept.
    """
    with new_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write. At the end it is made durable and named; after an error there is none. For a
    bucket it is held in memory until then."""
    if isinstance(path, BucketPath):
        memory = io.BytesIO()
        yield memory
        path.write_bytes(memory.getbuffer())
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` in UTF-8; half of a surrogate pair is escaped, as JSON does."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def make_folder(path: Path, *, new: bool = False) -> None:
    """Makes a folder and its parents; nothing in a bucket. Raises OSError; with `new`, also for a
    folder that exists."""
    if not in_bucket(path):
        path.mkdir(parents=True, exist_ok=not new)


def remove(path: Path) -> None:
    """Deletes a file, a link, or a folder and its content; nothing where there is none."""
    if isinstance(path, BucketPath):
        path.delete_below()
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    path.unlink(missing_ok=True)


def rename_folder(made: Path, path: Path) -> None:
    """Gives a folder, complete and durable, its final name. Raises OSError."""
    os.rename(made, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder for small files, which then replaces `path`: at once on a file system,
    file by file in a bucket. An error leaves `path` unchanged."""
    local = not in_bucket(path)
    if local:
        make_folder(path.parent)
    work = path.with_name(f".{path.name}.partial") if local else Path(tempfile.mkdtemp())
    remove(work)
    try:
        make_folder(work)
        yield work
        remove(path)
        rename_folder(work, path) if local else copy_folder(work, path)
    finally:
        remove(work)


def copy_folder(source: Path, target: Path) -> None:
    """Copies all small files below a folder. Raises OSError."""
    for name in below(source):
        make_folder((target / name).parent)
        write_bytes(target / name, (source / name).read_bytes())


def below(folder: Path) -> list[str]:
    """The names of all files below a folder. Links are not followed, and are named."""
    if isinstance(folder, BucketPath):
        return folder.below()
    names = []
    for inside, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(inside, name))]
        base = os.path.relpath(inside, folder)
        names += [os.path.normpath(os.path.join(base, name)) for name in (*files, *links)]
    return sorted(names)


def sync_folder(folder: Path) -> None:
    """Makes a folder's list of names durable. A bucket's always is."""
    if in_bucket(folder):
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Lines:
    """A file to append to; a context manager. After `sync`, lines survive a power cut.

    On a file system, after `write` they survive a kill. An object can't be appended to: it is sent
    whole at `sync` and `close`, and at a `write` 10 seconds after the last time.

    Args:
      path: the file; made if missing.
      size: the number of bytes to keep of its content; all by default.

    Raises:
      OSError: it can't be written; of `write` and `sync` too.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.path, self._file, self._sent = path, None, time.monotonic()
        if in_bucket(path):
            self._held = bytearray(path.read_bytes()[:size] if path.is_file() else b"")
        else:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`
            if size is not None:
                self._file.truncate(size)

    def write(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        if self._file is not None:
            size = os.fstat(self._file.fileno()).st_size
            try:
                while data:
                    data = data[self._file.write(data) :]
            except OSError as error:  # a full disk: whole lines or none
                self._file.truncate(size)
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            return
        self._held += data
        if time.monotonic() - self._sent > _RESEND_SECONDS:
            self.sync()

    def sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            return
        write_bytes(self.path, self._held)
        self._sent = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        else:
            self.sync()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
