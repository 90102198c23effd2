"""The page without a browser: what it reads, keeps, refuses and shows."""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from PIL import Image

from echovlm_jax import demo
from echovlm_jax.cli import main
from echovlm_jax.data.record import Medium
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.mixture import Read
from echovlm_jax.generate.likeliest import Answer
from echovlm_jax.load import load_model
from echovlm_jax.processing import burned_in
from echovlm_jax.processing.burned_in import Box
from echovlm_jax.web import shown
from echovlm_jax.web.exam import MAX_FILES, Exam, read_exam, text_warnings
from echovlm_jax.web.page import Settings, Updates, Visitors, _read, _take, make_page
from echovlm_jax.web.server import Guard, listen, upload_folder
from echovlm_jax.web.session import Session, streamed
from echovlm_jax.web.uploads import sweep
from tests.processing.dicom_files import plain_cases, write
from tests.processing.test_dicom import new_dicom, region, save

NAME = "SMITH^JOHN"
has_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(demo.make_checkpoint(tmp_path_factory.mktemp("web") / "model"))


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "uploads" / "0" / f"{NAME}.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.arange(56 * 84, dtype=np.uint32).astype(np.uint8).reshape(56, 84)).save(path)
    return path


def visitors(model, folder: Path) -> Visitors:
    return Visitors(model, Settings(False, 4, folder, str))


def test_an_exam_is_its_pixels_and_no_name(picture, tmp_path) -> None:
    loop = tmp_path / f"{NAME}.gif"
    frames = [Image.new("L", (60, 40), 9 * n) for n in range(20)]
    frames[0].save(loop, save_all=True, append_images=frames[1:])
    exam = read_exam([picture, loop], num_frames=5, crop=True)
    assert exam.media == [Medium(0, 56, 84), Medium(5, 40, 60)]
    crops = [line.split(":")[0] for line in exam.warnings if "can't be cropped" in line]
    assert crops == ["file 1", "file 2"]
    page = shown.exam_html(exam)
    assert NAME not in page and str(tmp_path) not in page
    assert page.count("<img ") == 1 + 4 and "84 × 56" in page and "5 frames" in page


def test_a_header_that_says_burned_in_is_warned_of(tmp_path, picture, monkeypatch) -> None:
    monkeypatch.setattr(burned_in, "found", lambda pixels: [])
    path = tmp_path / f"{NAME}.dcm"
    write(next(plain_cases()), path, np.random.default_rng(0))
    dataset = pydicom.dcmread(path)
    dataset.PatientName, dataset.BurnedInAnnotation = NAME, "YES"
    dataset.save_as(path)
    exam = read_exam([picture, path], num_frames=4, crop=False)
    assert [line.split(":")[0] for line in exam.warnings] == ["file 2"] and NAME not in repr(exam)


@pytest.mark.parametrize(("crop", "warned"), [(False, True), (True, False)])
def test_what_is_drawn_outside_the_regions_is_warned_of(crop, warned, tmp_path, picture) -> None:
    pixels = np.zeros((1, 64, 96, 3), np.uint8)
    pixels[:, 4:12, 4:60] = 255
    for top, drawn in ((32, warned), (0, False)):
        dataset = new_dicom(pixels, "RGB", SequenceOfUltrasoundRegions=[region(1, 0, top, 95, 63)])
        path = save(dataset, tmp_path / f"{NAME}.dcm")
        told = read_exam([picture, path], num_frames=4, crop=crop).warnings
        line = "file 2: something is drawn outside its ultrasound regions; it may name somebody"
        assert (line in told) == drawn


def test_bad_files_are_one_line_without_a_name(tmp_path, picture) -> None:
    text = tmp_path / f"{NAME}.dcm"
    text.write_text(f"{NAME}, a text\n" * 40)
    for paths, line in (
        ([], "the exam is empty"),
        ([picture] * (MAX_FILES + 1), f"at most {MAX_FILES}"),
        ([picture, text], "file 2: is none of PNG"),
        ([tmp_path / "gone"], "file 1: can't be read"),
    ):
        with pytest.raises(InputError, match=line) as caught:
            read_exam(paths, num_frames=4, crop=False)
        said = str(caught.value)
        assert NAME not in said and str(tmp_path) not in said and "\n" not in said


def test_files_are_deleted_whether_they_can_be_used_or_not(model, picture, tmp_path) -> None:
    uploads = tmp_path / "uploads"
    broken_off = uploads / "tmp0"
    broken_off.write_bytes(b"half")
    found = visitors(model, uploads)
    assert len(found.begin("a", [str(picture), str(picture)]).exam.pictures) == 2
    assert sorted(uploads.rglob("*")) == [broken_off]  # perhaps it is still coming
    os.utime(broken_off, (0, 0))
    sweep(uploads)
    text = uploads / "text"
    text.write_text("no picture")
    with pytest.raises(InputError):
        found.begin("a", [str(text)])
    assert not list(uploads.rglob("*"))
    assert not found.session("a").exam.pictures


def test_a_visitor_is_forgotten_and_so_is_the_oldest(model, picture, tmp_path) -> None:
    found = visitors(model, tmp_path / "uploads")
    exam = found.begin("a", [str(picture)])
    assert found.session("a") is exam and found.session("b") is not exam
    found.forget("a")
    assert found.session("a") is not exam
    for number in range(20):
        found.begin(str(number))
    assert len(found._sessions) == 16 and found.session("19") is not found.session("18")


class Spoken:
    """A model that repeats how it was asked."""

    config, processor = demo.CONFIG, None

    def generate(self, images, prompt, *, max_new_tokens, stream):
        text = prompt[-1]["content"]
        for start in range(0, len(text), 5):
            stream(text[start : start + 5])
        return {"text": text}


def test_organ_and_language_are_in_the_question_and_turns_go_on() -> None:
    exam = Exam([np.zeros((28, 28, 3), np.uint8)])
    session = Session(Spoken(), 8, exam)
    *_, report = session.report("heart", "中文")
    assert "心脏" in report and "这张" in report
    *_, report = session.report("not stated", "English")
    assert "this ultrasound image" in report and session.said["report"].answer == report
    *_, first = session.reply("A cyst?", "liver", "English")
    *_, second = session.reply("Where?", "liver", "English")
    assert first == "This is an ultrasound exam: liver. A cyst?" and second == "Where?"
    assert [turn["content"] for turn in session.turns] == [first, first, "Where?", "Where?"]
    assert len(session.said["reply"].asked) == 3
    *_, third = session.reply("Where?", "thyroid", "English")  # of another organ: anew
    assert third == "This is an ultrasound exam: thyroid. Where?" and len(session.turns) == 2
    *_, fourth = session.reply("Wo?", "thyroid", "中文")
    assert "甲状腺" in fourth and len(session.turns) == 2
    with pytest.raises(InputError, match="write a question"):
        next(session.reply("  ", "liver", "English"))
    with pytest.raises(InputError, match="no diagnosis yet"):
        session.inside("diagnosis")
    with pytest.raises(InputError, match="empty"):
        next(Session(Spoken(), 8).report("liver", "English"))


def test_the_organ_is_stated_although_the_first_question_failed(monkeypatch) -> None:
    session = Session(Spoken(), 8, Exam([np.zeros((28, 28, 3), np.uint8)]))
    monkeypatch.setattr(session.model, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(session.reply("A cyst?", "liver", "English"))
    monkeypatch.undo()
    *_, answer = session.reply("Where?", "liver", "English")
    assert answer == "This is an ultrasound exam: liver. Where?"


def test_nothing_is_said_of_an_exam_that_is_gone(picture, tmp_path) -> None:
    page = Visitors(Spoken(), Settings(False, 4, tmp_path / "uploads", str))
    for gone in (page.forget, page.begin):
        page.begin("a").exam.pictures.append(np.zeros((28, 28, 3), np.uint8))
        updates = page.while_it_lasts("a", _read(page, "a", "liver", "English"))
        assert "status" in next(updates) and next(updates)["report"]
        gone("a")
        assert not list(updates)

    def failing() -> Updates:
        yield {"status": ""}
        raise InputError("of the exam before")

    updates = page.while_it_lasts("a", failing())
    next(updates)
    page.begin("a")
    assert not list(updates)
    with pytest.raises(InputError):
        list(page.while_it_lasts("a", failing()))


def test_an_exam_forgotten_while_it_is_read_is_not_shown(monkeypatch, tmp_path) -> None:
    page = Visitors(Spoken(), Settings(False, 4, tmp_path, str))
    updates = _take(page, "a", [])
    before = page.session("a")
    next(updates)
    assert not page.has("a", before)
    begin = page.begin

    def forgotten(name: str, files: list[str]) -> Session:
        session = begin(name, files)
        page.forget(name)
        return session

    monkeypatch.setattr(page, "begin", forgotten)
    assert not list(updates)


@has_gradio
def test_what_ends_answers_waits_for_none_of_them(tmp_path) -> None:
    made = make_page(SimpleNamespace(config=demo.CONFIG), Settings(False, 4, tmp_path, str))
    names = {n: block.elem_id for n, block in made.blocks.items() if block.elem_id}
    events = [
        (names.get(component), trigger, fn)
        for fn in made.fns.values()
        for component, trigger in fn.targets
    ]
    model = {n for n, fn in made.fns.items() if fn.concurrency_id == "model"}
    assert len(model) == 4
    for part, trigger in (("files", "upload"), ("clear", "click"), ("stop", "click")):
        own = [fn for name, on, fn in events if (name, on) == (part, trigger)]
        assert any(set(fn.cancels) == model for fn in own)
        assert not any(fn.concurrency_id in ("model", "files") for fn in own if fn.queue)
    queues = {name: fn.concurrency_id for name, on, fn in events if on == "change"}
    assert set(queues.values()) == {"screen"}


def test_writing_ends_when_nobody_listens() -> None:
    ended = threading.Event()

    def write(send) -> None:
        try:
            while True:
                send("word ")
                time.sleep(0.001)
        finally:
            ended.set()

    texts = streamed(write)
    assert next(texts) == "word "
    assert next(texts) == "word word "
    texts.close()
    assert ended.wait(10)
    with pytest.raises(ZeroDivisionError):
        list(streamed(lambda send: 1 / 0))
    assert list(streamed(lambda send: send("next"))) == ["next"]  # the model is free again


def test_what_is_shown_is_escaped() -> None:
    evil = "<img src=http://elsewhere/x>"
    found = [Answer(evil, 0.6), Answer("cyst", 0.1), Answer("rare", 0.001)]
    table = shown.diagnoses_html(found)
    assert evil not in table and "60 %" in table and "rare" not in table
    assert "other answers" in table and "30 %" in table
    assert evil not in shown.status(evil, alert=True)


def test_routing_is_a_row_for_each_token() -> None:
    tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
    expert = np.array([[[0, 1], [2, 0], [3, 1]], [[0, 2], [2, 1], [3, 2]]])  # [L=2, T=3, k=2]
    read = Read(np.arange(3), np.array([0, 1, 2]), expert, np.full((2, 3), 0.25), -1.0)

    def cells(layer: str) -> list[list[str]]:
        html = shown.routing_html(read, tokenizer, 4, layer)
        body = html.split("<tbody>")[1]
        return [
            [cell.split(">")[1] for cell in row.split("<td ")[1:]] for row in body.split("<tr>")[1:]
        ]

    clean = [[int(c.split("<")[0]) for c in row] for row in cells(shown.ALL_LAYERS)]
    assert clean == [[50, 25, 25, 0], [25, 25, 50, 0], [0, 25, 25, 50], [0, 25, 25, 50]]
    first = [[int(c.split("<")[0]) for c in row] for row in cells("layer 0")]
    assert first == [[50, 50, 0, 0], [50, 0, 50, 0], [0, 50, 0, 50], [0, 50, 0, 50]]
    assert "&lt;2&gt;" in shown.routing_html(read, tokenizer, 4, "layer 1")


def test_it_is_looked_inside_an_answer(model, picture, tmp_path) -> None:
    session = visitors(model, tmp_path / "uploads").begin("a", [str(picture)])
    found = session.diagnoses("not stated", "English")
    assert 0 < sum(one.probability for one in found) <= 1.001
    read = session.inside("diagnosis") if found[0].text else None
    if read is not None:
        assert (read.kind == 2).any() and shown.layers_of(model)[1] == "layer 0"
        assert len(session.looked("diagnosis")) == 1


KILLED = """
import os, signal
from echovlm_jax.web.server import upload_folder
with upload_folder() as folder:
    (folder / "half").write_bytes(b"half")
    print(folder, oct(folder.stat().st_mode & 0o777), flush=True)
    os.kill(os.getpid(), signal.SIG{signal})
"""


@pytest.mark.parametrize("signal", ["KILL", "TERM", "INT"])
def test_no_upload_outlives_the_process(signal: str, tmp_path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLED.format(signal=signal)],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    folder, mode = run.stdout.split()
    assert run.returncode != 0 and Path(folder).parent == tmp_path and mode == "0o700"
    until = time.monotonic() + 20
    while Path(folder).exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not list(tmp_path.iterdir())


def test_the_folder_goes_with_its_block(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with upload_folder() as folder:
        (folder / "half").write_bytes(b"half")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("host", "asked", "status"),
    [
        ("127.0.0.1", "localhost:7860", 200),
        ("127.0.0.1", "elsewhere.example:7860", 421),
        ("::1", "[::1]:7860", 200),
        ("0.0.0.0", "elsewhere.example", 200),
    ],
)
def test_only_this_machine_is_answered(host: str, asked: str, status: int) -> None:
    sent: list[dict] = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": [(b"host", asked.encode())]}
    asyncio.run(Guard(app, host)(scope, None, send))
    assert sent[0]["status"] == status
    if status == 200:
        assert "default-src 'self'" in dict(sent[0]["headers"])[b"content-security-policy"].decode()


def test_a_taken_port_is_said_before_the_model_is_loaded(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["web", str(tmp_path / "none"), "--port", str(port)]) == 2
    assert capsys.readouterr().err == f"echovlm: error: 127.0.0.1:{port}: Address already in use\n"


def test_without_gradio_the_extra_is_named(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["web", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "echovlm-jax[web]" in error


@has_gradio
def test_bad_settings_are_one_line(tmp_path, capsys) -> None:
    for words in (["--port", "70000"], ["--quantize", "int3"], ["--host", "no.such.host.invalid"]):
        assert main(["web", str(tmp_path), "--port", "0", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("echovlm: error: ")


@has_gradio
def test_numbers_that_no_answer_can_have_are_refused_before_the_weights_are_read(
    tmp_path, capsys, monkeypatch
) -> None:
    folder = demo.make_checkpoint(tmp_path / "model")
    monkeypatch.setattr("echovlm_jax.load.load_model", lambda *_, **__: 1 / 0)
    for words in (
        ["--max-new-tokens", "0"],
        ["--max-new-tokens", str(2**20)],
        ["--num-frames", "0"],
        ["--num-frames", str(2**20)],
    ):
        assert main(["web", str(folder), "--port", "0", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words[0][2:].replace("-", "_") in error.replace("-", "_")


@has_gradio
def test_ctrl_c_is_a_good_end(tmp_path, capsys, monkeypatch) -> None:
    folder = demo.make_checkpoint(tmp_path / "model")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):  # the command sets them
        monkeypatch.setenv(name, "")

    def interrupted(model, settings, at, debug) -> None:
        assert settings.uploads.is_dir()
        at.close()
        raise KeyboardInterrupt

    monkeypatch.setattr("echovlm_jax.web.server.serve", interrupted)
    assert main(["web", str(folder), "--port", "0", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["url"] in said.err
    assert not list(tmp_path.glob("echovlm-web-*"))


def test_text_in_pixels_is_warned_of_and_so_is_a_search_that_was_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = np.zeros((64, 96, 3), np.uint8)
    named = plain.copy()
    named[8:20, 10:80] = 255
    looked: list[tuple[int, ...]] = []

    def found(picture: np.ndarray) -> list[Box]:
        looked.append(picture.shape)
        return [Box(8, 20, 10, 80)] * bool(picture.any())

    monkeypatch.setattr(burned_in, "found", found)
    told = text_warnings([plain, np.stack([plain, plain, named])])
    assert [line.split(":")[0] for line in told] == ["file 2"]
    assert looked == [(64, 96, 3), (2, 64, 96, 3)]
    line = "file 2: only the first and the last frame of this loop were searched for text"
    told = text_warnings([np.stack([plain] * 2), np.stack([plain, named, plain])])
    assert told == [f"{line}; none was found"]

    def missing(picture: np.ndarray) -> list[Box]:
        raise InputError("not installed")

    monkeypatch.setattr(burned_in, "found", missing)
    assert text_warnings([plain, named]) == [
        "names in the pixels were not looked for: not installed"
    ]
