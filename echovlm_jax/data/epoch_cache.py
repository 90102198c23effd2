"""Plans on disk: arrays under a name that says what they were made of, checked when read."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from echovlm_jax.errors import InputError
from echovlm_jax.processing.files import shown
from echovlm_jax.storage.files import as_path, make_folder, new_file

if TYPE_CHECKING:
    from echovlm_jax.data.examples import Source

_DIGEST = 32  # bytes in front of the arrays: BLAKE2b of all that follows
_CODE = ("data", "processing")  # the packages that a plan follows from
# Where a plan does not follow from them: they say where things are, and what else is in there is
# hashed by its content.
_PLACES = ("data", "model", "tokenizer", "workers", "cache")


def fingerprint(source: Source) -> str:
    """32 hex digits of everything that a plan follows from: data, tokenizer, settings and code."""
    digest = hashlib.blake2b(digest_size=16)
    settings = {
        name: value for name, value in sorted(vars(source.settings).items()) if name not in _PLACES
    }
    tasks = sorted(source.tasks.items())
    digest.update(json.dumps([source.dataset.fingerprint, settings, tasks]).encode())
    digest.update(repr((source.model, source.images)).encode())
    digest.update(_tokenizer_digest(source))
    root = Path(__file__).parents[1]
    for path in sorted(path for part in _CODE for path in (root / part).rglob("*.py")):
        digest.update(hashlib.blake2b(path.read_bytes()).digest())
    return digest.hexdigest()


def _tokenizer_digest(source: Source) -> bytes:
    """Of the files that a tokenizer was read from."""
    place = as_path(source.tokenizer.source)
    paths = [place] if place.is_file() else sorted(place.glob("*")) if place.is_dir() else []
    # Where files are makes no difference; a tokenizer without any is told by its name.
    digest = hashlib.blake2b(b"" if paths else source.tokenizer.source.encode())
    for path in paths:
        if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja"):
            digest.update(hashlib.blake2b(path.read_bytes()).digest())
    return digest.digest()


def read(folder: Path, name: str, fields: Sequence[str]) -> dict[str, np.ndarray] | None:
    """The arrays under a name; None where there are none, or they are damaged."""
    try:
        raw = _path(folder, name).read_bytes()
    except OSError:
        return None
    body = raw[_DIGEST:]
    if hashlib.blake2b(body, digest_size=_DIGEST).digest() != raw[:_DIGEST]:
        return None
    try:
        with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
            return {field: arrays[field] for field in fields}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def write(folder: Path, name: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Stores arrays under a name, all at once: a reader finds them whole or not at all.

    Raises:
      InputError: the folder can't be written to.
    """
    body = io.BytesIO()
    np.savez(body, allow_pickle=False, **arrays)
    data = body.getbuffer()
    path = _path(folder, name)
    try:
        make_folder(folder)
        with new_file(path) as file:
            file.write(hashlib.blake2b(data, digest_size=_DIGEST).digest())
            file.write(data)
    except OSError as error:
        raise InputError(
            f"data_cache {shown(folder)}: cannot be written to ({error.strerror}); choose another"
            " folder, or none"
        ) from None


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.plan"
