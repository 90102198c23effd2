"""Sizes of an exam's media: exactly what to_patches makes, as large as fits, by the stated rule."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echovlm_jax.data.fit import Grid, cut, fit, training_images
from echovlm_jax.data.record import Medium
from echovlm_jax.errors import InputError
from echovlm_jax.processing.images import ImageConfig, smart_resize, to_patches

QWEN = ImageConfig()
RECIPE = 784  # patches an image: 196 tokens
SIDES = st.integers(10, 400)
MEDIA = st.lists(
    st.builds(Medium, st.one_of(st.just(0), st.integers(1, 40)), SIDES, SIDES), max_size=8
)


def total(grids):
    return sum(grid.patches for grid in grids)


@settings(max_examples=100)
@given(MEDIA, st.integers(0, 600), st.integers(1, 1500), st.integers(0, 6000))
def test_whatever_is_made_fits_or_nothing_smaller_would(media, text, seq_len, max_patches):
    grids = fit(media, text, seq_len, max_patches, RECIPE, QWEN)
    if grids is None:
        smallest = [m._replace(frames=min(m.frames, 2)) for m in media]
        least = fit(smallest, 0, 10**9, 10**9, QWEN.min_pixels // 14**2, QWEN)
        assert total(least) > max_patches or text + total(least) // 4 > seq_len
        return
    assert len(grids) == len(media)
    assert total(grids) <= max_patches and text + total(grids) // 4 <= seq_len
    for medium, grid in zip(media, grids, strict=True):
        assert grid.h * grid.w <= RECIPE and grid.h % 2 == grid.w % 2 == 0  # none is a sliver
        assert min(medium.frames, 2) <= grid.frames <= medium.frames
        assert grid.t == max(1, -(-grid.frames // 2))


@settings(max_examples=60)
@given(
    st.builds(Medium, st.integers(0, 7), SIDES, SIDES),
    st.integers(4, 900),
)
def test_grids_are_what_to_patches_makes(medium, room):
    grids = fit([medium], 0, 10**6, room, RECIPE, QWEN)
    if grids is None:
        return
    shape = (medium.height, medium.width, 3)
    pixels = np.zeros((medium.frames, *shape) if medium.frames else shape, np.uint8)
    assert cut(pixels, grids[0], QWEN).shape == (grids[0].patches, 1176)


@settings(max_examples=150)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(1, 1200),
    st.sampled_from([3136, 200704]),
)
def test_an_image_has_one_size_in_training_and_elsewhere(height, width, limit, least):
    """Of slivers and small images too, which come out above the limit that they are resized to.

    Elsewhere it follows from the limits that a run states, by Hugging Face's `smart_resize`, which
    ours equals.
    """
    images = training_images(dataclasses.replace(QWEN, min_pixels=least), limit, 10**6)
    try:
        (grid,) = fit([Medium(0, height, width)], 0, 10**6, 10**6, limit, images)
    except InputError as error:
        assert max(height, width) > 200 * min(height, width), error
        return
    stated = images.min_pixels, images.max_pixels
    assert (grid.h * 14, grid.w * 14) == smart_resize(height, width, 28, *stated)


def test_an_image_with_room_is_made_as_the_processor_makes_it():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (300, 500, 3), np.uint8)
    (grid,) = fit([Medium(0, 300, 500)], 10, 4096, 4096, 10**6, QWEN)
    patches, made = to_patches(pixels, QWEN)
    assert grid[:3] == made
    np.testing.assert_array_equal(cut(pixels, grid, QWEN), patches)


def test_a_large_image_takes_the_recipes_196_tokens_at_most():
    (grid,) = fit([Medium(0, 768, 1024)], 0, 10**6, 10**6, RECIPE, QWEN)
    assert grid.patches == 24 * 32 == 768


def test_first_loops_lose_frames_then_all_images_shrink():
    media = [Medium(0, 400, 400), Medium(16, 400, 400)]
    full, loop = fit(media, 0, 10**6, 10**6, RECIPE, QWEN)
    assert (full.t, loop.t, loop.frames) == (1, 8, 16)
    fewer = fit(media, 0, 10**6, total((full, loop)) - 1, RECIPE, QWEN)
    assert [g.frames for g in fewer] == [0, 8]  # half of them
    assert [g[1:3] for g in fewer] == [full[1:3], loop[1:3]]  # and as large as before
    two = fit(media, 0, 10**6, 2 * full.patches, RECIPE, QWEN)
    assert [g.frames for g in two] == [0, 2] and two[1].t == 1
    smaller = fit(media, 0, 10**6, 2 * full.patches - 1, RECIPE, QWEN)
    assert [g.frames for g in smaller] == [0, 2]
    assert [g[1:3] for g in smaller] == [(26, 26)] * 2  # the next smaller square
    assert fit(media, 0, 10**6, 2 * 16, RECIPE, QWEN) is not None  # 56 x 56 pixels each
    assert fit(media, 0, 10**6, 2 * 16 - 1, RECIPE, QWEN) is None


@pytest.mark.parametrize("room", range(300, 1950, 150))
def test_images_shrink_no_more_than_they_must(room):
    """The common limit found is the largest of all that there are."""
    media = [Medium(0, 400, 380), Medium(0, 300, 700), Medium(4, 256, 310), Medium(0, 90, 99)]
    found = fit(media, 0, 10**6, room, RECIPE, QWEN)
    media[2] = Medium(2, 256, 310)
    sizes = [
        fit(media, 0, 10**6, 10**6, RECIPE, dataclasses.replace(QWEN, max_pixels=28**2 * n))
        for n in range(4, 197)
    ]
    assert total(found) == max(total(grids) for grids in sizes if total(grids) <= room)


def test_tokens_limit_as_patches_do():
    media = [Medium(0, 400, 400)]
    assert fit(media, 100, 100 + 196, 10**6, RECIPE, QWEN) == fit(
        media, 0, 10**6, 784, RECIPE, QWEN
    )
    (smaller,) = fit(media, 101, 100 + 196, 10**6, RECIPE, QWEN)
    assert smaller.patches == 26 * 26
    assert fit(media, 293, 296, 10**6, RECIPE, QWEN) is None
    assert fit([], 297, 296, 10**6, RECIPE, QWEN) is None
    assert fit([], 296, 296, 0, RECIPE, QWEN) == ()


def test_a_single_frame_is_a_loop_of_one_step():
    (grid,) = fit([Medium(1, 100, 100)], 0, 10**6, 10**6, RECIPE, QWEN)
    assert (grid.t, grid.frames) == (1, 1)


def test_frames_are_evenly_spaced_from_the_first_on():
    loop = np.zeros((10, 56, 56, 3), np.uint8) + np.arange(10, dtype=np.uint8)[:, None, None, None]
    plain = dataclasses.replace(QWEN, do_normalize=False, do_rescale=False)
    patches = cut(loop, Grid(2, 4, 4, 4, 10**6), plain)
    # A patch is (channel, two frames, 14, 14).
    shown = patches.reshape(2, 16, 3, 2, 196)[:, 0, 0, :, 0]
    assert shown.tolist() == [[0, 2], [5, 7]]


def test_what_cannot_be_made_is_said():
    with pytest.raises(InputError, match="at most 200 times"):
        fit([Medium(0, 10, 4000)], 0, 10**6, 10**6, RECIPE, QWEN)
    fixed = dataclasses.replace(QWEN, do_resize=False)
    with pytest.raises(InputError, match="multiples of 28"):
        fit([Medium(0, 100, 100)], 0, 10**6, 10**6, RECIPE, fixed)
    assert fit([Medium(0, 112, 112)], 0, 10**6, 63, RECIPE, fixed) is None
    assert fit([Medium(4, 112, 112)], 0, 10**6, 64, RECIPE, fixed) == (
        Grid(1, 8, 8, 2, RECIPE * 14**2),
    )


def test_pixels_that_are_not_the_planned_ones_are_refused():
    (grid,) = fit([Medium(0, 300, 500)], 0, 10**6, 10**6, RECIPE, QWEN)
    with pytest.raises(InputError, match="changed after the plan was made"):
        cut(np.zeros((500, 300, 3), np.uint8), grid, QWEN)
    with pytest.raises(InputError, match="planned as an image of"):
        cut(np.zeros((4, 300, 500, 3), np.uint8), grid, QWEN)
    with pytest.raises(InputError, match="planned as a loop of 4 frames"):
        cut(np.zeros((3, 56, 56, 3), np.uint8), Grid(2, 4, 4, 4, 10**6), QWEN)
