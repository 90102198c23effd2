"""gs:// and s3://: objects of a bucket, read and written by TensorStore, under pathlib's names.

Not `etils.epath`: without TensorFlow it needs gcsfs and s3fs, two clients with credentials,
endpoints and retries of their own beside TensorStore's, which writes the arrays in any case. And
Orbax writes no s3:// with it.

A bucket has neither folders nor renames: a folder is there while an object's name begins with its
name and a slash, and an object appears whole or not at all.
"""

from __future__ import annotations

import errno
import functools
import os
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

from echovlm_jax.errors import InputError

if TYPE_CHECKING:
    import tensorstore as ts

SCHEMES = ("gs://", "s3://")
# Retries of a request that fails: no connection, a timeout, HTTP 429 and 5xx. A minute in all.
_RETRIES = {"max_retries": 7, "initial_delay": "0.5s", "max_delay": "16s"}
# Retries of a bucket's first request: a wrong address is reported in seconds.
_FIRST_RETRIES = {"max_retries": 3, "initial_delay": "0.5s", "max_delay": "2s"}
_FIRST_SECONDS = 10.0
_REASON_CHARS = 200


class BucketPath:
    """An object's name, or a folder's; the part of `pathlib.Path` that is used here.

    Failures raise OSError, as a file's do. It is no local file: `open`, `Path` and others that need
    a file's name raise InputError.
    """

    def __init__(self, text: str) -> None:
        self._scheme, _, rest = text.partition("://")
        self._path = PurePosixPath(rest)
        if not self._path.parts or rest.startswith("/") or ".." in self._path.parts:
            raise InputError(f"{text}: names no bucket; write it like {self._scheme}://bucket/name")

    def __str__(self) -> str:
        return f"{self._scheme}://{self._path}"

    def __repr__(self) -> str:
        return f"BucketPath({str(self)!r})"

    def __fspath__(self) -> str:
        raise InputError(f"{self}: must be a local path here; mount the bucket or copy it")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: BucketPath) -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: object) -> BucketPath:
        return BucketPath(f"{self}/{name}")

    @property
    def name(self) -> str:
        return self._path.name if self._key else ""

    @property
    def suffix(self) -> str:
        return self._path.suffix

    @property
    def parent(self) -> BucketPath:
        return BucketPath(f"{self._scheme}://{self._path.parent}") if self._key else self

    def with_name(self, name: str) -> BucketPath:
        return self.parent / name

    def absolute(self) -> BucketPath:
        return self

    resolve = absolute

    def relative_to(self, other: object) -> PurePosixPath:
        return PurePosixPath(str(self)).relative_to(PurePosixPath(str(other)))

    def is_symlink(self) -> bool:
        return False

    def samefile(self, other: object) -> bool:
        return str(self) == str(other)

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return bool(self._key) and self._read(0, 0).state == "value"

    def is_dir(self) -> bool:
        """Lists all that is below: where a folder's files are known, ask for one of these."""
        return not self._key or bool(self.below())

    def iterdir(self) -> Iterator[BucketPath]:
        return (self / name for name in sorted({key.split("/")[0] for key in self.below()}))

    def below(self) -> list[str]:
        """The names of all objects below a folder, from it on."""
        cut = len(f"{self._key}/".encode()) if self._key else 0
        found = self._done(self._store.list(self._span(), strip_prefix_length=cut))
        if not found and self._scheme == "gs":
            # TensorStore's list is empty where Google refuses it; a read is refused then too.
            # until: tensorstore 0.2
            self._done(self._store.read(f"{self._key}/"))
        # Consoles make objects that stand for a folder.
        return sorted(key.decode() for key in found if key and not key.endswith(b"/"))

    def read_bytes(self, start: int | None = None, stop: int | None = None) -> bytes:
        """An object, or the bytes [start, stop) of it. Raises OSError, also where it is shorter."""
        found = self._read(start, stop)
        if found.state != "value":
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        return found.value

    def version(self) -> bytes:
        """The mark of what an object holds now."""
        return self._read(0, 0).stamp.generation

    def ends_at(self, size: int) -> bool:
        """Whether an object has so many bytes, at least one."""
        try:
            self.read_bytes(size - 1, size)
        except OSError:
            return False
        try:
            self.read_bytes(size, size + 1)
        except OSError:
            return True
        return False

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def read_stamped(self) -> tuple[bytes, bytes] | None:
        """An object and the mark of its version; None where there is none."""
        found = self._read(None, None)
        return (found.value, found.stamp.generation) if found.state == "value" else None

    def write_bytes(self, data: bytes) -> None:
        self._done(self._store.write(self._key, bytes(data)))

    def write_if(self, data: bytes | None, version: bytes | None) -> bytes | None:
        """Writes (None: deletes) an object if it is still at a version; None: if there is none.

        Returns:
          the new version; None where it was at another.
        """
        # TensorStore's mark of what is not there; it sends If-None-Match or ifGenerationMatch=0.
        equal = _ABSENT if version is None else version
        return self._done(self._store.write(self._key, data, if_equal=equal)).generation or None

    def unlink(self, missing_ok: bool = False) -> None:
        self._done(self._store.write(self._key, None))

    def delete_below(self) -> None:
        """Deletes all objects below a folder, which is no whole bucket."""
        assert self._key
        self._done(self._store.delete_range(self._span()))

    def kvstore(self) -> dict[str, Any]:
        """TensorStore's spec of a folder."""
        return _spec(self._scheme, self._path.parts[0]) | {"path": f"{self._key}/"}

    @property
    def _key(self) -> str:
        return "/".join(self._path.parts[1:])

    def _span(self) -> Any:
        """The range of the names of what is below a folder."""
        import tensorstore as ts

        # "0" follows "/".
        return ts.KvStore.KeyRange(*((f"{self._key}/", f"{self._key}0") if self._key else ()))

    @property
    def _store(self) -> ts.KvStore:
        return _open(self._scheme, self._path.parts[0])

    def _read(self, start: int | None, stop: int | None) -> Any:
        return self._done(self._store.read(self._key, byte_range=slice(start, stop)))

    def _done(self, future: Any) -> Any:
        try:
            return future.result()
        except ValueError as error:
            refused(error, str(self))


_ABSENT = b"\x02"


def refused(error: Exception, path: str) -> NoReturn:
    """Raises what TensorStore says as an OSError of one line."""
    line = (str(error).splitlines() or [""])[0]
    # A code comes first. NOT_FOUND is the bucket: an object that is not there is no error of its.
    text = re.sub(r"^[A-Z_]+: |All \d+ retry attempts failed: ", "", line.split(" [")[0])
    again = re.search(r"All (\d+) retry attempts failed", line)
    if found := re.search(r"\[http_response_code='(\d+)'\]", line):
        text = text.replace("Unknown", f"HTTP {found[1]}")  # a request without a body for reasons
        if found[1] in ("401", "403"):
            text = f"{text}; check the credentials and what they permit"
    tried = f", tried {int(again[1]) + 1} times" if again else ""
    raise OSError(errno.EIO, text[:_REASON_CHARS] + tried, path) from error


def retries() -> int:
    """How many requests TensorStore has made again, of all buckets."""
    if not _open.cache_info().currsize:
        return 0
    import tensorstore as ts

    found = [
        ts.experimental_collect_matching_metrics(f"/tensorstore/kvstore/{driver}/retries")
        for driver in ("gcs", "s3")
    ]
    return sum(value["value"] for metrics in found for one in metrics for value in one["values"])


def _spec(scheme: str, bucket: str, retries: dict[str, Any] = _RETRIES) -> dict[str, Any]:
    if scheme == "gs":  # credentials and TENSORSTORE_GCS_HTTP_URL are read by TensorStore
        return {"driver": "gcs", "bucket": bucket, "gcs_request_retries": retries}
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "s3_request_retries": retries}
    # TensorStore reads all that other clients of S3 read from the environment but the endpoint.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        spec["endpoint"] = endpoint
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # otherwise it looks into ~/.aws and logs what is not
        spec["aws_credentials"] = {"type": "environment"}
    return spec


@functools.cache
def _open(scheme: str, bucket: str) -> ts.KvStore:
    """A bucket that has answered once."""
    import tensorstore as ts  # here: `--help` need not wait for it

    name = f"{scheme}://{bucket}"
    try:
        first = ts.KvStore.open(_spec(scheme, bucket, _FIRST_RETRIES)).result()
        nothing = ts.KvStore.KeyRange("!echovlm/", "!echovlm0")
        first.list(nothing).result(timeout=_FIRST_SECONDS)
    except TimeoutError:
        raise OSError(errno.ETIMEDOUT, f"no answer in {_FIRST_SECONDS:.0f} s", name) from None
    except ValueError as error:
        if not str(error).startswith("PERMISSION_DENIED"):  # some may only list what is theirs
            refused(error, name)
    return ts.KvStore.open(_spec(scheme, bucket)).result()
