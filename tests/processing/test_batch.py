"""HF-style inputs to the model's batch."""

import itertools

import numpy as np
import pytest

from echovlm_jax.config import preset
from echovlm_jax.errors import InputError
from echovlm_jax.processing.batch import (
    PATCH_BUCKETS,
    SEQUENCE_BUCKETS,
    bucket,
    frame_positions,
    make_batch,
    merged_order,
    pad_batch,
)
from echovlm_jax.processing.images import ImageConfig, to_patches
from echovlm_jax.processing.positions import mrope_positions

CONFIG = preset("tiny")
IMAGE, VIDEO = CONFIG.image_token_id, CONFIG.video_token_id


def one_prompt(rng, layout: str) -> dict:
    """A row by letters: t text, i image, v video. Every patch holds a number of its own."""
    ids: list[int] = []
    out: dict = {"pixel_values": [], "pixel_values_videos": []}
    grids: dict = {"image": [], "video": []}
    for letter in layout:
        if letter == "t":
            ids += rng.integers(100, 200, 3).tolist()
            continue
        kind, token = ("image", IMAGE) if letter == "i" else ("video", VIDEO)
        t = 1 if kind == "image" else int(rng.integers(1, 4))
        h, w = (int(v) for v in rng.integers(1, 4, 2) * 2)
        grids[kind].append((t, h, w))
        key = "pixel_values" if kind == "image" else "pixel_values_videos"
        out[key].append(rng.random((t * h * w, 1)).repeat(1176, 1).astype(np.float32))
        ids += [token] * (t * h * w // 4)
    out = {key: np.concatenate(parts) for key, parts in out.items() if parts}
    out |= {f"{k}_grid_thw": np.array(g, np.int64) for k, g in grids.items() if g}
    return {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), int), **out}


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_token_finds_its_own_patch(side):
    """Gathering by merged_order restores the order of pixel_values, whatever the layout."""
    rng = np.random.default_rng(0)
    layouts = ["tit", "vtiivt", "ttt", "iv"]
    inputs = pad_batch([one_prompt(rng, layout) for layout in layouts], 99, side)
    batch = make_batch(CONFIG, inputs)
    merged = batch["patches"][..., 0].reshape(4, -1, 4)  # what stands for a merged embedding
    for key, order in zip(
        ("pixel_values", "pixel_values_videos"), merged_order(CONFIG, inputs), strict=True
    ):
        np.testing.assert_array_equal(
            merged[order[:, 0], order[:, 1]], inputs[key][:, 0].reshape(-1, 4)
        )
    vision = np.isin(inputs["input_ids"], (IMAGE, VIDEO))
    assert ((batch["patch_index"] >= 0) == vision).all()
    for row in batch["patch_index"]:
        assert row[row >= 0].tolist() == list(range((row >= 0).sum()))
    np.testing.assert_array_equal(batch["segment_ids"], inputs["attention_mask"])
    keys = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw")
    positions, _ = mrope_positions(*(inputs[key] for key in keys), config=CONFIG)
    np.testing.assert_array_equal(batch["positions"], positions.transpose(1, 0, 2))


def test_patch_segments_are_frames_and_positions_follow_the_patch_order():
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 256, (4, 56, 84, 3), np.uint8)
    video, (t, h, w) = to_patches(frames, ImageConfig(min_pixels=1))
    image, grid = to_patches(frames[0, :28, :56], ImageConfig(min_pixels=1))
    ids = [[VIDEO] * (t * h * w // 4) + [100] + [IMAGE] * 2]
    inputs = {
        "input_ids": np.array(ids),
        "pixel_values": image,
        "image_grid_thw": np.array([grid]),
        "pixel_values_videos": video,
        "video_grid_thw": np.array([(t, h, w)]),
    }
    batch = make_batch(CONFIG, inputs, seq_len=20, max_patches=64)
    assert (t, h, w) == (2, 4, 6) and grid == (1, 2, 4)
    segments = batch["patch_segment_ids"][0]
    assert segments.tolist() == [1] * 24 + [2] * 24 + [3] * 8 + [0] * 8
    places = batch["patch_positions"][0]
    assert places[:6].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]
    np.testing.assert_array_equal(places[:24], places[24:48])
    # The position of a patch is where its pixels came from.
    config = ImageConfig(min_pixels=1, do_normalize=False, do_rescale=False)
    raw, _ = to_patches(frames, config)
    for patch, (row, column) in zip(raw[:24], places[:24], strict=True):
        corner = frames[0, row * 14, column * 14, 0]
        assert patch[0] == corner
    assert batch["tokens"].shape == (1, 20) and batch["patches"].shape == (1, 64, 1176)
    assert batch["segment_ids"][0].tolist() == [0] * 5 + [1] * 15
    for key, value in batch.items():
        assert value.dtype == (np.float32 if key == "patches" else np.int32), key


def test_extra_padding_goes_left_and_changes_nothing_else():
    rng = np.random.default_rng(2)
    inputs = pad_batch([one_prompt(rng, "ti"), one_prompt(rng, "titvt")], 99, "right")
    plain, padded = make_batch(CONFIG, inputs), make_batch(CONFIG, inputs, seq_len=64)
    width = plain["tokens"].shape[1]
    for key in ("tokens", "segment_ids", "patch_index"):
        np.testing.assert_array_equal(padded[key][:, -width:], plain[key])
    np.testing.assert_array_equal(padded["positions"][..., -width:], plain["positions"])
    assert (padded["segment_ids"][:, :-width] == 0).all()
    assert (padded["patch_index"][:, :-width] == -1).all()


def test_text_only_has_no_patches_unless_asked():
    inputs = {"input_ids": np.array([[5, 8, 9]])}
    assert set(make_batch(CONFIG, inputs)) == {"tokens", "positions", "segment_ids"}
    batch = make_batch(CONFIG, inputs, max_patches=16)
    assert batch["patches"].shape == (1, 16, 1176) and not batch["patch_segment_ids"].any()
    assert (batch["patch_index"] == -1).all()


def test_frame_positions_of_an_odd_merge():
    places = frame_positions(6, 3, 3)
    assert places[:9].tolist() == [[a, b] for a in range(3) for b in range(3)]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seq_len": 3}, "exceeds the length 3"),
        ({"max_patches": 4}, "the buffer 4"),
        ({"max_patches": 1026}, "multiple of 4"),
        ({"pixel_values": np.zeros((4, 1176), np.float32)}, "pixel_values has shape [4, 1176]"),
        ({"pixel_values": None}, "without pixel_values"),
        ({"image_grid_thw": None}, "image"),
        ({"image_grid_thw": np.array([[1, 3, 4]])}, ""),
    ],
)
def test_mismatches_are_one_line(change, words):
    inputs = one_prompt(np.random.default_rng(6), "titi")
    options = {k: v for k, v in change.items() if k in ("seq_len", "max_patches")}
    inputs |= {k: v for k, v in change.items() if k not in options}
    with pytest.raises(InputError) as caught:
        make_batch(CONFIG, inputs, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_fifty_image_sizes_need_no_more_shapes_than_buckets():
    rng = np.random.default_rng(3)
    shapes = set()
    for _ in range(50):
        h, w = (int(v) for v in rng.integers(1, 37, 2) * 2)
        shapes.add((bucket(h * w // 4 + 40), bucket(h * w, PATCH_BUCKETS)))
    assert len(shapes) <= len(PATCH_BUCKETS)
    for buckets in (SEQUENCE_BUCKETS, PATCH_BUCKETS):
        assert list(buckets) == sorted(set(buckets))
        assert all(3 * (b - (a + 1)) <= b for a, b in itertools.pairwise(buckets))  # padding
        assert all(size % 4 == 0 for size in buckets)
    assert bucket(128) == 128 and bucket(129) == 192 and bucket(0) == 64
    assert bucket(28 * 28, PATCH_BUCKETS) == 28 * 28
    with pytest.raises(InputError, match="32769 exceeds the largest bucket, 32768"):
        bucket(32769)
