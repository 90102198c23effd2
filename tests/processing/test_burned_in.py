"""Text in pixels: found where a person reads it, masked in every frame, refused where in doubt."""

import functools
import importlib.metadata
import os
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from echovlm_jax.errors import InputError
from echovlm_jax.processing import burned_in
from echovlm_jax.processing.burned_in import Box, Read, check, drawn_outside, found

NAME = "KOWALSKI, Anna"
DARK = np.zeros((2, 60, 90, 3), np.uint8)


def written(text: str, height: int = 120, width: int = 320) -> np.ndarray:
    picture = Image.new("RGB", (width, height))
    ImageDraw.Draw(picture).text((20, 20), text, fill="white", font=ImageFont.load_default(24))
    return np.asarray(picture)


def reader(*texts, boxes=None, error=None):
    """What stands for OCR: it finds these texts in every picture, each in a box of its own."""
    places = boxes or [Box(10, 20, 10 + 20 * n, 25 + 20 * n) for n in range(len(texts))]

    def read(picture):
        if error:
            raise error
        corners = [
            [(b.left, b.top), (b.right, b.top), (b.right, b.bottom), (b.left, b.bottom)]
            for b in places
        ]
        return Read(np.array(corners, float), texts) if texts else Read()

    return lambda: read


@pytest.fixture
def ocr():
    pytest.importorskip("rapidocr", reason="the extra `ocr` is not installed")


@pytest.mark.parametrize(
    "text",
    [
        *("SMITH", "Li", "Zoë", "É", "王", "张伟", "J.S.", "12/03/1961", "1961", "12 03 61"),
        *("4481920", "123 456", "61Y", "12:34:56", "Min", "5 mm Smith", "SYNTHETICS", "3 Mai"),
        *("123.456", "123,456", "12.03", "03.12", "31,01"),
    ],
)
def test_what_may_name_somebody_counts(text, monkeypatch):
    monkeypatch.setattr(burned_in, "_reader", reader(text))
    assert len(found(DARK[0])) == 1


@pytest.mark.parametrize(
    "text",
    [
        *("5", "10", "12.5", "-3", "100%", "3.5 MHz", "15 cm", "MI 1.2", "TIs 0.4", "56 fps", "R"),
        *("cm", "|", "+", "65 dB", "12 cm MI 1.2", "SYNTHETIC"),
        *("5.0", "15.0", "12.13", "32.05", "1.05", "123.45", "12.03 cm", "123.456 ms", "-12.03"),
    ],
)
def test_scales_marks_and_the_phantoms_label_do_not(text, monkeypatch):
    monkeypatch.setattr(burned_in, "_reader", reader(text))
    assert found(DARK[0]) == []


def test_what_was_seen_and_not_read_counts(monkeypatch):
    for texts in (None, [""], [" "]):
        result = Read(np.array([[(1, 1), (9, 1), (9, 5), (1, 5)]], float), texts)
        monkeypatch.setattr(burned_in, "_reader", lambda result=result: lambda picture: result)
        assert found(DARK[0]) == [Box(1, 6, 1, 10)]


def test_ocr_itself_keeps_what_it_cannot_read(ocr, monkeypatch):
    import rapidocr.main

    real = rapidocr.main.TextRecognizer.__call__

    def blank(self, given):
        result = real(self, given)
        result.txts = tuple("" for _ in result.txts)
        return result

    monkeypatch.setattr(rapidocr.main.TextRecognizer, "__call__", blank)
    assert len(found(written(NAME))) == 1


def test_a_scan_taken_for_a_letter_does_not_count_and_a_tall_name_does(monkeypatch):
    picture, whole = np.zeros((400, 500, 3), np.uint8), [Box(0, 399, 0, 499)]
    for text, count in (("三", 0), ("", 0), ("Ab", 0), ("王芳", 1), ("Abc", 1)):
        monkeypatch.setattr(burned_in, "_reader", reader(text, boxes=whole))
        assert len(found(picture)) == count


def test_a_failing_search_says_nothing_and_lets_nothing_through(monkeypatch):
    monkeypatch.setattr(burned_in, "_reader", reader(error=ValueError(f"can't read {NAME}")))
    with pytest.raises(InputError) as raised:
        found(DARK)
    assert NAME not in str(raised.value) and raised.value.__suppress_context__
    assert check(DARK, "mask").refused and check(DARK, "refuse").refused
    reported = check(DARK, "report")
    assert reported.notes == ("text_unchecked",) and not reported.refused


def test_without_the_package_it_is_one_line_with_the_mend(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(burned_in, "version", missing)
    burned_in._reader.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'echovlm-jax\[ocr\]'"):
        burned_in.engine()
    assert check(DARK, "mask").refused and check(DARK, "refuse").refused


def test_packages_that_cannot_be_used_are_one_line(monkeypatch):
    def broken():
        raise ImportError(f"libGL.so.1 of {NAME}")

    monkeypatch.setattr(burned_in, "_reader", broken)
    with pytest.raises(InputError, match=r"can't be used \(ImportError\)$") as raised:
        found(DARK)
    assert raised.value.__suppress_context__
    assert check(DARK, "mask").refused and check(DARK, "refuse").refused
    assert check(DARK, "report").notes == ("text_unchecked",)


def test_threads_that_come_at_once_share_one_reader(monkeypatch):
    made, start = [], threading.Barrier(4)

    @functools.cache
    def make():
        made.append(1)
        time.sleep(0.2)  # as loading the models does
        return reader()()

    def look():
        start.wait()
        found(DARK[0])

    monkeypatch.setattr(burned_in, "_reader", make)
    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_a_header_is_believed(monkeypatch):
    monkeypatch.setattr(burned_in, "_reader", reader())
    assert check(DARK, None, stated=True).notes == ("burned_in",)
    assert check(DARK, "report", stated=True).notes == ("burned_in",)
    assert "header" in check(DARK, "refuse", stated=True).refused
    assert "no text was found to mask" in check(DARK, "mask", stated=True).refused
    assert not check(DARK, "mask").refused and not check(DARK, "refuse").refused


def test_what_is_outside_the_regions(monkeypatch):
    monkeypatch.setattr(burned_in, "_reader", reader())
    regions = [Box(20, 50, 10, 50), Box(20, 50, 60, 90)]
    frames = DARK.copy()
    frames[:, 20:50, 10:50] = 200
    frames[:, 16:20, 10:50] = 90  # a lossy picture runs over
    assert not drawn_outside(frames, regions)
    frames[1, 5, 70] = 255  # in one frame
    assert drawn_outside(frames, regions) and not drawn_outside(frames, [])
    assert check(frames, None, regions=regions).notes == ("drawn_outside",)
    assert "outside" in check(frames, "refuse", regions=regions).refused
    assert "no text was found" in check(frames, "mask", regions=regions, stated=True).refused
    masked = check(frames, "mask", regions=regions)
    assert masked.notes == ("drawn_outside", "masked")
    outside = np.ones(frames.shape[1:3], bool)
    outside[20:50, 10:50] = outside[20:50, 60:90] = False
    assert not masked.frames[:, outside].any()
    np.testing.assert_array_equal(masked.frames[:, ~outside], frames[:, ~outside])


def test_a_long_loop_is_looked_at_frame_by_frame():
    frames = np.zeros((64, 200, 200, 3), np.uint8)
    tracemalloc.start()
    try:
        assert not drawn_outside(frames, [Box(0, 20, 0, 20)])
        assert tracemalloc.get_traced_memory()[1] < frames.nbytes / 2
    finally:
        tracemalloc.stop()
    frames[63, 199, 199, 2] = 33
    assert drawn_outside(frames, [Box(0, 20, 0, 20)])


def test_text_that_stays_is_refused(monkeypatch):
    places = iter(range(0, 10_000, 12))

    def read(picture):  # somewhere else at each look
        left = next(places)
        corners = [(left, 2), (left + 8, 2), (left + 8, 8), (left, 8)]
        return Read(np.array([corners], float), (NAME,))

    monkeypatch.setattr(burned_in, "_reader", lambda: read)
    assert "still found" in check(DARK[:1], "mask").refused


def test_a_name_in_one_frame_is_black_in_all(ocr, capfd, caplog):
    frames = np.stack([written(""), written(NAME), written("15 cm")])
    frames[0, 20:60, 20:200] = 77  # what the other frames have there
    boxes = found(frames)
    assert len(boxes) == 1 and found(written("15 cm")) == []
    strokes = written(NAME).max(axis=-1) > 0
    assert check(frames, "report").notes == ("text_found",)
    assert check(frames, "refuse").refused
    masked = check(frames, "mask")
    assert masked.notes == ("text_found", "masked") and found(masked.frames) == []
    assert not masked.frames[:, strokes].any()
    far = np.s_[:, 80:]
    np.testing.assert_array_equal(masked.frames[far], frames[far])
    assert frames[1][strokes].any()  # what was given stays as it was
    said = "".join(capfd.readouterr()) + caplog.text
    assert "KOWALSKI" not in said and "Anna" not in said


_LOOKS = """
import socket, sys
import numpy as np

def no(*args, **words):
    raise AssertionError("a connection")

socket.socket.connect = no
from echovlm_jax.processing.burned_in import found
found(np.zeros((120, 160, 3), np.uint8))
"""


def test_ocr_reports_to_nobody(tmp_path):
    """Its engine does, where nothing says otherwise: it then leaves a file of its own."""
    pytest.importorskip("rapidocr", reason="the extra `ocr` is not installed")
    without = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS")
    env = {name: value for name, value in os.environ.items() if name not in without}
    paths = os.pathsep.join(sys.path)
    subprocess.run(
        [sys.executable, "-c", _LOOKS],
        env={**env, "TMPDIR": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": paths},
        check=True,
    )
    assert [path.name for path in tmp_path.rglob("*")] == []
