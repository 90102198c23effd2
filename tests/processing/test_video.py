"""Video files: the frames that were put in, or one line."""

import builtins

import numpy as np
import pytest

from echovlm_jax.errors import InputError
from echovlm_jax.processing import levels
from echovlm_jax.processing.files import ExtraMissing, file_kind
from echovlm_jax.processing.images import load_media
from echovlm_jax.processing.video import decode_video

av = pytest.importorskip("av")

# Container, codec, pixels, and how far a frame may be from what was put in.
FORMS = [
    ("avi", "mjpeg", "yuvj444p", 12),
    ("avi", "ffv1", "bgr0", 0),
    ("avi", "rawvideo", "bgr24", 0),
    ("mp4", "libx264", "yuv444p", 12),
    ("matroska", "libvpx-vp9", "yuv420p", 12),
    ("mpeg", "mpeg2video", "yuv420p", 12),
    ("asf", "wmv2", "yuv420p", 14),
]


def loop(frames, height=48, width=64):
    """Frame n is of the brightness 20 n, with a light bar below."""
    out = np.empty((frames, height, width, 3), np.uint8)
    out[:] = (np.arange(frames) * 20)[:, None, None, None]
    out[:, height // 2 :, : width // 2] = 250
    return out


def save(path, frames, container, codec, pixels, form="rgb24"):
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=form)))
        out.mux(stream.encode())


@pytest.mark.parametrize(("container", "codec", "pixels", "off"), FORMS)
def test_frames_are_taken_evenly(tmp_path, container, codec, pixels, off):
    path, frames = tmp_path / "loop.png", loop(11)  # told by content
    save(path, frames, container, codec, pixels)
    for count, picks in ((4, [0, 2, 5, 8]), (16, range(11))):
        found = load_media(path, num_frames=count)
        assert found.dtype == np.uint8
        np.testing.assert_allclose(found.astype(int), frames[list(picks)], atol=off)


def test_grey_of_16_bits_keeps_its_levels(tmp_path):
    frames = np.stack([np.tile(np.arange(256, dtype=np.uint16) << 4, (16, 1))] * 3)
    save(tmp_path / "a", frames, "matroska", "ffv1", "gray16le", "gray16le")
    said = []
    found = load_media(tmp_path / "a", say=said.append)
    assert found.shape == (3, 16, 256, 3)
    np.testing.assert_array_equal(found[1, 0, :, 0], np.arange(256))
    assert said == [f"{tmp_path / 'a'}: its values 0 to 4080 are scaled to 0 to 255"]


def test_a_loop_that_is_turned_is_set_upright(tmp_path):
    path, frames = tmp_path / "a.mp4", loop(2)
    save(path, frames, "mp4", "libx264", "yuv444p")
    data = path.read_bytes()
    upright = b"\0\1\0\0" + bytes(12) + b"\0\1\0\0" + bytes(12) + b"\x40\0\0\0"
    quarter = bytes(4) + b"\0\1\0\0" + bytes(4) + b"\xff\xff\0\0" + bytes(16) + b"\x40\0\0\0"
    at = data.index(upright, data.index(b"tkhd"))
    path.write_bytes(data[:at] + quarter + data[at + len(quarter) :])
    want = np.rot90(frames, -1, axes=(1, 2))  # clockwise
    np.testing.assert_allclose(load_media(path).astype(int), want, atol=12)


@pytest.mark.parametrize("form", FORMS[:6], ids=str)
def test_a_loop_that_is_cut_short_is_refused(tmp_path, form):
    path = tmp_path / "a"
    save(path, np.random.default_rng(0).integers(0, 256, (50, 48, 64, 3), np.uint8), *form[:3])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(InputError, match=r"^\S+a: [^\n]*truncated[^\n]*$"):
        load_media(path)


def test_limits_hold(tmp_path, monkeypatch):
    path = tmp_path / "a"
    save(path, loop(9), "avi", "mjpeg", "yuvj420p")
    for limit, least in (("MAX_FRAMES", 9), ("MAX_LOOP_PIXELS", 9 * 3072)):
        monkeypatch.setattr(levels, limit, least)
        assert len(load_media(path)) == 9
        monkeypatch.setattr(levels, limit, least - 1)
        with pytest.raises(InputError, match=r"^\S+a: [^\n]*is over the limit of[^\n]*$"):
            load_media(path)
        monkeypatch.undo()
    monkeypatch.setattr(levels, "MAX_FRAME_PIXELS", 3071)
    with pytest.raises(InputError, match="is over the limit of"):
        load_media(path)


def test_a_list_of_other_files_is_no_video(tmp_path):
    save(tmp_path / "secret.avi", loop(3), "avi", "mjpeg", "yuvj420p")
    for name, text in {
        "a.m3u8": "#EXTM3U\n#EXTINF:1,\nsecret.avi\n#EXT-X-ENDLIST\n",
        "a.ffconcat": "ffconcat version 1.0\nfile secret.avi\n",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="is none of"):
            load_media(tmp_path / name)
        for container in ("avi", "mov"):
            with open(tmp_path / name, "rb") as file, pytest.raises(InputError):
                decode_video(file, container, num_frames=4)


@pytest.mark.parametrize("container", ["h264", "hevc"])
def test_a_bare_stream_decodes(tmp_path, container):
    codec = {"h264": "libx264", "hevc": "libx265"}[container]
    save(tmp_path / "a", loop(5), container, codec, "yuv420p")
    with open(tmp_path / "a", "rb") as file:
        found = decode_video(file, container, num_frames=2)
    np.testing.assert_allclose(found.pixels.astype(int), loop(5)[[0, 2]], atol=14)
    assert found.frames == 5
    assert found.seconds is None  # it states no rate, and FFmpeg's 25 is made up


def test_without_pyav_it_names_the_extra(tmp_path, monkeypatch):
    save(tmp_path / "a.avi", loop(3), "avi", "mjpeg", "yuvj420p")
    real = builtins.__import__

    def without(name, *rest):
        if name == "av":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ExtraMissing, match=r"^\S+a\.avi: [^\n]*'echovlm-jax\[video\]'[^\n]*$"):
        load_media(tmp_path / "a.avi")


def test_fuzzed_videos_decode_or_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    for container, codec, pixels, _ in FORMS[:5:2]:
        save(tmp_path / "a", loop(6), container, codec, pixels)
        data = (tmp_path / "a").read_bytes()
        for _ in range(40):
            broken = bytearray(data)
            for at in rng.integers(0, len(data), 4):
                broken[at] = rng.integers(256)
            (tmp_path / "b").write_bytes(broken)
            try:
                file_kind(tmp_path / "b")
                assert load_media(tmp_path / "b").shape[-1] == 3
            except InputError as error:
                assert "\n" not in str(error)
