"""M-RoPE ids against transformers, and against a plain reading of the rule."""

import numpy as np
import pytest

from echovlm_jax.config import preset
from echovlm_jax.errors import InputError
from echovlm_jax.processing.positions import mrope_positions

CONFIG = preset("tiny")
IMAGE, VIDEO = CONFIG.image_token_id, CONFIG.video_token_id
START, END, TEXT = CONFIG.vision_start_token_id, CONFIG.vision_end_token_id, 100


def random_layout(rng, *, long_videos: bool):
    """One row's tokens, and its grids in order: text, images and videos in any order."""
    tokens, images, videos = [], [], []
    for _ in range(rng.integers(0, 5)):
        tokens += [TEXT] * rng.integers(0, 6)
        h, w = (int(v) for v in rng.integers(1, 6, 2) * 2)
        video = rng.random() < 0.4
        longest = 12 if long_videos else max(h, w) // 2
        t = int(rng.integers(1, longest + 1)) if video else 1
        (videos if video else images).append((t, h, w))
        marks = t * h * w // 4
        tokens += [START, *[VIDEO if video else IMAGE] * marks, END]
    return tokens + [TEXT] * int(rng.integers(1, 6)), images, videos


def random_batch(rng, *, long_videos: bool = False):
    rows = [random_layout(rng, long_videos=long_videos) for _ in range(rng.integers(1, 4))]
    width = max(len(tokens) for tokens, _, _ in rows) + int(rng.integers(0, 4))
    ids, mask = np.zeros((2, len(rows), width), np.int64)
    for b, (tokens, _, _) in enumerate(rows):
        at = width - len(tokens) if rng.random() < 0.5 else 0
        ids[b, at : at + len(tokens)], mask[b, at : at + len(tokens)] = tokens, 1
    listed = ([grid for row in rows for grid in row[i]] for i in (1, 2))
    grids = [np.array(grid, np.int64).reshape(-1, 3) for grid in listed]
    return ids, mask, grids[0], grids[1]


def plain_reference(tokens, images, videos):
    """The rule token by token, in lists: three coordinates each, running maximum + 1."""
    images, videos = iter(images), iter(videos)
    out, i = [], 0
    while i < len(tokens):
        following = max((max(p) for p in out), default=-1) + 1
        if tokens[i] in (IMAGE, VIDEO):
            t, h, w = next(images if tokens[i] == IMAGE else videos)
            for a in range(t):
                for b in range(h // 2):
                    out += [(following + a, following + b, following + c) for c in range(w // 2)]
            i = len(out)
        else:
            out.append((following,) * 3)
            i += 1
    return np.array(out).T


def test_500_random_layouts_equal_transformers():
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    rope_index = modeling.Qwen2VLModel.get_rope_index

    class Model:
        """All that get_rope_index reads of a model."""

        get_vision_position_ids = modeling.Qwen2VLModel.get_vision_position_ids

        class config:
            class vision_config:
                spatial_merge_size = 2

    rng = np.random.default_rng(0)
    with_vision = 0
    for _ in range(500):
        ids, mask, images, videos = random_batch(rng)
        with_vision += bool(len(images) + len(videos))
        kinds = np.where(ids == IMAGE, 1, np.where(ids == VIDEO, 2, 0))
        expected, _ = rope_index(
            Model(), *map(torch.tensor, (ids, kinds, images, videos)), torch.tensor(mask)
        )
        ours, deltas = mrope_positions(ids, mask, images, videos, config=CONFIG)
        real = mask.astype(bool)
        np.testing.assert_array_equal(ours[:, real], expected.numpy()[:, real])
        assert (ours[:, ~real] == 1).all()
        highest = np.where(real, ours.max(axis=0), -1).max(axis=1)
        np.testing.assert_array_equal(deltas, highest + 1 - ids.shape[1])
    assert with_vision > 400


def test_long_videos_go_on_at_the_running_maximum():
    rng = np.random.default_rng(1)
    longer = 0
    for _ in range(200):
        tokens, images, videos = random_layout(rng, long_videos=True)
        longer += any(t > max(h, w) // 2 for t, h, w in videos)
        grids = [np.array(g, np.int64).reshape(-1, 3) for g in (images, videos)]
        ours, _ = mrope_positions(np.array([tokens]), None, *grids, config=CONFIG)
        np.testing.assert_array_equal(ours[:, 0], plain_reference(tokens, images, videos))
    assert longer > 30


def test_worked_example_of_the_docstring():
    ids = [[TEXT, IMAGE, IMAGE, IMAGE, IMAGE, TEXT]]
    ours, deltas = mrope_positions(ids, None, [[1, 4, 4]], config=CONFIG)
    assert ours[:, 0].tolist() == [
        [0, 1, 1, 1, 1, 3],
        [0, 1, 1, 2, 2, 3],
        [0, 1, 2, 1, 2, 3],
    ]
    assert deltas.tolist() == [-2]


def test_images_with_nothing_between_them():
    ids = [[IMAGE] * 4 + [IMAGE] * 2 + [VIDEO] * 2 + [TEXT]]
    grids = ([[1, 4, 4], [1, 2, 4]], [[2, 2, 2]])
    ours, _ = mrope_positions(ids, None, *map(np.array, grids), config=CONFIG)
    np.testing.assert_array_equal(ours[:, 0], plain_reference(ids[0], *grids))
    assert ours[0, 0].tolist() == [0, 0, 0, 0, 2, 2, 4, 5, 6]


def test_text_only_counts_the_mask():
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]])
    ours, deltas = mrope_positions(np.full((3, 5), TEXT), mask, config=CONFIG)
    assert ours[1].tolist() == [[1, 1, 0, 1, 2], [0, 1, 2, 3, 1], [1, 1, 1, 1, 0]]
    # A new token of each row has the position after its last: 3, 4 and 1, in column 5.
    assert (5 + deltas).tolist() == [3, 4, 1]


TIMED = CONFIG.replace(tokens_per_second=2)


def timed_reference(tokens, images, videos, seconds):
    """`plain_reference`, and a video's steps where PyTorch's own float product puts them."""
    torch = pytest.importorskip("torch")
    images, videos = iter(images), iter(zip(videos, seconds, strict=True))
    out, i = [], 0
    while i < len(tokens):
        following = max((max(p) for p in out), default=-1) + 1
        if tokens[i] == TEXT or tokens[i] in (START, END):
            out.append((following,) * 3)
        else:
            (t, h, w), second = (next(images), 1.0) if tokens[i] == IMAGE else next(videos)
            times = (torch.arange(t) * torch.tensor(second, dtype=torch.float32) * 2).long()
            for a in times.tolist():
                for b in range(h // 2):
                    out += [(following + a, following + b, following + c) for c in range(w // 2)]
        i = len(out)
    return np.array(out).T


@pytest.mark.parametrize("fps", [1, 2, 24, 29.97, 0.3])
def test_a_videos_steps_lie_where_their_time_is(fps):
    rng = np.random.default_rng(2)
    seen = 0
    for _ in range(100):
        tokens, images, videos = random_layout(rng, long_videos=True)
        seconds = [2 / fps * (1 + n % 2) for n in range(len(videos))]  # the next at half the rate
        seen += sum(t for t, _, _ in videos)
        grids = [np.array(g, np.int64).reshape(-1, 3) for g in (images, videos)]
        ours, deltas = mrope_positions(
            np.array([tokens]), None, *grids, config=TIMED, second_per_grid_ts=seconds
        )
        expected = timed_reference(tokens, images, videos, seconds)
        np.testing.assert_array_equal(ours[:, 0], expected)
        assert deltas == expected.max() + 1 - len(tokens)
    assert seen > 200


@pytest.mark.parametrize("fps", [1, 2, 24, 29.97])
def test_a_long_videos_time_is_transformers(fps):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    place = modeling.Qwen2_5_VLModel.get_vision_position_ids
    grid = torch.tensor([2000, 2, 4])
    second = torch.tensor(2 / fps)
    expected = place(None, 3, grid, 1, 2, 2 * second)  # its tokens_per_second, 2
    tokens = np.array([[TEXT] * 3 + [VIDEO] * 4000])
    ours, _ = mrope_positions(
        tokens, None, None, grid[None].numpy(), config=TIMED, second_per_grid_ts=second[None]
    )
    np.testing.assert_array_equal(ours[:, 0, 3:], expected)


def test_seconds_count_where_the_model_counts_time():
    video = (np.array([[VIDEO] * 3 + [TEXT]]), None, None, [[3, 2, 2]])
    times = [
        mrope_positions(*video, config=config, second_per_grid_ts=seconds)[0][0, 0].tolist()
        for config, seconds in ((TIMED, [1.25]), (TIMED, None), (CONFIG, [1.25]))
    ]
    assert times == [[0, 2, 5, 6], [0, 2, 4, 5], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ([1.0, 1.0], "has shape [2] and there are 1 videos"),
        ([], "has shape [0]"),
        ([0.0], "must be above 0"),
        ([float("nan")], "must be above 0"),
        ([float("inf")], "must be above 0"),
        (["two"], "must be numbers"),
    ],
)
def test_seconds_that_cant_be_are_one_line(seconds, words):
    with pytest.raises(InputError) as caught:
        mrope_positions(
            np.array([[VIDEO]]), None, None, [[1, 2, 2]], config=TIMED, second_per_grid_ts=seconds
        )
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tokens, images, videos, words",
    [
        ([IMAGE] * 4, None, None, "image"),
        ([IMAGE] * 4, [[1, 4, 4], [1, 4, 4]], None, "2 images are given but the tokens hold 1"),
        ([TEXT] * 4, None, [[1, 4, 4]], "1 videos are given but the tokens hold 0"),
        ([IMAGE] * 3, [[1, 4, 4]], None, "needs 4 tokens"),
        ([IMAGE, IMAGE, TEXT, IMAGE, IMAGE], [[1, 4, 4]], None, "needs 4 tokens"),
        ([VIDEO] * 4, [[1, 4, 4]], None, "videos"),
        ([IMAGE] * 4, [[1, 4]], None, "image_grid_thw"),
        ([IMAGE] * 4, [[1, 4, 0]], None, "image_grid_thw"),
    ],
)
def test_mismatches_are_one_line(tokens, images, videos, words):
    with pytest.raises(InputError) as caught:
        mrope_positions(np.array([tokens]), None, images, videos, config=CONFIG)
    assert words in str(caught.value) and "\n" not in str(caught.value)
