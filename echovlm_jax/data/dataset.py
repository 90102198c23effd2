"""Where records come from: the interface, and the reader of folders that `data build` made."""

import json
import mmap
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from echovlm_jax.data import folder
from echovlm_jax.data.record import Record
from echovlm_jax.errors import InputError
from echovlm_jax.processing.files import shown
from echovlm_jax.processing.stills import decode_image
from echovlm_jax.storage.files import local_path
from echovlm_jax.storage.retry import patiently, system_error

_Found = TypeVar("_Found")

PHANTOM = "phantom"
_READER = "readahead_buffer_size:0,max_parallelism:0"  # what suits random access


class Dataset(Protocol):
    """Exams by number. Cheap to pickle, and safe to read from several threads.

    Attributes:
      fingerprint: hexadecimal; differs where any content differs.
      organs: int16 [N], each record's index into `organ_names`.
      organ_names: in the order of their indices.
      num_frames: the most that a loop was sampled to; None where that isn't known.
    """

    fingerprint: str
    organs: np.ndarray
    organ_names: tuple[str, ...]
    num_frames: int | None

    def __len__(self) -> int: ...

    def record(self, i: int) -> Record:
        """The texts and sizes of exam `i`; no pixels are read."""
        ...

    def media(self, i: int) -> list[np.ndarray]:
        """Its pixels, as `record(i).media` says: uint8 RGB [H, W, 3], of a video [T, H, W, 3]."""
        ...


def open_dataset(data: str | Path, split: str = "train") -> Dataset:
    """A split of a dataset.

    Args:
      data: a folder made by `echovlm data build`, or "phantom": exams made as they are asked for.
      split: "train", or another split of the folder.

    Raises:
      InputError: there is no such dataset or split, or it is damaged.
    """
    if str(data) == PHANTOM:
        from echovlm_jax.phantom import PhantomDataset

        return PhantomDataset(split)
    return FolderDataset(data, split)


def split_names(data: str | Path) -> tuple[str, ...]:
    """The splits of a dataset. Raises InputError where there is none."""
    if str(data) == PHANTOM:
        from echovlm_jax.phantom.dataset import SIZES

        return tuple(SIZES)
    return tuple(folder.read_manifest(local_path(data))["splits"])


class FolderDataset:
    """A `Dataset` on disk. Everything that is read is checked against digests made at the build."""

    def __init__(self, root: str | Path, split: str = "train") -> None:
        self._root = local_path(root)
        self._split = split
        self._open()

    def _open(self) -> None:
        manifest = folder.read_manifest(self._root)
        splits = manifest["splits"]
        if self._split not in splits:
            raise InputError(
                f"{shown(self._root)}: has no split {self._split!r}; it has {', '.join(splits)}"
            )
        entry = splits[self._split]
        self.fingerprint: str = entry["fingerprint"]
        self.organ_names: tuple[str, ...] = tuple(manifest["organs"])
        self.num_frames: int | None = manifest.get("num_frames")
        self._shards: list[dict[str, Any]] = entry["shards"]
        self._index = folder.read_index(self._root / folder.index_name(self._split), entry)
        self.organs = np.ascontiguousarray(self._index["organ"][:-1])
        self._ends = np.cumsum([shard["records"] for shard in self._shards])
        for shard in self._shards:
            _check_size(self._root / shard["name"], shard["bytes"])
        self._path = self._root / folder.records_name(self._split)
        _check_size(self._path, int(self._index["offset"][-1]))
        with _read(lambda: open(self._path, "rb"), self._path) as file:
            # Pages that the system drops and reads again as it likes: nothing is held in memory.
            self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.organs)

    def __getstate__(self) -> tuple[Path, str]:
        return self._root, self._split

    def __setstate__(self, state: tuple[Path, str]) -> None:
        self._root, self._split = state
        self._open()

    def record(self, i: int) -> Record:
        return folder.record_of(self._line(i))

    def media(self, i: int) -> list[np.ndarray]:
        line = self._line(i)
        name = f"{shown(self._root)}: record {line['id']}"
        images = folder.images_of(self._example(i, line["digest"]))
        frames = [decode_image(image, name) for image in images]
        out, start = [], 0
        for count, *_ in line["media"]:
            stop = start + max(count, 1)
            out.append(np.stack(frames[start:stop]) if count else frames[start])
            start = stop
        return out

    def _line(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        start, stop = (int(self._index["offset"][j]) for j in (i, i + 1))
        line = self._lines[start:stop]
        if zlib.crc32(line) != int(self._index["crc"][i]):
            raise _damaged(self._path)
        return json.loads(line)

    def _example(self, i: int, digest: str) -> bytes:
        """The stored bytes of exam `i`."""
        number = int(np.searchsorted(self._ends, i, side="right"))
        shard = self._shards[number]
        path = self._root / shard["name"]
        position = i - int(self._ends[number] - shard["records"])

        def read() -> bytes:
            try:
                return self._reader(number, path).read([position])[0]
            except (RuntimeError, ValueError, IndexError) as error:  # the C++ reader's, also damage
                raise system_error(str(error)) or _damaged(path) from None

        data = _read(read, path)
        if folder.digest(data) != digest:
            raise _damaged(path)
        return data

    def _reader(self, number: int, path: Path) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if number not in self._readers:
                self._readers[number] = ArrayRecordReader(
                    str(path), _READER, file_reader_buffer_size=2**15
                )
            return self._readers[number]


def _check_size(path: Path, size: int) -> None:
    if _read(path.stat, path).st_size != size:
        raise _damaged(path)


def _read(read: Callable[[], _Found], path: Path) -> _Found:
    """`patiently`; what does not pass is an InputError."""
    try:
        return patiently(read, path)
    except OSError as error:
        raise InputError(
            f"{shown(path)}: can't be read ({error.strerror}); mend that, or build the dataset"
            " again"
        ) from None


def _damaged(path: Path) -> InputError:
    return InputError(
        f"{shown(path)}: is not what `data build` wrote; build the dataset again, or copy it again"
    )
