"""Opening what a user names: regular files only, and one line for everything else."""

import os
import pickle
import threading

import pytest

from echovlm_jax.errors import InputError
from echovlm_jax.processing.dicom import read_dicom
from echovlm_jax.processing.files import (
    Outside,
    file_kind,
    locate,
    open_file,
    read_bytes,
    read_json,
    read_text,
)
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


@pytest.fixture
def tree(tmp_path):
    """root/in.png, root/a/deep.png, and links out to blobs/x and elsewhere/y."""
    root = (tmp_path / "root").resolve()
    (root / "a").mkdir(parents=True)
    (root / "in.png").write_bytes(b"in")
    (root / "a" / "deep.png").write_bytes(b"deep")
    for folder, name in (("blobs", "x"), ("elsewhere", "y")):
        (root.parent / folder).mkdir()
        (root.parent / folder / name).write_bytes(folder.encode())
        (root / f"{name}.png").symlink_to(f"../{folder}/{name}")
    (root / "b").symlink_to("../blobs")
    return root


def _read(found):
    with open_file(found) as file:
        return file.read()


def test_paths_in_data_as_people_write_them(tree):
    for path in ("in.png", "./in.png", str(tree / "in.png"), ".//in.png"):
        assert locate(path, tree) == tree / "in.png" and _read(locate(path, tree)) == b"in"
    for path in ("a\\deep.png", ".\\a\\deep.png", "a/deep.png"):
        assert _read(locate(path, tree)) == b"deep"
    (tree / "odd\\name.png").write_bytes(b"odd")
    assert _read(locate("odd\\name.png", tree)) == b"odd"
    (tree.parent / "alias").symlink_to(tree)  # another way to the same folder
    assert _read(locate(str(tree.parent / "alias" / "in.png"), tree)) == b"in"


def test_links_may_lead_where_it_is_allowed(tree):
    blobs = tree.parent / "blobs"
    for path in ("x.png", "b/x", "b\\x", str(tree / "x.png")):
        with pytest.raises(Outside, match=r"--allow-links ROOT"):
            locate(path, tree)
        found = locate(path, tree, blobs)
        assert found == blobs / "x" and _read(found) == b"blobs"
    for path in ("y.png", str(blobs / "x"), "../blobs/x", "b/../../elsewhere/y", "b/../y.png"):
        with pytest.raises(Outside):
            locate(path, tree, blobs)


@pytest.mark.parametrize("swapped", ["file", "folder"])
def test_a_link_put_there_after_the_look_leads_nowhere(tree, swapped):
    """Whoever may write into the folder gains a moment between the look and the opening."""
    found = locate("a/deep.png", tree)
    secret = tree.parent / "secret"
    secret.mkdir()
    (secret / "deep.png").write_bytes(b"secret")
    if swapped == "file":
        (tree / "a" / "deep.png").unlink()
        (tree / "a" / "deep.png").symlink_to(secret / "deep.png")
    else:
        (tree / "a").rename(tree / "moved")
        (tree / "a").symlink_to(secret)
    for read in (_read, file_kind, read_bytes):
        with pytest.raises((OSError, InputError)):
            read(found)


def test_a_located_path_stays_safe_when_it_is_sent_elsewhere(tree):
    found = pickle.loads(pickle.dumps(locate("a/deep.png", tree)))
    assert _read(found) == b"deep"
    (tree / "a").rename(tree / "moved")
    (tree / "a").symlink_to("moved")
    with pytest.raises(InputError, match="Not a directory"):
        _read(found)
