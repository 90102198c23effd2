"""Where a file is and what it is (told by its first bytes), and small JSON files read with one-line
errors."""

import contextlib
import io
import json
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path, PosixPath
from typing import Any, BinaryIO

from echovlm_jax.errors import InputError
from echovlm_jax.storage.files import in_bucket

MAX_JSON_BYTES = 64 * 2**20  # the largest tokenizer.json in use is about 35 MB


def shown(path: str | Path) -> str:
    """A path as errors show it: always one line."""
    return "".join(c if c.isprintable() else "?" for c in str(path))


class ExtraMissing(InputError):
    """A file needs a package that only an extra of this project installs."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what}; pip install 'echovlm-jax[{extra}]' to read it")
        self.what, self.extra = what, extra


class Outside(InputError):
    """A path leads out of the folder that it may not leave."""


class Located(PosixPath):
    """A file that data named, by the path it really has: no link is in it.

    `open_file` takes the steps from `base` one by one and follows no link: one that was put there
    after `locate` looked leads nowhere.
    """

    base: Path = Path("/")  # the folder that it lies in
    name_in_data: str = ""  # relative to folders[0]; links not resolved
    folders: tuple[Path, ...] = ()  # as `locate` was given them


def locate(path: str, *folders: Path) -> Located:
    """The file that a path in data names.

    Args:
      path: relative to folders[0], or absolute and inside it; "\\" separates too, as on Windows.
      folders: the folder that the path may not leave, and those that links in it may lead to; all
        of them with links resolved.

    Raises:
      Outside: the path or a link leads out.
      InputError: there is no such file.
    """
    name = path
    if "\\" in path and not _exists(folders[0] / path):  # a name may hold one, here
        name = path.replace("\\", "/")
    inside = Path(name)
    if inside.is_absolute() and inside.is_relative_to(folders[0]):
        inside = inside.relative_to(folders[0])
    if not path or "\0" in path:
        raise Outside(f"{shown(path) or 'an empty text'}: is not a path")
    if ".." in inside.parts or path.startswith("\\"):
        raise Outside(f"{shown(path)}: leads out of the folder")
    try:
        real = (folders[0] / inside).resolve()  # an absolute path: itself
    except (OSError, RuntimeError, ValueError):  # links in a circle, a name beyond the limit
        raise InputError(f"{shown(path)}: no such file") from None
    roots = folders if not inside.is_absolute() else folders[:1]
    root = next((folder for folder in roots if real.is_relative_to(folder)), None)
    if root is None and inside.is_absolute():
        raise Outside(f"{shown(path)}: lies outside the folder")
    if root is None:
        raise Outside(
            f"{shown(path)}: a link leads out of the folder; --allow-links ROOT accepts links that"
            " stay inside ROOT"
        )
    if not _exists(real):
        raise InputError(f"{shown(path)}: no such file")
    found = Located(real)
    found.base, found.name_in_data, found.folders = root, str(inside), folders
    return found


def allowed_links(root: str | Path | None) -> list[Path]:
    """The value of --allow-links as `locate` takes it. Raises InputError where it is no folder."""
    if root is None:
        return []
    found = Path(root).resolve()
    if not found.is_dir():
        raise InputError(f"--allow-links {shown(root)}: no such folder")
    return [found]


def locate_beside(path: str | Path, name: str) -> Located:
    """The file `name` that goes with `path`, from its folder (as named, where that is a link).

    Raises InputError as `locate`.
    """
    if PosixPath(name).is_absolute():
        raise Outside(f"{shown(name)}: leads out of the folder")
    if isinstance(path, Located):
        return locate(str(PosixPath(path.name_in_data).parent / name), *path.folders)
    return locate(name, Path(os.path.abspath(path)).parent.resolve())


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def open_file(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading bytes.

    Raises:
      InputError: it can't be opened, or is a pipe, a device or a folder, any of which could block
        or never end.
    """
    # Without O_NONBLOCK, opening a pipe waits for its writer, perhaps forever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    located = isinstance(path, Located)
    try:
        descriptor = _open_without_links(path, flags) if located else os.open(path, flags)
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(path)}: can't be read ({_reason(error)})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{shown(path)}: can't be read (it is not a regular file)") from None
    return os.fdopen(descriptor, "rb")


@contextlib.contextmanager
def reading(
    path: str | Path, damaged: str = "", errors: tuple[type[Exception], ...] = ()
) -> Iterator[BinaryIO]:
    """An open file; what is raised while it is read becomes one line that begins with its name.

    Args:
      path: the file.
      damaged: the text for an error of `errors`; an OSError with a reason of its own says that.
      errors: exceptions of a parser on damaged bytes. Their messages may quote the file.
    """
    with open_file(path) as file:
        try:
            yield file
        except ExtraMissing as error:
            raise ExtraMissing(f"{shown(path)}: {error.what}", error.extra) from None
        except InputError as error:
            raise InputError(f"{shown(path)}: {error}") from None
        except Exception as error:
            if isinstance(error, OSError) and error.strerror:
                raise InputError(f"{shown(path)}: can't be read ({error.strerror})") from None
            if not isinstance(error, errors):
                raise
            raise InputError(f"{shown(path)}: {damaged}") from None


def _open_without_links(path: Located, flags: int) -> int:
    folder = os.open(path.base, os.O_RDONLY | os.O_DIRECTORY)
    try:
        *steps, name = path.relative_to(path.base).parts or (".",)
        for step in steps:
            inner = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=folder)
    finally:
        os.close(folder)


STILLS = ("png", "jpeg", "bmp", "tiff", "webp", "gif", "jp2")  # some hold loops as well
VIDEOS = ("avi", "mov", "matroska", "mpeg", "mpegvideo", "mpegts", "asf")  # FFmpeg's names
VOLUMES = ("nifti", "metaimage")
_BEGINNINGS = {
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpeg",
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "tiff"),
    **dict.fromkeys((b"GIF87a", b"GIF89a"), "gif"),
    **dict.fromkeys((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"), "jp2"),
    b"\x1a\x45\xdf\xa3": "matroska",
    b"\0\0\x01\xba": "mpeg",
    b"\0\0\x01\xb3": "mpegvideo",
    bytes.fromhex("3026b2758e66cf11"): "asf",
}
_PHONE_STILLS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis")
_BMP_HEADERS = (12, 40, 52, 56, 108, 124)  # bytes, by the version of the form
_READ = (
    "PNG, JPEG, DICOM, BMP, TIFF, WebP, GIF, JPEG 2000, a video (AVI, MP4, MOV, MKV, MPEG, WMV),"
    " NIfTI or MetaImage"
)


def file_kind(path: str | Path) -> str:
    """'dicom', or one of STILLS, VIDEOS and VOLUMES, by content; the name's ending is not looked
    at.

    Raises:
      InputError: the file can't be read or is none of them.
    """
    with reading(path) as file:
        head = file.read(4096)
    if not head:
        raise InputError(f"{shown(path)}: the file is empty")
    if head[4:8] == b"ftyp" and head[8:12] in _PHONE_STILLS:
        raise InputError(f"{shown(path)}: is HEIC or AVIF, which is not read; save it as PNG")
    if kind := kind_of_bytes(head):
        return kind
    if head.startswith(b"\x1f\x8b"):
        raise InputError(f"{shown(path)}: is a gzip file, and no NIfTI image is in it")
    raise InputError(f"{shown(path)}: is none of {_READ}, whatever its name says")


def kind_of_bytes(head: bytes) -> str | None:
    """`file_kind` of a file that begins with `head`; None where it is nothing known."""
    # First, as a DICOM file may begin as a TIFF file does; PNG and JPEG have pixels there.
    if is_dicom(head) and not head.startswith((b"\x89PNG", b"\xff\xd8\xff")):
        return "dicom"
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if head.startswith(b"RIFF"):
        return {b"AVI ": "avi", b"WEBP": "webp"}.get(head[8:12])
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "bmp"
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return "mov"
    if head[:1] == b"G" and head[188:189] == head[376:377] == b"G":
        return "mpegts"
    if head.startswith(b"\x1f\x8b"):
        try:
            inner = zlib.decompressobj(wbits=31).decompress(head, 1024)
        except zlib.error:
            return None
        return "nifti" if kind_of_bytes(inner) == "nifti" else None
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0"):
        return "nifti"
    first = head.lstrip().split(b"=", 1)[0].strip()
    if first in (b"ObjectType", b"NDims", b"Comment", b"ObjectSubType") and b"DimSize" in head:
        return "metaimage"
    return None


# Value representations of the elements that a DICOM data set can begin with.
_FIRST_VRS = {b"UL", b"CS", b"UI", b"DA", b"LO", b"OB", b"TM", b"ST", b"SH"}


def is_dicom(head: bytes) -> bool:
    """Whether a file's first 132 bytes begin a DICOM file.

    Some devices leave out the preamble, or the file meta information as well: then the first
    element must be of group 2 or 8, and state a VR or a length that such an element can have.
    """
    if head[128:132] == b"DICM" or head.startswith(b"DICM\2\0"):
        return True
    little, big = head[:2] in (b"\2\0", b"\x08\0"), head[:2] == b"\0\x08"
    if (little or big) and head[4:6] in _FIRST_VRS:
        return True
    length = int.from_bytes(head[4:8], "little")
    after = head[8 + length : 10 + length]
    return head[:2] == b"\x08\0" and length <= 64 and after in (b"\x08\0", b"\x10\0")


def with_preamble(file: BinaryIO) -> BinaryIO:
    """A DICOM file as its readers want it, where it begins with the "DICM" behind the preamble."""
    file.seek(0)
    lacks = file.read(4) == b"DICM"
    file.seek(0)
    return io.BufferedReader(_Preamble(file)) if lacks else file


class _Preamble(io.RawIOBase):
    """A file behind 128 zeros."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._at = file, 0
        self.name = file.name  # which pydicom asks for

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 2:
            self._at = self._file.seek(offset, 2) + 128
        else:
            self._at = offset + (self._at if whence else 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        zeros = max(0, 128 - self._at)
        if not zeros:
            self._file.seek(self._at - 128)
        data = b"\0" * min(zeros, len(buffer)) if zeros else self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def read_bytes(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """A regular file of bounded size. Raises InputError."""
    if in_bucket(path):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{shown(path)}: can't be read ({error.strerror})") from None
    else:
        with reading(path) as file:
            data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"{shown(path)}: is larger than {limit} bytes")
    return data


def read_text(path: Path, limit: int = MAX_JSON_BYTES) -> str:
    """A UTF-8 text file of bounded size, its line ends made plain. Raises InputError."""
    try:
        text = read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{shown(path)}: is not UTF-8 text") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError when it is anything else."""
    try:
        value = json.loads(read_text(path))
    except InputError:
        raise
    except (ValueError, RecursionError):  # ValueError also for a number of too many digits
        raise InputError(f"{shown(path)}: is not valid JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{shown(path)}: must hold a JSON object, found {type(value).__name__}")
    return value


def read_json_if_there(path: Path) -> dict[str, Any] | None:
    """`read_json`, or None where there is no such file."""
    return read_json(path) if path.is_file() else None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
