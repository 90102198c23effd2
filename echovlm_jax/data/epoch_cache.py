"""Plans on disk: arrays under a name that says what they were made of, checked when read."""

from __future__ import annotations

import ast
import functools
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
_PACKAGE = Path(__file__).parents[1]
_STATED = ("phantom",)  # code whose results a dataset's own fingerprint tells
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
    digest.update(code_digest(_PACKAGE))
    return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def code_digest(package: Path) -> bytes:
    """Of all that `plan_code` finds."""
    digest = hashlib.blake2b()
    for _, content in sorted(plan_code(package).items()):
        digest.update(hashlib.blake2b(content).digest())
    return digest.digest()


def plan_code(package: Path) -> dict[Path, bytes]:
    """The modules of `package` that data/epoch.py imports, imports of imports and those inside
    functions included, without comments and docstrings; and the tables (JSON) beside them."""
    found: dict[Path, bytes] = {}
    left = [package / "data" / "epoch.py"]
    while left:
        if (path := left.pop()) in found or path.relative_to(package).parts[0] in _STATED:
            continue
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package.name):
                base = package.joinpath(*(node.module or "").split(".")[1:])
                for name in node.names:
                    files = (
                        base / f"{name.name}.py",
                        base.with_suffix(".py"),
                        base / "__init__.py",
                    )
                    left.append(next(file for file in files if file.is_file()))
            elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                node.body = [one for one in node.body if not _is_text(one)]
        found[path] = ast.dump(tree).encode()
        found |= {table: table.read_bytes() for table in path.parent.glob("*.json")}
    return found


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


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
