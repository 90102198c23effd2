"""One interface for every kind of MODEL folder.

`open_model` accepts a folder in Hugging Face form, one that `convert` made, and a training run's.
All give our parameters block by block, for loading, exporting and inspecting.
"""

import fnmatch
import functools
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from echovlm_jax.config import ModelConfig, from_hf
from echovlm_jax.convert import few_bits, table
from echovlm_jax.convert import source as sources
from echovlm_jax.convert.quantized import (
    QUANTIZED_FILES,
    dequantized,
    quantization,
    without_quantization,
)
from echovlm_jax.convert.run import open_run
from echovlm_jax.convert.source import WEIGHT_DTYPES
from echovlm_jax.convert.table import quoted
from echovlm_jax.errors import InputError
from echovlm_jax.memory import peak_rss_bytes as peak_rss_bytes  # for those who report it
from echovlm_jax.model import param_specs
from echovlm_jax.quantize import takes
from echovlm_jax.storage import digests
from echovlm_jax.storage import writer as store
from echovlm_jax.storage.arrays import (
    AGAIN,
    Index,
    Reader,
    Take,
    array_key,
    inside,
    piece_shape,
)
from echovlm_jax.storage.files import as_path, in_bucket, write_bytes, write_json
from echovlm_jax.storage.layout import CONFIG, PARAMS, REPORT, SUMS, TREE, run_step
from echovlm_jax.storage.verify import check_files

# Beside the weights: tokenizer, processor, chat template, licence.
_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")


class StoredModel(Protocol):
    """An open model folder.

    Attributes:
      folder: where its configuration and tokenizer files are.
      config: its configuration.
      dtypes: every parameter's stored dtype, by path; of a quantized one the dtype that it had.
      quantized: in what form quantized parameters are stored; None where there are none.
      duplicates: a tied checkpoint's stored lm_head → the tensor that it repeats.
      digests: SHA-256 of every tensor's stored bytes by released name, where they were recorded.
    """

    folder: Path
    config: ModelConfig
    dtypes: dict[str, np.dtype]
    duplicates: dict[str, str]
    digests: dict[str, str]
    quantized: few_bits.FewBits | None

    def read(self, path: str, index: Index) -> np.ndarray:
        """One block of one parameter, or of a stored array of a quantized one."""
        ...

    def read_blocks(self, path: str, indices: Sequence[Index], take: Take) -> None:
        """Several blocks of one parameter, part by part; see `storage.arrays.Reader`."""
        ...


def open_model(path: str | os.PathLike[str], *, quantized: bool = False) -> StoredModel:
    """Opens a MODEL folder without reading its weights.

    Args:
      path: the folder.
      quantized: whether its parameters may be stored in few bits.

    Raises:
      InputError: it is neither form, or what it holds does not fit its config.json.
    """
    opened = _open(as_path(path))
    if opened.quantized and not quantized:
        raise InputError(
            f"{path}: its weights are quantized ({opened.quantized.kind}), for `generate`, `eval`"
            " and `train` with the key quantize; give the checkpoint that it was converted from"
        )
    return opened


def _open(folder: Path) -> StoredModel:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a model folder")
    if run := open_run(folder):
        return run
    if not (folder / CONFIG).is_file():
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give a model folder")
        raise InputError(f"{folder}: has no {CONFIG}; give a checkpoint or a converted folder")
    if (folder / PARAMS / TREE).is_file():
        return _Converted(folder)
    if sources.weight_file(folder) is None:
        raise InputError(
            f"{folder}: no weights; looked for {PARAMS}/{TREE} (made by convert),"
            f" {sources.LOOKED_FOR}"
        )
    return _HuggingFace(folder)


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a model folder. Raises InputError as `config.from_hf` does."""
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{path}: is missing; copy the checkpoint's own {CONFIG} there")
    return from_hf(sources.read_json(path), source=str(path))


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    once: bool = False,
    gone: Mapping[str, sources.Gone] | None = None,
) -> tuple[sources.Source, ModelConfig]:
    """Opens a folder in Hugging Face form, as `source.open_source` does, with its configuration.
    Quantized weights are read as floats.

    Raises:
      InputError: as there; its configuration is not one; its weights are quantized in a way that
        isn't read.
    """
    where = as_path(path)
    refuse_run(where)
    method = quantization(where.parent if where.is_file() else where)
    source = sources.open_source(where, once=once, gone=gone)
    config = read_config(source.folder)
    return dequantized(source, method, table.slots(config)), config


def refuse_run(path: Path) -> None:
    """Raises InputError where a Hugging Face folder is asked for and a training run's is given."""
    if run_step(path):
        raise InputError(
            f"{path}: is a training run's; make a Hugging Face folder of it first, with `echovlm"
            " export`"
        )


class _Converted:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        report = sources.read_json(folder / REPORT) if (folder / REPORT).is_file() else {}
        if not isinstance(report, dict):
            raise InputError(f"{folder / REPORT}: is not a JSON object; {AGAIN}")
        chunks = _chunks(report, folder / REPORT)
        sums = _check_small(folder, expected=chunks is not None)
        self.config = read_config(folder)
        # An older model without digests of chunks: its files are read whole first.
        whole = functools.partial(check_files, folder, AGAIN, added=True)
        check = whole if sums and chunks is None else None
        self._reader = Reader(folder / PARAMS, chunks=chunks, check=check)
        self.quantized = few_bits.read(report, folder / REPORT)
        self.dtypes = _dtypes(folder, self.config, self._reader, self.quantized)
        self.read, self.read_blocks = self._reader.read, self._reader.read_blocks
        self.duplicates: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        slots = table.slots(self.config)
        self.duplicates = _names(report, "duplicates", folder / REPORT)
        for name, original in self.duplicates.items():
            if name in slots or original not in slots:
                raise InputError(
                    f"{folder / REPORT}: duplicates says that {quoted(name)} repeats"
                    f" {quoted(original)}, which does not fit {CONFIG}; convert again"
                )
        self.digests = _names(report, "sha256", folder / REPORT)


def _dtypes(
    folder: Path, config: ModelConfig, reader: Reader, form: few_bits.FewBits | None
) -> dict[str, np.dtype]:
    """Every parameter's dtype. Raises InputError where the arrays are not the configuration's."""
    specs, out = param_specs(config), dict(reader.dtypes)
    expected: dict[str, tuple[int, ...]] = {}
    for path, spec in specs.items():
        if not form or not takes(path, spec):
            expected[path] = spec.shape
            continue
        for array, (shape, dtype, _) in form.arrays(path, spec).items():
            expected[array] = shape
            if (found := out.pop(array, dtype)) != dtype:
                raise InputError(f"{folder}: {array} is {found}, expected {dtype}; {AGAIN}")
        out[path] = np.dtype(jnp.dtype(form.dtype))
    for path in sorted(expected.keys() | reader.shapes.keys()):
        wanted, found = expected.get(path), reader.shapes.get(path)
        if wanted != found:
            raise InputError(
                f"{folder}: parameter {path} has shape {found and list(found)}, expected"
                f" {wanted and list(wanted)} by {CONFIG}; {AGAIN}"
            )
    return out


def _names(report: dict[str, Any], key: str, path: Path) -> dict[str, str]:
    """A part of the report that maps tensor names to text."""
    found = report.get(key, {})
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise InputError(f"{path}: {key} is not an object of strings; convert again")
    return found


def _chunks(report: dict[str, Any], path: Path) -> dict[str, list[str]] | None:
    """The digests of each array's chunks; None in a report from before there were any."""
    if (found := report.get("chunks")) is None:
        return None
    if isinstance(found, dict) and all(isinstance(each, list) for each in found.values()):
        return {array_key(path): each for path, each in found.items()}
    raise InputError(f"{path}: chunks is not an object of lists; {AGAIN}")


def _check_small(folder: Path, *, expected: bool) -> bool:
    """Checks a converted folder's files except arrays, which are checked when they are read.

    Args:
      folder: the converted folder.
      expected: whether it must have digests.

    Returns:
      whether it has digests.

    Raises:
      InputError: a file differs from its digest or is missing; digests are missing.
    """
    if digests.read(folder) == digests.MISSING and not expected:
        _say(f"{folder}: has no {SUMS}; unchecked: it may have changed since it was converted")
        return False
    added = check_files(folder, AGAIN, data=False, added=True)
    if used := sorted(set(added) & {path.name for path in side_files(folder)}):
        _say(f"{folder}: {', '.join(used)}: added since it was converted; unchecked")
    return True


def _say(line: str) -> None:
    print(f"echovlm: {line}", file=sys.stderr)


class _HuggingFace:
    quantized: few_bits.FewBits | None = None  # another's quantized weights are read as floats

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._source, self.config = open_checkpoint(folder)
        self._slots = table.slots(self.config)
        shapes = {name: tensor.shape for name, tensor in self._source.tensors.items()}
        match = table.match(self._slots, shapes, str(folder))
        self._found = match.found
        self.dtypes = leaf_dtypes(self._source, self._slots, match)
        self.duplicates = match.duplicates
        self.digests: dict[str, str] = {}
        check_duplicates(self._source, match)
        self._places: dict[str, dict[tuple[int, ...], table.Slot]] = {}
        for slot in self._slots.values():
            self._places.setdefault(slot.path, {})[slot.index] = slot

    def read(self, path: str, index: Index) -> np.ndarray:
        out = np.empty(piece_shape(index), self.dtypes[path])
        places = self._places[path]
        stacked = len(next(iter(places)))
        lead, rest = index[:stacked], index[stacked:]
        first = rest[0]
        for place in np.ndindex(*piece_shape(lead)):
            where = tuple(s.start + i for s, i in zip(lead, place, strict=True))
            slot = places[where]
            tensor = self._source.tensors[self._found[slot.name]]
            row = slot.size // slot.part[0]
            values = tensor.read(first.start * row, first.stop * row)
            block = values.reshape(first.stop - first.start, *slot.part[1:])
            out[place] = block[(slice(None), *rest[1:])]
        return out

    def read_blocks(self, path: str, indices: Sequence[Index], take: Take) -> None:
        for number, index in enumerate(indices):
            for cut in store.pieces(piece_shape(index), self.dtypes[path].itemsize):
                take(number, cut, self.read(path, inside(cut, index)))


def leaf_dtypes(
    source: sources.Source,
    wanted: Mapping[str, table.Slot],
    match: table.Match,
    target: np.dtype | None = None,
) -> dict[str, np.dtype]:
    """The dtype of every parameter: the checkpoint's own, or `target` where one is given.

    Raises:
      InputError: a tensor is not a floating-point weight, or the layers of one parameter differ.
    """
    out: dict[str, np.dtype] = {}
    first: dict[str, str] = {}
    for released, name in match.found.items():
        dtype, path = source.tensors[name].dtype, wanted[released].path
        if dtype.name not in WEIGHT_DTYPES:
            raise InputError(
                f"{source.folder}: {name} has the dtype {dtype.name}; weights must be one of"
                f" {', '.join(WEIGHT_DTYPES)}"
            )
        dtype = target or dtype
        if out.setdefault(path, dtype) != dtype:
            raise InputError(
                f"{source.folder}: {first[path]} is {out[path].name} and {name} is {dtype.name},"
                " and they are layers of one parameter; convert with --dtype"
            )
        first.setdefault(path, name)
    return out


def check_duplicates(source: sources.Source, match: table.Match) -> None:
    """A tied checkpoint may repeat the embedding as lm_head: then bit for bit, or InputError."""
    for name, original in match.duplicates.items():
        head, embedding = source.tensors[name], source.tensors[match.found[original]]
        if {head.order[0], embedding.order[0]} & source.gone.keys():
            continue  # compared before the file was deleted
        same = head.dtype == embedding.dtype
        size = int(np.prod(head.shape))
        step = store.CHUNK_BYTES // head.dtype.itemsize
        for start in range(0, size if same else 0, step):
            stop = min(start + step, size)
            a, b = head.read(start, stop), embedding.read(start, stop)
            same = same and np.array_equal(a.view(np.uint8), b.view(np.uint8))
        if not same:
            raise InputError(
                f"{source.folder}: {name} differs from {match.found[original]}, and {CONFIG} says"
                " tie_word_embeddings true; set it to false or drop the tensor"
            )


def as_dtype(value: Any) -> np.dtype | None:
    """A weight dtype by name or as a dtype; None stays None. Raises InputError for another."""
    if value is None:
        return None
    try:
        # A string is looked up: numpy would parse it, as a list of fields for one.
        name = value if isinstance(value, str) else np.dtype(value).name
    except (TypeError, ValueError):
        name = None
    if name not in WEIGHT_DTYPES:
        raise InputError(
            f"dtype {quoted(value)} is not supported; choose one of {', '.join(WEIGHT_DTYPES)}"
        )
    return np.dtype(jnp.dtype(name))


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Values in another float dtype. Raises InputError where that makes an infinity."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        out = values.astype(dtype)
        if np.dtype(dtype) == np.float16 and (np.isinf(out) & ~np.isinf(values)).any():
            raise InputError(f"{name} holds values too large for float16; choose bfloat16")
    return out


def copy_side_files(
    folder: Path,
    target: Path,
    dtype: np.dtype | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Copies the files beside the weights, without what says that they were quantized. `dtype` is
    written into config.json; `config` replaces its content."""
    # config.json last: a folder of a bucket is a model from then on.
    for path in sorted(side_files(folder), key=lambda path: path.name == CONFIG):
        if path.name not in QUANTIZED_FILES:
            write_bytes(target / path.name, path.read_bytes())
    found = json.loads(json.dumps(config) if config else (target / CONFIG).read_text("utf-8"))
    raw = without_quantization(found)
    if dtype is None and config is None and raw == found:
        return
    for part in (raw, raw.get("text_config"), raw.get("vision_config")) if dtype else ():
        for key in ("torch_dtype", "dtype"):
            if isinstance(part, dict) and key in part:
                part[key] = dtype.name  # type: ignore[union-attr]
    write_json(target / CONFIG, raw)


def side_files(folder: Path) -> list[Path]:
    """The files beside a model's weights: tokenizer, processor, chat template, licence."""
    return sorted(
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _SIDE_FILES)
        and path.name != REPORT
        and not path.name.endswith(".index.json")
        and path.is_file()
    )


def check_new(path: Path) -> None:
    """Refuses an existing path, except for an empty folder. Raises InputError."""
    if path.is_symlink():
        raise InputError(f"{path}: is a link; delete it, or name the place that it points to")
    if any(path.iterdir()) if path.is_dir() else path.exists():
        mend = "" if path == path.parent else "delete it or "
        raise InputError(f"{path}: exists; {mend}choose another place")


def check_space(path: Path, needed: int) -> None:
    """Refuses more bytes than are free on the disk of a folder; a bucket has no limit."""
    if in_bucket(path):
        return
    free = shutil.disk_usage(path).free
    if free < needed:
        raise InputError(f"{path}: {needed:,} bytes needed, {free:,} bytes free; free some space")
