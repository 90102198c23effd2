"""The page in a headless Chromium: from the drop of an exam to its answers, by keyboard too."""

from __future__ import annotations

import importlib.util
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image

from echovlm_jax import demo
from tests.evaluate.browser import Page, browser, find_browser
from tests.processing.dicom_files import plain_cases, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed"),
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is missing"),
]
NAME = "SMITH^JOHN"
STATUS = "document.querySelector('#status').innerText"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[dict[str, Any]]:
    """`echovlm web` in a process of its own: its address, its folder of uploads, what it says."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "tmp").mkdir()
    made = demo.make_checkpoint(folder / "model")
    words = ["web", str(made), "--port", "0", "--max-new-tokens", "24", "--max-pixels", "12544"]
    process = subprocess.Popen(
        [sys.executable, "-m", "echovlm_jax.cli", *words],
        env={**os.environ, "TMPDIR": str(folder / "tmp"), "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = ""
    while "http://127.0.0.1:" not in line:
        assert select.select([process.stderr], [], [], 300)[0]
        line = process.stderr.readline()
        assert line, "the server ended"
    told = {"url": line.split()[1], "uploads": folder / "tmp", "process": process}
    yield told
    process.terminate()
    told["said"] = process.communicate(timeout=30)[1]
    until = time.monotonic() + 20
    while list((folder / "tmp").iterdir()) and time.monotonic() < until:
        time.sleep(0.1)
    assert not list((folder / "tmp").iterdir()) and NAME not in told["said"]


@pytest.fixture
def page(server, tmp_path) -> Iterator[Page]:
    program = find_browser()
    assert program is not None
    with browser(program, tmp_path / "profile") as found:
        show(found, server, width=1200)
        yield found
        hosts = {url.split("/")[2] for url in found.requests if url.startswith(("http", "ws"))}
        assert hosts == {server["url"].removeprefix("http://")}
        assert not any(url.startswith("file") for url in found.requests)


def show(page: Page, server: dict[str, Any], width: int) -> None:
    page.open(server["url"], width=width)
    until(page, "!!document.querySelector('#files input[type=file]')")


def until(page: Page, expression: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not page.value(expression):
        assert time.monotonic() < end, f"{expression}; the page says {page.value(STATUS)!r}"
        time.sleep(0.1)


def drop(page: Page, *files: Path, says: str = "Ready") -> str:
    """Gives files to the page's field; returns its line on them."""
    root = page.call("DOM.getDocument")["root"]["nodeId"]
    field = page.call("DOM.querySelector", nodeId=root, selector="#files input[type=file]")
    page.call("DOM.setFileInputFiles", nodeId=field["nodeId"], files=[str(f) for f in files])
    until(page, f"{STATUS}.includes('{says}')", 60)
    return page.value(STATUS)


def press(page: Page, key: str, text: str = "") -> None:
    code = {"Tab": 9, "Enter": 13, " ": 32}[key]
    what = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
    page.call("Input.dispatchKeyEvent", type="keyDown", text=text, **what)
    page.call("Input.dispatchKeyEvent", type="keyUp", **what)


def tab_to(page: Page, selector: str) -> list[str]:
    """Presses Tab until that has the focus; what had it on the way, by its name."""
    passed = []
    for _ in range(60):
        press(page, "Tab")
        passed.append(page.value(NAMED))
        if page.value(f"!!document.activeElement.closest('{selector}')"):
            return passed
    raise AssertionError(f"{selector} can't be reached: {passed}")


# What a screen reader calls the element that has the focus.
NAMED = """(() => { const e = document.activeElement; const labels = [...(e.labels || [])];
  return e.getAttribute('aria-label') || labels.map(l => l.innerText).join(' ').trim()
    || e.innerText.trim() || e.title || ''; })()"""


def picture(path: Path, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (90, 120), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def loop(path: Path, frames: int) -> Path:
    """A cine loop as DICOM whose header names somebody."""
    write(next(plain_cases()), path, np.random.default_rng(0))
    dataset = pydicom.dcmread(path)
    still = dataset.PixelData[: dataset.Rows * dataset.Columns * dataset.SamplesPerPixel]
    dataset.NumberOfFrames, dataset.PatientName = frames, NAME
    dataset.PixelData = still * frames
    dataset.save_as(path)
    return path


def test_an_exam_is_read_asked_about_and_looked_into(page, server, tmp_path) -> None:
    drop(page, *(picture(tmp_path / f"{NAME}{n}.png", n) for n in range(8)))
    assert page.value("document.querySelectorAll('#exam img').length") == 8
    page.value("document.querySelector('#go').click()")
    until(page, f"{STATUS}.startsWith('Done')")
    assert page.value("document.querySelector('#diagnosis').innerText.includes('%')")
    for question in ("A cyst?", "Where?"):
        page.value("document.querySelector('#question textarea').focus()")
        page.call("Input.insertText", text=question)
        press(page, "Enter", "\r")
        until(page, f"{STATUS}.startsWith('Waiting') || {STATUS}.includes('at work')", 30)
        until(page, f"{STATUS}.startsWith('Done')")
    said = page.value("document.querySelector('#chat').innerText")
    assert said.index("A cyst?") < said.index("Where?")
    page.screenshot(tmp_path / "page.png")
    assert min(Image.open(tmp_path / "page.png").size) > 500
    assert not page.value(f"document.documentElement.outerHTML.includes('{NAME}')")
    left = [path for path in server["uploads"].rglob("*") if path.is_file()]
    assert not any(path.stat().st_size for path in left) and not any(NAME in str(p) for p in left)


def test_a_loop_of_60_frames_on_a_phone(page, server, tmp_path) -> None:
    show(page, server, width=375)
    sideways = "document.documentElement.scrollWidth > innerWidth"
    assert not page.value(sideways)
    drop(page, loop(tmp_path / f"{NAME}.dcm", 60))
    assert "16 frames" in page.value("document.querySelector('#exam').innerText")
    page.value("document.querySelector('#go').click()")
    until(page, f"{STATUS}.startsWith('Done')")
    page.value("window.scrollTo(0, document.body.scrollHeight)")
    notice = "document.querySelector('#notice').getBoundingClientRect()"
    assert page.value(f"{notice}.top >= 0 && {notice}.bottom < innerHeight")
    assert not page.value(sideways)
    assert not page.value(f"document.documentElement.outerHTML.includes('{NAME}')")


def test_the_keyboard_is_enough(page, tmp_path) -> None:
    drop(page, picture(tmp_path / "a.png", 0))
    page.value("document.activeElement.blur()")
    passed = tab_to(page, "#go")
    press(page, "Enter", "\r")
    until(page, f"{STATUS}.startsWith('Done')")
    passed += tab_to(page, "#question textarea")
    page.call("Input.insertText", text="Where?")
    press(page, "Enter", "\r")
    until(page, "document.querySelector('#chat').innerText.includes('Where?')")
    assert all(passed), passed  # everything on the way has a name


def test_bad_files_are_one_line(page, tmp_path) -> None:
    refused = "document.querySelector('#refused').innerText"
    large = tmp_path / f"{NAME}.dcm"
    with large.open("wb") as file:
        file.truncate(400 * 2**20)
    drop(page, large, says="Drop the files")
    assert page.value(refused) == "file 1 has 400 MiB; at most 256 are taken"
    many = [picture(tmp_path / f"{n}.png", n) for n in range(17)]
    drop(page, *many, says="Drop the files")
    assert page.value(refused).endswith("these are 17")
    text = tmp_path / "text.dcm"
    text.write_text("no picture\n" * 99)
    line = drop(page, text, says="none of")
    assert line.startswith("file 1: is none of PNG") and page.value(refused) == ""
    page.value("document.querySelector('#go').click()")
    until(page, f"{STATUS}.includes('the exam is empty')", 30)
