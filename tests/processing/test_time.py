"""Seconds between frames: what files say of them, and the positions that a model gives them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from echovlm_jax.errors import InputError
from echovlm_jax.processing import Media, Processor, make_batch, read_media
from echovlm_jax.processing.dicom import read_loop
from tests.processing.test_dicom import new_dicom, save

GREY = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)


@pytest.mark.parametrize(
    ("elements", "seconds"),
    [
        ({"FrameTime": "50"}, 0.05),
        ({"FrameTime": "33.3333", "CineRate": "25"}, 0.0333333),
        ({"CineRate": "25"}, 0.04),
        ({"RecommendedDisplayFrameRate": "8"}, 0.125),
        ({"CineRate": "50", "RecommendedDisplayFrameRate": "8"}, 0.02),
        ({"FrameTime": "0", "CineRate": "40"}, 0.025),
        ({"FrameTime": "-50", "RecommendedDisplayFrameRate": "40"}, 0.025),
        # Uneven: the average of the steps; the first is no step.
        ({"FrameTimeVector": ["0", *["10", "30"] * 9, "20"], "CineRate": "1"}, 0.02),
        ({"FrameTimeVector": ["0", "10"], "CineRate": "20"}, 0.05),  # not one a frame
        ({"FrameTimeVector": ["0", *["-10"] * 19]}, None),
        ({"FrameTimeVector": ["0"] * 20}, None),
        ({"CineRate": "0", "FrameTime": ""}, None),
        ({"FrameTime": "1e9"}, None),
        ({"FrameTime": ["50", "60"], "CineRate": "25"}, 0.04),  # it has one value
        ({}, None),
    ],
)
def test_a_cine_states_its_time(tmp_path, elements, seconds):
    path = save(new_dicom(GREY, "MONOCHROME2", **elements), tmp_path / "a.dcm")
    for taken in (20, 16, 5, 2):
        found = read_loop(path, num_frames=taken).seconds
        wanted = None if seconds is None else pytest.approx(seconds * 20 / taken, rel=1e-6)
        assert found == wanted
        assert read_media(path, num_frames=taken).seconds == found


@pytest.mark.parametrize("key", ["FrameTime", "CineRate", "FrameTimeVector"])
def test_time_that_is_no_number_says_nothing(tmp_path, key):
    """The pixels are read as before; nothing of the text is."""
    value = ["0"] * 19 + ["76.25"] if key == "FrameTimeVector" else "76.25"
    path = Path(save(new_dicom(GREY, "MONOCHROME2", **{key: value}), tmp_path / "a.dcm"))
    data = path.read_bytes()
    assert data.count(b"76.25") == 1
    path.write_bytes(data.replace(b"76.25", b"Smith"))
    loop = read_loop(path, num_frames=20)
    assert loop.seconds is None and len(loop.frames) == 20


@pytest.mark.parametrize("kind", [b"OB", b"OW", b"US"])
def test_time_of_another_kind_says_nothing(tmp_path, kind):
    """The text's bytes are not its numbers: "5" is 53."""
    dataset = new_dicom(GREY, "MONOCHROME2", FrameTime="76.25", CineRate="25")
    path = Path(save(dataset, tmp_path / "a.dcm"))
    data = path.read_bytes()
    old = b"\x18\x00\x63\x10DS\x06\x0076.25 "
    assert data.count(old) == 1
    size = b"\x06\x00" if kind == b"US" else b"\x00\x00\x06\x00\x00\x00"
    path.write_bytes(data.replace(old, old[:4] + kind + size + b"76.25 "))
    assert read_loop(path, num_frames=20).seconds == 0.04


def test_a_loop_longer_than_any_has_no_time(tmp_path):
    """A mistake of a header's: 1000 seconds a frame, and a model would refuse two frames of it."""
    frames = np.repeat(GREY, 10, axis=0)
    path = save(new_dicom(frames, "MONOCHROME2", FrameTime="1e6"), tmp_path / "a.dcm")
    assert read_loop(path, num_frames=2).seconds is None
    short = save(new_dicom(GREY, "MONOCHROME2", FrameTime="1e6"), tmp_path / "b.dcm")
    assert read_loop(short, num_frames=2).seconds == 10_000


@pytest.mark.parametrize("seconds", [0, -1, 0.0, float("nan"), float("inf"), "5", [0.1], b"5"])
def test_seconds_that_cannot_be(seconds):
    with pytest.raises(InputError, match="must be a number above 0, or None, found"):
        Media(GREY, seconds)


@pytest.mark.parametrize(("rate", "container"), [(25, "avi"), (8, "matroska"), (50, "mp4")])
def test_a_video_states_its_rate(tmp_path, rate, container):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a"), "w", format=container) as out:
        stream = out.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = 32
        for n in range(12):
            picture = np.full((32, 32, 3), 20 * n, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    assert read_media(tmp_path / "a", num_frames=12).seconds == pytest.approx(1 / rate, rel=1e-6)
    assert read_media(tmp_path / "a", num_frames=4).seconds == pytest.approx(3 / rate, rel=1e-6)


def test_a_still_has_no_time(tmp_path):
    path = save(new_dicom(GREY[:1], "MONOCHROME2", FrameTime="50"), tmp_path / "a.dcm")
    assert read_media(path).seconds is None and read_media(path).pixels.ndim == 3


def test_positions_of_a_cine_of_known_time(small_folder, tmp_path):
    """A step every 0.5 s at 2 ids a second; another model's numbers are the same without time."""
    path = save(new_dicom(GREY[:8], "MONOCHROME2", FrameTime="250"), tmp_path / "a.dcm")
    processor = Processor(small_folder)
    plain = processor([path], "?")
    assert "second_per_grid_ts" not in plain
    # Whatever the model was trained with: 2 is Qwen2.5-VL's.
    config = dataclasses.replace(processor.config, tokens_per_second=2)
    processor.config = config
    timed = processor([path], "?")
    assert timed.keys() - plain.keys() == {"second_per_grid_ts"}
    np.testing.assert_array_equal(timed["second_per_grid_ts"], [0.5])
    batch, before = (
        make_batch(config, timed),
        make_batch(config, plain | {"second_per_grid_ts": [1]}),
    )
    vision = batch["patch_index"][0] >= 0
    steps = batch["positions"][0, 0, vision] - batch["positions"][0, 0, vision].min()
    assert sorted(set(steps.tolist())) == [0, 1, 2, 3]  # trunc(i · 2 · 0.5)
    slow = before["positions"][0, 0, vision] - before["positions"][0, 0, vision].min()
    assert sorted(set(slow.tolist())) == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("seconds", "step"),
    [(None, 2 / 24), (1 / 24, 2 / 24), (0.5, 1.0), (1.0, 2.0), (1 / 29.97, 2 / 29.97)],
)
def test_frames_given_as_arrays(small_folder, seconds, step):
    processor = Processor(small_folder)
    processor.config = dataclasses.replace(processor.config, tokens_per_second=2)
    frames = np.repeat(GREY[:6, ..., None], 3, axis=-1)
    found = processor([Media(frames, seconds), frames[0], frames], "?")
    np.testing.assert_allclose(found["second_per_grid_ts"], [step, 2 / 24], rtol=1e-15)
