"""Opening what a user names: regular files only, and one line for everything else."""

import os
import threading

import pytest

from echovlm_jax.errors import InputError
from echovlm_jax.processing.dicom import read_dicom
from echovlm_jax.processing.files import file_kind, read_bytes, read_json, read_text
from echovlm_jax.processing.images import load_media


@pytest.mark.parametrize("read", [file_kind, read_text, read_bytes, read_dicom, load_media])
def test_a_pipe_or_folder_is_refused_at_once(tmp_path, read):
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    caught = []

    def attempt(path):
        try:
            read(path)
        except Exception as error:
            caught.append(error)

    for path in (pipe, tmp_path):
        worker = threading.Thread(target=attempt, args=(path,), daemon=True)
        worker.start()
        worker.join(20)
        if stuck := worker.is_alive():
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))  # lets the reader go
            worker.join(20)
        assert not stuck
        error = caught.pop()
        assert isinstance(error, InputError)
        assert str(error) == f"{path}: can't be read (it is not a regular file)"


def test_text_is_bounded_and_its_line_ends_are_plain(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\r\nb\rc\n")
    assert read_text(path, 7) == "a\nb\nc\n"
    with pytest.raises(InputError, match="is larger than 6 bytes"):
        read_text(path, 6)
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_text(path)
    path.write_text('{"a": ' + "1" * 5000 + "}")
    with pytest.raises(InputError, match="is not valid JSON"):
        read_json(path)
