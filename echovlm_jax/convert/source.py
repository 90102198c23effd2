"""A PyTorch checkpoint on disk behind one small interface: names, shapes, dtypes, ranges of values.

Safetensors files are read by our own reader; .bin and .pt files by `torch.load(weights_only=True)`
where PyTorch is installed. Nothing here unpickles by itself.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from echovlm_jax.convert import safetensors
from echovlm_jax.convert.table import quoted
from echovlm_jax.errors import InputError
from echovlm_jax.storage.bucket import BucketPath
from echovlm_jax.storage.files import as_path, in_bucket, read_bytes

WEIGHT_DTYPES = ("bfloat16", "float32", "float16")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_SINGLE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_WEIGHT_FILES = (SINGLE, INDEX, TORCH_SINGLE, TORCH_INDEX)  # in this order
_SUFFIXES = (".safetensors", ".bin", ".pt")
LOOKED_FOR = f"{', '.join(_WEIGHT_FILES)} or one file *{', *'.join(_SUFFIXES)}"
_MAX_JSON_BYTES = 100_000_000


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint; `order` sorts tensors as they lie on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype
    order: tuple[str, int]
    read: Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class Source:
    """An open checkpoint.

    Attributes:
      folder: where config.json and the tokenizer's files are.
      files: the weight files.
      tensors: by the checkpoint's own names; `tensors[n].read(a, b)` gives the values [a, b) of
        tensor n, counted flat, and raises InputError if the file has changed since.
      gone: the files that a conversion deleted after use, by name, with `stamp` of each.
      quantized: how stored weights are, if `tensors` has what is computed out of them.
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, Tensor]
    gone: dict[str, bytes] = field(default_factory=dict)
    quantized: str | None = None

    def fingerprint(self) -> str:
        """A digest of the files' names, sizes and times: differs where the weights may differ.

        The time of the last change (ctime) is among them: `touch` and `rsync` can't set it."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(self.gone.get(path.name) or stamp(path))
        return digest.hexdigest()

    def drop(self, file: str) -> None:
        """Lets go of a file that has been deleted: its tensors can't be read from now on."""
        for name, tensor in list(self.tensors.items()):
            if tensor.order[0] == file:
                self.tensors[name] = replace(tensor, read=_unread(self.folder / file))


def stamp(path: Path) -> bytes:
    """What tells a file from another of its name, without reading it."""
    if isinstance(path, BucketPath):
        return f"{path.name}\0".encode() + path.version() + b"\n"
    stat = path.stat()
    size = f"{path.name}\0{stat.st_size}\0{stat.st_ino}"
    return f"{size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\n".encode()


def _unread(path: Path) -> Callable[[int, int], np.ndarray]:
    def read(start: int, stop: int) -> np.ndarray:
        raise InputError(
            f"{path}: was deleted after use, and what was made of it is damaged; fetch the whole"
            " checkpoint again and delete the unfinished folder"
        )

    return read


class Gone(NamedTuple):
    """A weight file that was deleted after use."""

    stamp: bytes
    tensors: dict[str, Tensor]


def open_source(
    path: str | os.PathLike[str], *, once: bool = False, gone: Mapping[str, Gone] | None = None
) -> Source:
    """Opens a folder in Hugging Face form, or one weight file that lies in such a folder.

    Args:
      once: the weights will be read once and in order: the page cache is then of no use.
      gone: files by name that may be missing, because a conversion deleted them after use.

    Raises:
      InputError: nothing to read there, or a file is missing, damaged or would need unpickling.
    """
    where, gone = as_path(path), gone or {}
    if where.is_file() or where.name in gone:
        return _open_files(where.parent, {where.name: None}, where, once, gone)
    if not where.is_dir():
        raise InputError(f"{where}: no such folder; give a folder with config.json and weights")
    found = weight_file(where)
    if found is None and len(gone) == 1:
        found = where / next(iter(gone))
    if found is None:
        raise InputError(f"{where}: no weights; looked for {LOOKED_FOR}")
    is_index = found.name in (INDEX, TORCH_INDEX)
    files = _read_index(found) if is_index else {found.name: None}
    return _open_files(where, files, found, once, gone)


def weight_file(folder: Path) -> Path | None:
    """The file that a folder's weights are in, or the index of several; None without weights.

    Raises:
      InputError: several weight files and no index.
    """
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    shards = sorted(p.name for p in folder.iterdir() if p.suffix in _SUFFIXES and p.is_file())
    if len(shards) > 1:
        raise InputError(
            f"{folder}: {len(shards)} weight files ({shards[0]}, …) but no {INDEX}; fetch the index"
        )
    return folder / shards[0] if shards else None


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises InputError where it is missing, huge or not JSON."""
    try:
        if len(text := read_bytes(path, _MAX_JSON_BYTES)) > _MAX_JSON_BYTES:
            raise InputError(f"{path}: too large for a JSON file; check the path")
        return json.loads(text.decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); add the file") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: is not valid JSON; fetch it again") from None


def _read_index(path: Path) -> dict[str, set[str] | None]:
    """Each file of an index with the tensors that it is said to hold."""
    index = read_json(path)
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise InputError(f"{path}: has no weight_map; fetch it again")
    files: dict[str, set[str] | None] = {}
    for name, file in weights.items():
        if not isinstance(file, str) or not file or Path(file).name != file or file == "..":
            raise InputError(
                f"{path}: {quoted(name)} points to {quoted(file)}; a shard must be a file of the"
                " same folder"
            )
        members = files.setdefault(file, set())
        assert members is not None
        members.add(name)
    return dict(sorted(files.items()))


def _open_files(
    folder: Path,
    files: Mapping[str, set[str] | None],
    said_by: Path,
    once: bool,
    gone: Mapping[str, Gone],
) -> Source:
    tensors: dict[str, Tensor] = {}
    used: dict[str, bytes] = {}
    for file, expected in files.items():
        path = folder / file
        if not path.is_file() and file in gone:
            used[file] = gone[file].stamp
            unread = _unread(path)
            tensors |= {n: replace(t, read=unread) for n, t in gone[file].tensors.items()}
            continue
        if not path.is_file():
            raise InputError(f"{path}: is missing, and {said_by.name} lists it; fetch it")
        is_torch = path.suffix != ".safetensors"
        found = _open_torch(path) if is_torch else _open_safetensors(path, once)
        if expected is not None:
            _compare(said_by, path, expected, set(found))
        if twice := tensors.keys() & found.keys():
            raise InputError(f"{path}: {quoted(min(twice))} is in another shard too; keep one")
        tensors |= found
    return Source(folder, tuple(folder / file for file in files), tensors, used)


def _compare(index: Path, shard: Path, expected: set[str], found: set[str]) -> None:
    if absent := expected - found:
        raise InputError(
            f"{shard}: has no tensor {quoted(min(absent))}, and {index.name} says it has; fetch"
            " both again"
        )
    if extra := found - expected:
        raise InputError(
            f"{shard}: holds {quoted(min(extra))}, which {index.name} does not list for it; fetch"
            " both again"
        )


def _open_safetensors(path: Path, once: bool) -> dict[str, Tensor]:
    entries = safetensors.read_header(path)
    if isinstance(path, BucketPath):
        return {
            name: Tensor(e.shape, e.dtype, (path.name, e.offset), _of_object(path, e))
            for name, e in entries.items()
        }
    fd = safetensors.open_file(path, direct=once)
    # Closed when the last of the readers below is gone.
    file = os.fdopen(fd, "rb", buffering=0)

    def reader(name: str, entry: safetensors.Entry) -> Callable[[int, int], np.ndarray]:
        def read(start: int, stop: int) -> np.ndarray:
            try:
                return safetensors.read_values(file.fileno(), entry, start, stop)
            except EOFError:
                raise InputError(f"{path}: became shorter at {quoted(name)}; fetch it") from None
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror})") from None

        return read

    return {
        name: Tensor(e.shape, e.dtype, (path.name, e.offset), reader(name, e))
        for name, e in entries.items()
    }


def _of_object(path: BucketPath, entry: safetensors.Entry) -> Callable[[int, int], np.ndarray]:
    size = entry.dtype.itemsize

    def read(start: int, stop: int) -> np.ndarray:
        try:
            data = path.read_bytes(entry.offset + start * size, entry.offset + stop * size)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        return np.frombuffer(data, entry.dtype)

    return read


def _open_torch(path: Path) -> dict[str, Tensor]:
    """A PyTorch file, its tensors mapped from disk and not loaded."""
    if in_bucket(path):
        raise InputError(f"{path}: a PyTorch file must be on a file system; copy it there")
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"{path}: is a PyTorch file and PyTorch is not installed, which alone reads it without"
            " running code; pip install torch, or save the checkpoint as safetensors"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # torch raises a dozen kinds here, with messages of many lines.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{path}: refused by torch.load(weights_only=True, mmap=True)"
            f" ({quoted(reason[0])}); save the checkpoint as safetensors"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise InputError(f"{path}: is not a state dict of tensors; save model.state_dict()")
    return {
        name: _torch_tensor(path, name, tensor, order)
        for order, (name, tensor) in enumerate(state.items())
    }


def _torch_tensor(path: Path, name: str, tensor: Any, order: int) -> Tensor:
    import torch  # pyright: ignore[reportMissingImports]

    kinds = {
        torch.bfloat16: (torch.int16, np.dtype(ml_dtypes.bfloat16)),
        torch.float16: (torch.int16, np.dtype(np.float16)),
        torch.float32: (torch.int32, np.dtype(np.float32)),
        torch.float64: (torch.int64, np.dtype(np.float64)),
        **{
            # Of quantized weights.
            getattr(torch, name): (getattr(torch, name), np.dtype(name))
            for name in ("int64", "int32", "int8", "uint8")
        },
    }
    if tensor.dtype not in kinds or tensor.layout != torch.strided:
        raise InputError(
            f"{path}: tensor {quoted(name)} has the dtype {tensor.dtype} ({tensor.layout}), which"
            " is not read; save it as bfloat16, float16 or float32"
        )
    bits, dtype = kinds[tensor.dtype]

    def read(start: int, stop: int) -> np.ndarray:
        # Viewed as integers: no conversion can change a NaN's payload.
        flat = tensor.detach().view(bits).reshape(-1)
        return flat[start:stop].numpy().view(dtype)

    return Tensor(tuple(tensor.shape), dtype, (path.name, order), read)
