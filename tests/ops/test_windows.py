"""Windows of frames: their order, and attention that looks no further than a window."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echovlm_jax.ops.attention.dispatch import attention
from echovlm_jax.ops.windows import take_cells, window_order
from echovlm_jax.plan import hlo
from echovlm_jax.processing.batch import frame_positions

# Windows of every shape: whole, one cell over, one side shorter, smaller than a window.
GRIDS = [(1, 16, 8), (1, 10, 18), (2, 4, 20), (1, 2, 2), (3, 8, 8), (1, 2, 30), (1, 18, 2)]


def row(grids, padding=0, merge=2):
    """(segments [1, P], positions [1, P, 2]) of frames one after another."""
    segments, positions = [], []
    frame = 0
    for t, h, w in grids:
        for _ in range(t):
            frame += 1
            segments += [frame] * (h * w)
            positions.append(frame_positions(h, w, merge))
    positions.append(np.zeros((padding, 2), np.int64))
    segments = np.array([segments + [0] * padding], np.int32)
    return segments, np.concatenate(positions)[None].astype(np.int32)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 9])
def test_the_order_is_transformers(window):
    torch = pytest.importorskip("torch")
    vision_utils = pytest.importorskip("transformers.vision_utils")
    segments, positions = row(GRIDS, padding=12)
    made = jax.jit(functools.partial(window_order, window=window, unit=4))(segments, positions)
    index, ends = vision_utils.get_vision_window_index(
        torch.tensor(GRIDS), spatial_merge_size=2, window_size=28 * window, patch_size=14
    )
    used = len(index)
    np.testing.assert_array_equal(made.order[0, :used], index)
    np.testing.assert_array_equal(made.order[0, used:], np.arange(used, used + 3))
    sizes = np.diff(ends.numpy())
    np.testing.assert_array_equal(
        made.ids[0, : 4 * used], 1 + np.repeat(np.arange(len(sizes)), sizes)
    )
    assert not made.ids[0, 4 * used :].any()


def test_there_and_back():
    segments, positions = (np.repeat(x, 2, axis=0) for x in row(GRIDS[1:3]))
    made = window_order(segments, positions, window=4, unit=4)
    x = jnp.arange(segments.size * 3.0).reshape(*segments.shape, 3)
    moved = take_cells(x, made.order)
    assert not np.array_equal(moved, x)
    np.testing.assert_array_equal(take_cells(moved, made.back), x)
    cells = x[:, ::4]
    np.testing.assert_array_equal(take_cells(moved[:, ::4], made.back), cells)


def test_rows_have_their_own_windows():
    rows = [row([(1, 10, 18)]), row([(1, 18, 10)])]
    segments, positions = (np.concatenate(x) for x in zip(*rows, strict=True))
    together = window_order(segments, positions, window=4, unit=4)
    for n, one in enumerate(rows):
        alone = window_order(*one, window=4, unit=4)
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_array_equal(a[n], b[0])


@functools.partial(jax.jit, static_argnames=("implementation", "reach"))
def run(q, k, v, d_out, ids, *, implementation="xla", reach=None):
    def forward(q, k, v):
        return attention(
            q, k, v, q_segments=ids, kv_segments=ids, causal_offset=None,
            implementation=implementation, reach=reach,
        )  # fmt: skip

    out, pull = jax.vjp(forward, q, k, v)
    return out, *pull(d_out)


# Several turns of blocks (many rows and heads), a length off the blocks, fewer keys/value heads.
SHAPES = [(1, 2, 2, 16), (2, 4, 1, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("implementation", "reach"),
    [
        ("xla", 64),
        ("triton_interpret", 64),
        pytest.param("splash_interpret", 64, marks=pytest.mark.slow),
    ],
)
def test_looking_near_is_looking_everywhere(monkeypatch, implementation, reach, shape):
    """Values and gradients, where every window is one run of at most `reach` patches."""
    from echovlm_jax.ops.attention import near

    batch, heads, kv_heads, dim = shape
    monkeypatch.setattr(near, "SCORES", 3 * batch * heads * reach * 3 * reach)
    segments, positions = (np.repeat(x, batch, axis=0) for x in row(GRIDS, padding=20))
    ids = window_order(segments, positions, window=4, unit=4).ids
    assert np.unique(ids[0], return_counts=True)[1].max() == 64 and ids.shape[1] > 500
    rng = np.random.default_rng(0)
    shapes = [(*ids.shape, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, d_out = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    used = np.asarray(ids != 0)[..., None, None]
    d_out *= used
    near_ones = run(q, k, v, d_out, ids, implementation=implementation, reach=reach)
    everywhere = run(q, k, v, d_out, ids)
    for a, b in zip(near_ones, everywhere, strict=True):
        np.testing.assert_allclose(a * used, b * used, atol=2e-5 * np.abs(b).max())
        assert np.isfinite(a).all()


def test_nothing_of_another_window_is_seen():
    segments, positions = row(GRIDS)
    ids = np.asarray(window_order(segments, positions, window=4, unit=4).ids)
    rng = np.random.default_rng(1)
    q, k, v, d_out = (rng.standard_normal((*ids.shape, 2, 8)).astype(np.float32) for _ in range(4))
    own = (ids == 5)[..., None, None]
    _, dq, dk, dv = run(q, k, v, d_out * own, ids, reach=64)
    for gradient in (dq, dk, dv):
        assert np.any(np.where(own, gradient, 0)) and not np.any(np.where(own, 0, gradient))


def test_work_grows_with_the_length_and_not_with_its_square():
    flops = []
    for length in (1024, 4096):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        program = run.lower(x, x, x, x, ids, reach=64).compile()
        flops.append(hlo.read(program.as_text()).matmul_flops)
    assert flops[1] == pytest.approx(4 * flops[0], rel=0.1)
    # 192 keys; two products going forward and four going back, where XLA sees both side by side.
    assert flops[0] == pytest.approx(6 * 2 * 1024 * 192 * 2 * 16, rel=0.01)
