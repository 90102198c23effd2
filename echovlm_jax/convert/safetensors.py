"""The safetensors file format: a validating reader and a streaming writer.

A file is 8 bytes of header length, a JSON header, and the tensors' bytes, one after another. Only
the header is ever read whole. https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from echovlm_jax.convert.table import quoted
from echovlm_jax.errors import InputError
from echovlm_jax.storage.bucket import BucketPath
from echovlm_jax.storage.files import new_file

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
        "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    }.items()
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The reference implementation's own limit.
MAX_HEADER_BYTES = 100_000_000
_MAX_RANK = 32
_MAX_BYTES = 2**60
_PAGE = 4096


@dataclass(frozen=True)
class Entry:
    """A tensor of a file; `offset` is its first byte, counted from the beginning of the file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Entry]:
    """A file's tensors, in the order of their bytes; the tensors themselves are not read.

    Raises:
      InputError: the file is truncated or not safetensors, or its header does not describe exactly
        the bytes that follow it.
    """
    if isinstance(path, BucketPath):
        return _read_object_header(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= MAX_HEADER_BYTES:
                raise InputError(
                    f"{path}: not a safetensors file (a header of {length} bytes in a file of"
                    f" {size}); fetch it again"
                )
            if 8 + length > size:
                raise InputError(
                    f"{path}: truncated: the header says {length} bytes, the file has {size};"
                    " fetch it again"
                )
            text = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    header = _parse(path, text)
    return _check_layout(path, header, 8 + length, size)


def _read_object_header(path: Any) -> dict[str, Entry]:
    """As `read_header`; a bucket lists no sizes, so the last byte is requested."""
    try:
        length = int.from_bytes(path.read_bytes(0, 8), "little")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise InputError(f"{path}: not a safetensors file; fetch it again")
        header = _parse(path, path.read_bytes(8, 8 + length))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    entries = [_entry(path, name, raw, 8 + length) for name, raw in header.items()]
    size = max((entry.offset + entry.nbytes for entry in entries), default=8 + length)
    if not path.ends_at(size):
        raise InputError(f"{path}: is not as long as its header says; fetch it again")
    return _check_layout(path, header, 8 + length, size)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                raise InputError(f"{path}: header has the key {quoted(key)} twice; fetch it again")
            out[key] = value
        return out

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except InputError:
        raise
    except (ValueError, RecursionError):
        raise InputError(f"{path}: header is not valid JSON; fetch the file again") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: header is not a JSON object; fetch the file again")
    header.pop("__metadata__", None)
    return header


def _check_layout(path: Path, header: Mapping[str, Any], start: int, size: int) -> dict[str, Entry]:
    """The tensors must lie one after another and fill the file: no gap, no overlap, no rest."""
    entries = {name: _entry(path, name, raw, start) for name, raw in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    end = start
    for name, entry in ordered.items():
        if entry.offset != end:
            fault = "overlaps the tensor before it" if entry.offset < end else "leaves a gap"
            raise InputError(f"{path}: tensor {quoted(name)} {fault}; fetch the file again")
        end += entry.nbytes
        if end > size:
            raise InputError(
                f"{path}: truncated: tensor {quoted(name)} ends at byte {end}, the file has {size};"
                " fetch it again"
            )
    if end != size:
        raise InputError(f"{path}: {size - end} bytes after the last tensor; fetch the file again")
    return ordered


def _entry(path: Path, name: str, raw: Any, start: int) -> Entry:
    label = f"{path}: tensor {quoted(name)}"
    if not isinstance(raw, dict) or not {"dtype", "shape", "data_offsets"} <= raw.keys():
        raise InputError(f"{label} lacks dtype, shape or data_offsets; fetch the file again")
    kind, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise InputError(
            f"{label} has the unknown dtype {quoted(kind)}; known are {', '.join(DTYPES)}"
        )
    if not _whole_numbers(shape) or len(shape) > _MAX_RANK:
        raise InputError(f"{label} has the bad shape {quoted(shape)}; fetch the file again")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{label} has bad data_offsets {quoted(offsets)}; fetch the file again")
    entry = Entry(tuple(shape), DTYPES[kind], start + offsets[0])
    if entry.nbytes != offsets[1] - offsets[0]:
        raise InputError(
            f"{label} of shape {quoted(shape)} and dtype {kind} needs {quoted(entry.nbytes)} bytes,"
            f" its data_offsets hold {offsets[1] - offsets[0]}; fetch the file again"
        )
    return entry


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(x, int) and not isinstance(x, bool) and 0 <= x <= _MAX_BYTES for x in value
    )


def open_file(path: Path, *, direct: bool = False) -> int:
    """A descriptor for `read_values`.

    `direct` goes past the page cache where the file system can: for files that are read once, and
    are larger than memory, filling the cache costs more than the reading.
    """
    if direct and hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            pass
    return os.open(path, os.O_RDONLY)


def read_values(fd: int, entry: Entry, start: int, stop: int) -> np.ndarray:
    """Values [start, stop) of a tensor, counted flat, out of an open file.

    Raises EOFError where the file has become shorter than its header said.
    """
    begin = entry.offset + start * entry.dtype.itemsize
    size = (stop - start) * entry.dtype.itemsize
    # Whole pages of the file into whole pages of memory, as direct reading asks for.
    skip = begin % _PAGE
    pages = -(-(skip + size) // _PAGE)
    memory = np.empty((pages + 1) * _PAGE, np.uint8)
    shift = -memory.ctypes.data % _PAGE
    block = memory[shift : shift + pages * _PAGE]
    done = 0
    while done < skip + size:
        got = os.preadv(fd, [block[done:].data], begin - skip + done)
        if got == 0:
            raise EOFError
        done += got
        if done < skip + size:
            done -= done % _PAGE
            if got < _PAGE:
                raise EOFError
    out = block[skip : skip + size]
    # A header of odd length puts the tensors where the processor can't read them in place.
    return (out if skip % entry.dtype.itemsize == 0 else out.copy()).view(entry.dtype)


def dtype_name(dtype: np.dtype) -> str:
    """The format's name of a numpy dtype, e.g. "BF16"."""
    return _NAMES[np.dtype(dtype)]


def write_file(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    values: Callable[[str], Any],
) -> None:
    """Writes one file, piece by piece, and makes it durable.

    Args:
      path: the file; on failure it is left behind unfinished, so write into a folder that is
        renamed afterwards.
      tensors: name → (shape, dtype), in the order of their bytes.
      values: called once a tensor; yields its values as arrays in row-major order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": dtype_name(dtype),
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            for piece in values(name):
                file.write(piece.reshape(-1).view(np.uint8).data)
        if file.tell() != 8 + len(text) + end:
            raise RuntimeError(f"{path}: wrote {file.tell() - 8 - len(text)} of {end} bytes")
