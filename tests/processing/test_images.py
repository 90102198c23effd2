"""Pixels to patches, against Hugging Face's Qwen2-VL image processor."""

import json
import struct
import zlib

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import pixel_array

from echovlm_jax.errors import InputError
from echovlm_jax.processing.images import (
    ImageConfig,
    image_config,
    load_media,
    smart_resize,
    to_patches,
)

hf_images = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")

FILES = ["examples_rgb_color", "examples_palette", "examples_jpeg2k", "examples_ybr_color"]


def pydicom_rgb(name: str) -> np.ndarray:
    """The file's pixels as RGB by pydicom's own high-level functions."""
    path = str(get_testdata_file(f"{name}.dcm"))
    pixels = pixel_array(path)
    if name == "examples_palette":
        pixels = (apply_color_lut(pixels, pydicom.dcmread(path)) // 256).astype(np.uint8)
    return pixels


def hf_patches(images, **changes) -> tuple[np.ndarray, np.ndarray]:
    out = hf_images.Qwen2VLImageProcessorPil(**changes)(images, return_tensors="np")
    return out["pixel_values"], out["image_grid_thw"]


def hf_video_patches(frames: np.ndarray, **changes) -> tuple[np.ndarray, tuple[int, int, int]]:
    """A video's patches from the image processor.

    The video processor needs torchvision, whose resize isn't PIL's. The image processor repeats
    each frame in time, so a pair's patches are half of one frame's and half of the next's.
    """
    if len(frames) % 2:
        frames = np.concatenate([frames, frames[-1:]])
    patches, grids = hf_patches([Image.fromarray(f) for f in frames], **changes)
    _, h, w = grids[0]
    pairs = patches.reshape(len(frames) // 2, 2, h * w, 3, 2, 14 * 14)
    woven = np.stack([pairs[:, 0, :, :, 0], pairs[:, 1, :, :, 1]], axis=3)
    return woven.reshape(-1, 1176), (len(frames) // 2, int(h), int(w))


@pytest.mark.parametrize("name", FILES)
def test_pixels_of_real_ultrasound_files_equal_hugging_faces(name):
    ours = load_media(str(get_testdata_file(f"{name}.dcm")), num_frames=30)
    pixels = pydicom_rgb(name)
    if name == "examples_ybr_color":
        assert ours.shape[0] == 30
        expected, grid = hf_video_patches(pixels)
    else:
        expected, grids = hf_patches([Image.fromarray(pixels)])
        grid = tuple(grids[0])
    patches, our_grid = to_patches(ours, ImageConfig())
    assert our_grid == grid
    np.testing.assert_allclose(patches, expected, rtol=0, atol=1e-6)


def test_200_random_sizes_equal_hugging_faces():
    rng = np.random.default_rng(0)
    limits = {"min_pixels": 56 * 56, "max_pixels": 20 * 28 * 28}
    config = image_config(limits)
    for _ in range(200):
        height, width = np.exp(rng.uniform(np.log(3), np.log(500), 2)).astype(int)
        if max(height, width) > 200 * min(height, width):
            continue
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        patches, grid = to_patches(image, config)
        expected, grids = hf_patches([Image.fromarray(image)], **limits)
        assert grid == tuple(grids[0]), (height, width)
        np.testing.assert_allclose(patches, expected, rtol=0, atol=1e-6)


def test_smart_resize_equals_hugging_faces_over_the_size_range():
    rng = np.random.default_rng(1)
    for _ in range(3000):
        height, width = (int(v) for v in np.exp(rng.uniform(0, np.log(6000), 2)))
        low, high = sorted(int(v) for v in rng.integers(784, 2_000_000, 2))
        if max(height, width) > 200 * min(height, width):
            with pytest.raises(InputError):
                smart_resize(height, width, 28, low, high)
            continue
        ours = smart_resize(height, width, 28, low, high)
        assert ours == hf_images.smart_resize(height, width, 28, low, high)


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("channels", [[0, 0, 0], [0, 0, 1], [0, 1, 1], [0, 1, 0]])
def test_equal_channels_equal_hugging_faces(channels, resample):
    """Grey images take a shorter way; images that are grey but for one channel must not."""
    planes = np.random.default_rng(resample).integers(0, 256, (70, 90, 2), np.uint8)
    image = np.ascontiguousarray(planes[..., channels])
    patches, grid = to_patches(image, ImageConfig(resample=resample))
    expected, grids = hf_patches([Image.fromarray(image)], resample=resample)
    assert grid == tuple(grids[0])
    np.testing.assert_allclose(patches, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grey", [True, False])
def test_patches_are_written_where_told(grey):
    frames = np.random.default_rng(0).integers(0, 256, (3, 70, 90, 3), np.uint8)
    if grey:
        frames[...] = frames[..., :1]
    expected, grid = to_patches(frames, ImageConfig())
    out = np.full((len(expected) + 2, 1176), 7, np.float32)
    patches, again = to_patches(frames, ImageConfig(), out)
    assert again == grid and np.shares_memory(patches, out)
    assert np.array_equal(out[:-2], expected) and np.all(out[-2:] == 7)


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_video_pairs_frames_and_repeats_the_last(frames):
    video = np.random.default_rng(frames).integers(0, 256, (frames, 70, 90, 3), np.uint8)
    patches, grid = to_patches(video, ImageConfig())
    expected, expected_grid = hf_video_patches(video)
    assert grid == expected_grid
    np.testing.assert_allclose(patches, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
        {"do_rescale": False},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"resample": 2},
        {"do_resize": False},
        {"size": {"shortest_edge": 50_000, "longest_edge": 80_000}},
    ],
)
def test_preprocessor_config_is_honoured(changes):
    size = (84, 112) if "do_resize" in changes else (90, 100)
    image = np.random.default_rng(2).integers(0, 256, (*size, 3), np.uint8)
    patches, grid = to_patches(image, image_config(changes))
    expected, grids = hf_patches([Image.fromarray(image)], **changes)
    assert grid == tuple(grids[0])
    np.testing.assert_allclose(patches, expected, rtol=1e-6, atol=1e-6)
    unchanged, _ = to_patches(image, ImageConfig())
    assert changes == {"do_resize": False} or not np.array_equal(patches, unchanged)


def test_hugging_faces_saved_configuration_reads_back(tmp_path):
    hf_images.Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=784_000).save_pretrained(
        tmp_path
    )
    config = image_config(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    assert (config.min_pixels, config.max_pixels, config.resample) == (3136, 784_000, 3)


@pytest.mark.parametrize(
    "raw, key",
    [
        ({"patch_size": "14"}, "patch_size"),
        ({"min_pixels": 0}, "min_pixels"),
        ({"min_pixels": 9000, "max_pixels": 8000}, "min_pixels"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"do_resize": 1}, "do_resize"),
        ({"rescale_factor": "x"}, "rescale_factor"),
        ({"resample": 17}, "resample"),
        ({"size": 5}, "size"),
        ({"image_mean": [10**400, 1, 1]}, "image_mean"),
        ({"image_std": 10**400}, "image_std"),
        ({"rescale_factor": 10**400}, "rescale_factor"),
        ({"rescale_factor": 1e37}, "image_mean, image_std and rescale_factor"),
        ({"image_std": 1e-300}, "image_mean, image_std and rescale_factor"),
        ({"min_pixels": 10**10, "max_pixels": 10**11}, "min_pixels"),
        ({"max_pixels": 2**26 + 1}, "max_pixels"),
        ({"size": {"shortest_edge": 1, "longest_edge": 10**5000}}, "max_pixels"),
        ({"patch_size": 10**6}, "patch_size"),
        ({"temporal_patch_size": 10**6}, "temporal_patch_size"),
    ],
)
def test_bad_preprocessor_config_names_the_key(raw, key):
    with pytest.raises(InputError, match=rf"^\S*config\.json: {key}[^\n]*$"):
        image_config(raw)


def test_png_modes_and_orientation(tmp_path):
    rng = np.random.default_rng(3)
    rgb = rng.integers(0, 256, (20, 30, 3), np.uint8)
    grey = rng.integers(0, 256, (20, 30), np.uint8)
    path = tmp_path / "image.bin"  # told by content, not by name

    Image.fromarray(rgb).save(path, "PNG")
    np.testing.assert_array_equal(load_media(path), rgb)
    Image.fromarray(grey).save(path, "PNG")
    np.testing.assert_array_equal(load_media(path), np.repeat(grey[..., None], 3, axis=2))

    clear = np.dstack([rgb, np.zeros((20, 30), np.uint8)])
    Image.fromarray(clear).save(path, "PNG")
    assert (load_media(path) == 255).all()  # wholly transparent shows the white behind

    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(rgb).save(path, "JPEG", exif=exif)
    assert load_media(path).shape == (30, 20, 3)


def one_line(path, *words):
    with pytest.raises(InputError) as caught:
        load_media(path)
    message = str(caught.value)
    assert "\n" not in message and path.name in message
    for word in words:
        assert word in message
    return message


def png_chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">L", zlib.crc32(kind + data))
    return struct.pack(">L", len(data)) + kind + data + check


def test_bad_image_files_are_one_line(tmp_path):
    path = tmp_path / "x.png"
    one_line(path, "read")
    path.write_bytes(b"")
    one_line(path, "empty")
    path.write_text("not an image at all")
    one_line(path, "is none of PNG, JPEG, DICOM")
    image = Image.fromarray(np.random.default_rng(4).integers(0, 256, (64, 64, 3), np.uint8))
    for form in ("PNG", "JPEG"):
        image.save(path, form)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        one_line(path, "truncated")
    for side in (10_000, 60_000):  # a header that claims a bomb; the smaller one under PIL's limit
        head = struct.pack(">LLBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head)
        path.write_bytes(bomb + png_chunk(b"IDAT", zlib.compress(b"\0" * 1000)))
        one_line(path, "pixels")


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), 7])
def test_bad_arrays_are_one_line(bad):
    with pytest.raises(InputError, match=r"^an image must be[^\n]*$"):
        load_media(bad)


def test_do_convert_rgb_false_refuses_other_modes():
    with pytest.raises(InputError, match="do_convert_rgb"):
        load_media(Image.new("L", (30, 30)), convert_rgb=False)
    assert load_media(Image.new("RGB", (30, 30)), convert_rgb=False).shape == (30, 30, 3)


def test_do_resize_false_needs_whole_blocks():
    with pytest.raises(InputError, match="do_resize"):
        to_patches(np.zeros((30, 28, 3), np.uint8), ImageConfig(do_resize=False))


def test_patch_order_is_merge_blocks_then_rows():
    """Each 14 x 14 patch painted with its own number, so order shows without a reference."""
    numbers = np.arange(4 * 6).reshape(4, 6)
    painted = np.repeat(np.repeat(numbers, 14, axis=0), 14, axis=1).astype(np.uint8)
    image = np.repeat(painted[..., None], 3, axis=2)
    config = ImageConfig(min_pixels=1, do_normalize=False, do_rescale=False)
    patches, grid = to_patches(image, config)
    assert grid == (1, 4, 6) and patches.shape == (24, 1176)
    order = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, 12, 13, 18, 19, 14, 15, 20, 21, 16, 17, 22, 23]
    assert patches[:, 0].tolist() == order
