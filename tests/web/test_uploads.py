"""Uploads: what is taken for one, and that none stays."""

import importlib.util
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from echovlm_jax import demo
from echovlm_jax.errors import InputError
from echovlm_jax.web import uploads
from echovlm_jax.web.page import Settings, Visitors
from echovlm_jax.web.server import make_app
from echovlm_jax.web.uploads import sweep, swept, taken

has_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed"
)
MODEL = SimpleNamespace(config=demo.CONFIG, processor=SimpleNamespace(num_frames=4, tokenizer=None))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads"


def sent(folder: Path, name: str = "0/a.png") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((56, 84), np.uint8)).save(path)
    return str(path)


def test_only_uploads_are_read(folder: Path) -> None:
    outside, own = sent(folder.parent, "outside.png"), sent(folder, "1/b.png")
    link = folder / "link.png"
    link.symlink_to(outside)
    visitors = Visitors(MODEL, Settings(False, 4, folder, str))
    with taken(folder, [sent(folder)]) as others:
        for path in (
            *(outside, str(link), f"{folder}/../outside.png", "https://127.0.0.1/a.png"),
            *(str(folder), str(others[0])),
        ):
            with pytest.raises(InputError, match=r"^file 2: it was not sent to this page"):
                visitors.begin("a", [sent(folder), path])
            assert not visitors.session("a").exam.pictures
    assert Path(outside).exists() and Path(own).exists()
    with pytest.raises(InputError, match=r"^file 1: it was not sent"), taken(folder, [own], {"b"}):
        pass
    with taken(folder, [own], {own}) as (path,):
        assert path.name == "b.png"


def test_equal_files_of_one_name_are_of_one_visitor(folder: Path) -> None:
    path, other = sent(folder), sent(folder, "1/b.png")
    with taken(folder, [path, path]) as (one, two):
        assert one == two and one.exists() and not Path(path).exists()
        line = r"^file 2: was sent twice at once.*; drop it again$"
        with pytest.raises(InputError, match=line), taken(folder, [other, path]):
            pass
        assert not Path(other).exists()
        sent(folder)  # meanwhile again
    assert Path(path).exists() and not one.exists()


def test_uploads_that_came_to_nothing_are_swept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, stale, read = sent(folder), Path(sent(folder, "1/b.png")), sent(folder, "2/c.png")
    for path in (stale, read):
        os.utime(path, (0, 0))
    monkeypatch.setattr(uploads, "_EVERY", 0.01)
    with taken(folder, [read]) as (kept,), swept(folder):
        until = time.monotonic() + 20
        while stale.parent.exists() and time.monotonic() < until:
            time.sleep(0.01)
        assert kept.exists()
    assert not stale.parent.exists() and Path(fresh).exists()
    sweep(folder / "gone")


@has_gradio
def test_no_client_names_a_file_of_this_machine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastapi.testclient import TestClient

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    outside = sent(folder.parent, "outside.png")
    app = make_app(MODEL, Settings(False, 4, folder, str), "127.0.0.1", 7860)
    with TestClient(app, base_url="http://127.0.0.1:7860") as client:
        config = client.get("/config").json()
        files = next(part["id"] for part in config["components"] if part["type"] == "file")
        index = next(n["id"] for n in config["dependencies"] if n["inputs"] == [files])

        def drop(path: str) -> str:
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            asked = {"data": [[file]], "fn_index": index, "session_hash": "a"}
            assert client.post("/gradio_api/queue/join", json=asked).status_code == 200
            events = client.get("/gradio_api/queue/data", params={"session_hash": "a"}).text
            return json.dumps(events)

        with Path(outside).open("rb") as file:
            (path,) = client.post("/gradio_api/upload", files={"files": file}).json()
        assert "data:image/jpeg" in drop(path)
        for path in (outside, "http://127.0.0.1:1/a.png"):
            assert "data:image/jpeg" not in drop(path)  # nor is it copied
            assert not [one for one in folder.rglob("*") if one.is_file() and one.stat().st_size]
