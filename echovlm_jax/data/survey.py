"""The second look of `data build`: every picture, before any is stored.

It finds out what only the pictures know: which records show the same one under two names, whose a
DICOM file is, what is nearly alike; and it takes a digest of every file's bytes, so that a build
that resumes reuses nothing that was made of other pictures.

It is cut into jobs of so many records, each of which writes what it saw into the work folder. A
build that resumes digests every file again, and decodes only those that have changed.
"""

import contextlib
import hashlib
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from echovlm_jax.data.forms import media_paths
from echovlm_jax.data.groups import HASH_BYTES, NUMBERS, TIE, key_of
from echovlm_jax.data.media import read_medium
from echovlm_jax.data.official import MAX_IMAGES, inside
from echovlm_jax.data.quarantine import Refused
from echovlm_jax.data.sources import ROW, Sources, digest_of, read_rows
from echovlm_jax.errors import InputError
from echovlm_jax.processing.dicom_identity import Identity, dicom_identity
from echovlm_jax.processing.files import file_kind, shown
from echovlm_jax.processing.images import decode_image
from echovlm_jax.processing.volumes import picture_files

SURVEY, FOUND = "survey.json", "survey.bin"
LOOK = np.dtype(
    [
        ("row", "<i8"),
        ("size", "<i8"),  # bytes of the file
        ("bytes", "V16"),  # their digest; zeros: it can't be read
        ("file", "<u8"),  # keys, as of `groups`; 0: none
        ("pixels", "<u8"),
        ("dicom_patient", "<u8"),
        ("dicom_study", "<u8"),
        ("hash", "u1", (HASH_BYTES,)),  # perceptual; zeros: none
    ]
)
_TIES = ("file", "pixels", "dicom_patient", "dicom_study")
_SIDE = 16  # of the perceptual hash: 256 bits
_NOW, _EARLIER = ".now", ".earlier"  # looks of this run, and of one before it that was killed


class Seen(NamedTuple):
    """The findings about all records' pictures."""

    pictures: np.ndarray  # V16 [N]: a digest of the bytes of all pictures of a record
    ties: np.ndarray  # TIE
    row: np.ndarray  # int64 [P], of each picture its record
    hashes: np.ndarray  # uint8 [P, HASH_BYTES]
    size: int  # bytes of all pictures


def new_salt() -> bytes:
    return secrets.token_bytes(32)


def prepare(work: Path, found: Sources, plan: dict[str, Any], records: int) -> range:
    """Writes what the jobs read; returns their numbers."""
    found.rows.tofile(work / FOUND)
    jobs = range(-(-len(found.rows) // records))
    (work / SURVEY).write_text(json.dumps({**plan, "records": records}), "utf-8")
    names = {_name(number, plan) for number in jobs}
    for path in work.glob("look-*"):
        if path.with_suffix("").name not in names:
            path.unlink()
        elif path.suffix == _NOW:
            path.replace(path.with_suffix(_EARLIER))
    return jobs


def look(work: str, number: int, *, salt: bytes) -> int:
    """Looks at the pictures of job `number`. Returns its count of records."""
    folder = Path(work)
    plan = json.loads((folder / SURVEY).read_bytes())
    start = number * plan["records"]
    rows = np.memmap(folder / FOUND, ROW, mode="r")[start : start + plan["records"]]
    path = folder / (_name(number, plan) + _NOW)
    seen = _Pictures(plan, salt, _read(path.with_suffix(_EARLIER)))
    looks = []
    for n, (row, _, raw) in enumerate(read_rows(rows, plan["files"]), start):
        if not row["twice"]:
            looks += [(n, *picture) for picture in seen.of(raw)]
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        np.array(looks, LOOK).tofile(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(rows)


def gather(work: Path, jobs: range, plan: dict[str, Any], count: int) -> Seen:
    """Puts together what all jobs saw of `count` records."""
    pictures = np.full(count, np.void(_short(b"")))  # of no picture, where there is none
    ties, rows, hashes, size = [], [], [], 0
    for number in jobs:
        looks = _read(work / (_name(number, plan) + _NOW))
        if looks is None:
            raise InputError(f"{shown(work)}: look {number} is missing; run the same command again")
        starts = np.flatnonzero(np.diff(looks["row"], prepend=-1))
        stops = [*starts[1:], len(looks)]
        for start, stop in zip(starts, stops, strict=False):  # no start, no record
            digests = looks["bytes"][start:stop].tobytes()
            pictures[looks["row"][start]] = np.void(_short(digests))
        for kind in _TIES:
            some = looks[looks[kind] != 0]
            tie = np.zeros(len(some), TIE)
            tie["row"], tie["kind"], tie["key"] = some["row"], NUMBERS[kind], some[kind]
            ties.append(tie)
        rows.append(looks["row"].copy())
        hashes.append(looks["hash"].copy())
        size += int(looks["size"].sum())
    return Seen(pictures, np.concatenate(ties), np.concatenate(rows), np.concatenate(hashes), size)


def pictures_digest(files: list[Path]) -> bytes:
    """Of the bytes of a record's pictures, as `Seen.pictures` has it."""
    return _short(b"".join(_digest(file)[0] for file in files))


class _Pictures:
    """Looks at pictures; at each file once."""

    def __init__(self, plan: dict[str, Any], salt: bytes, earlier: np.ndarray | None) -> None:
        self._plan, self._salt = plan, salt
        self._seen: dict[Path, tuple[Any, ...]] = {}
        self._decoded: dict[bytes, tuple[int, bytes]] = {}
        for one in earlier if earlier is not None else ():
            if one["pixels"]:  # else it was refused, perhaps for a reason that is mended
                value = int(one["pixels"]), one["hash"].tobytes()
                self._decoded[one["bytes"].tobytes()] = value

    def of(self, raw: Any) -> Iterator[tuple[Any, ...]]:
        """Each picture of an entry, as LOOK without `row`."""
        if not isinstance(raw, dict):
            return
        try:
            paths = media_paths(raw)[:MAX_IMAGES]
        except Refused:
            return
        for path in paths:
            try:
                file = inside(Path(self._plan["images"]), path, *map(Path, self._plan["links"]))
            except Refused:  # of which the record will hear when it is read
                yield 0, b"\0" * 16, 0, 0, 0, 0, np.zeros(HASH_BYTES, np.uint8)
                continue
            if file not in self._seen:
                self._seen[file] = self._look(file)
            yield self._seen[file]

    def _look(self, file: Path) -> tuple[Any, ...]:
        digest, size = _digest(file)  # before it is decoded: see `pictures_digest` in parts
        pixels, perceived = self._decoded.get(digest, (0, b""))
        readable = bool(pixels)
        if not readable:
            with contextlib.suppress(Refused):
                plan = self._plan
                encoded = read_medium(file, num_frames=plan["num_frames"], crop=plan["crop"])
                pixels, perceived = self._keys(encoded.images)
                readable = True
        found = _identity(file) if readable else Identity("", "")
        return (
            size,
            digest,
            key_of("file", str(file), b""),
            pixels,
            key_of("dicom_patient", found.patient, self._salt) if found.patient else 0,
            key_of("dicom_study", found.study, self._salt) if found.study else 0,
            np.frombuffer(perceived or b"\0" * HASH_BYTES, np.uint8),
        )

    def _keys(self, images: tuple[bytes, ...]) -> tuple[int, bytes]:
        """The key of the pixels and the perceptual hash. Pictures of one colour have neither: an
        empty one is no sign that two exams are of one patient."""
        digest, empty = hashlib.blake2b(digest_size=16), True
        perceived = b""
        for n, image in enumerate(images):
            pixels = decode_image(image, "")
            digest.update(repr(pixels.shape).encode())
            digest.update(np.ascontiguousarray(pixels).data)
            empty = empty and bool((pixels == pixels[0, 0]).all())
            if n == len(images) // 2:
                perceived = perceptual_hash(pixels)
        return (0, b"") if empty else (key_of("pixels", digest.hexdigest(), b""), perceived)


def perceptual_hash(pixels: np.ndarray) -> bytes:
    """A difference hash: whether each of 16 × 16 places is brighter than the one to its left.

    Args:
      pixels: uint8 RGB [H, W, 3].
    """
    grey = Image.fromarray(pixels).convert("L")
    small = np.asarray(grey.resize((_SIDE + 1, _SIDE), Image.Resampling.LANCZOS))
    bits = small[:, 1:] > small[:, :-1]
    # Each 64-bit word has every fourth bit: one word alone tells most pictures apart.
    return np.packbits(bits.reshape(-1, 4).T).tobytes()


def _identity(file: Path) -> Identity:
    try:
        return dicom_identity(file) if file_kind(file) == "dicom" else Identity("", "")
    except InputError:
        return Identity("", "")


def _digest(file: Path) -> tuple[bytes, int]:
    try:
        files = picture_files(file)
        size = sum(one.stat().st_size for one in files)
        return _short("".join(map(digest_of, files)).encode()), size
    except (OSError, ValueError):  # an InputError too: the record will be refused
        return b"\0" * 16, 0


def _short(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _name(number: int, plan: dict[str, Any]) -> str:
    return f"look-{number:05d}-{plan['key']}"


def _read(path: Path) -> np.ndarray | None:
    try:
        return np.fromfile(path, LOOK)
    except OSError:
        return None
