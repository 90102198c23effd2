"""Reads that are refused for a moment: made again, counted, and named when they fail."""

import errno
import os
from pathlib import Path

import pytest

from echovlm_jax.storage import retry

PATH = Path("exams/shard")


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", found.append)
    return found


def failing(*numbers: int):
    """A read that fails so often, and then gives b"read"."""
    left = list(numbers)

    def read() -> bytes:
        if left:
            number = left.pop(0)
            raise OSError(number, os.strerror(number))
        return b"read"

    return read


def test_what_passes_is_read_and_counted(waits, capsys):
    before = retry.counted()
    assert retry.patiently(failing(errno.ESTALE, errno.ETIMEDOUT), PATH) == b"read"
    assert retry.counted() == before + 2 and waits == [0.5, 1.0]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        f"echovlm: exams/shard: can't be read ({os.strerror(errno.ESTALE)}); tried again in 0.5 s"
    )
    assert len(said) == 2


def test_what_does_not_pass_says_how_often(waits):
    with pytest.raises(OSError, match=r"tried 7 times in 31.5 s: 'exams/shard'") as error:
        retry.patiently(failing(*[errno.EIO] * 7), PATH)
    assert error.value.errno == errno.EIO
    assert len(waits) == 6 and waits == sorted(waits)
    assert retry.patiently(failing(*[errno.EIO] * 6), PATH) == b"read"


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOSPC])
def test_what_can_not_get_better_is_said_at_once(waits, number):
    before = retry.counted()
    with pytest.raises(OSError) as error:
        retry.patiently(failing(number), PATH)
    assert error.value.errno == number and not waits and retry.counted() == before


def test_a_librarys_words():
    """As ArrayRecord's reader says it."""
    found = retry.system_error("pread() failed: Input/output error; reading /data/x; at byte 7")
    assert found is not None and found.errno == errno.EIO
    assert found.strerror == "Input/output error"
    corrupt = "Corrupted Riegeli/records file: chunk data hash mismatch (computed 0xe9, stored 0xe)"
    assert retry.system_error(corrupt) is None
    unknown = retry.system_error("pread() failed: something new; reading /data/x")
    assert unknown is not None and unknown.errno == errno.EINVAL
