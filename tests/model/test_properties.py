"""What must hold for any weights: packing, causality, and rows that know nothing of one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echovlm_jax.config import ModelConfig, MoEConfig, TextConfig, VisionConfig
from echovlm_jax.model import EchoVLM, abstract_params
from echovlm_jax.processing.batch import make_batch, pad_batch

CONFIG = ModelConfig(
    text=TextConfig(
        vocab_size=60, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=8, mlp_dim=32, mrope_section=(1, 1, 2),
    ),
    vision=VisionConfig(depth=2, width=16, out_width=32, num_heads=2, mlp_dim=32),
    moe=MoEConfig(num_experts=3, top_k=2, expert_mlp_dim=16, shared_mlp_dim=24),
    bos_token_id=0, eos_token_id=2, vision_start_token_id=3, vision_end_token_id=4,
    vision_pad_token_id=5, image_token_id=6, video_token_id=7,
)  # fmt: skip
GRIDS = [(1, 4, 6), (1, 2, 2), (1, 6, 4)]
LENGTH, PATCHES = 48, 64


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype),
        abstract_params(CONFIG),
    )


def row(grid, words, seed):
    rng = np.random.default_rng(seed)
    count = int(np.prod(grid))
    ids = [
        *rng.integers(8, 60, 3),
        *[CONFIG.vision_start_token_id, *[CONFIG.image_token_id] * (count // 4)],
        *[CONFIG.vision_end_token_id, *rng.integers(8, 60, words)],
    ]
    return {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "pixel_values": rng.standard_normal((count, 1176)).astype(np.float32),
        "image_grid_thw": np.array([grid], np.int64),
    }


ROWS = [row(grid, 4 + i, i) for i, grid in enumerate(GRIDS)]


@jax.jit
def forward(params, batch):
    return EchoVLM(CONFIG).apply({"params": params}, batch, method="forward")


def test_packed_equals_unpacked(params):
    """Three examples in one row, each a segment, its frames and its image tokens numbered on."""
    pieces = [make_batch(CONFIG, one) for one in ROWS]
    packed = {key: [] for key in pieces[0]}
    frames = tokens = 0
    for number, piece in enumerate(pieces, start=1):
        index = piece["patch_index"]
        for key, value in piece.items():
            packed[key].append(value)
        packed["segment_ids"][-1] = piece["segment_ids"] * number
        packed["patch_segment_ids"][-1] = piece["patch_segment_ids"] + frames
        packed["patch_index"][-1] = np.where(index >= 0, index + tokens, -1)
        frames += piece["patch_segment_ids"].max()
        tokens += piece["patches"].shape[1] // 4
    joined = {
        key: np.concatenate(values, axis=2 if key == "positions" else 1)
        for key, values in packed.items()
    }
    together = forward(params, joined)
    at = 0
    for one in ROWS:
        alone = forward(params, make_batch(CONFIG, one, seq_len=LENGTH, max_patches=PATCHES))
        size = one["input_ids"].size
        np.testing.assert_allclose(
            together[0, at : at + size], alone[0, LENGTH - size :], atol=2e-5
        )
        at += size


def test_a_changed_token_changes_nothing_before_it(params):
    batch = make_batch(CONFIG, ROWS[0], seq_len=LENGTH, max_patches=PATCHES)
    before = np.asarray(forward(params, batch))
    first = LENGTH - ROWS[0]["input_ids"].size
    for column in range(first, LENGTH):
        if batch["patch_index"][0, column] >= 0:
            continue
        changed = {**batch, "tokens": batch["tokens"].copy()}
        changed["tokens"][0, column] = (batch["tokens"][0, column] + 1) % 60
        after = np.asarray(forward(params, changed))
        np.testing.assert_array_equal(after[0, first:column], before[0, first:column])
        assert np.abs(after[0, column:] - before[0, column:]).max(axis=-1).min() > 1e-6


def test_a_changed_image_changes_its_own_row_from_there_on(params):
    batch = make_batch(CONFIG, pad_batch(ROWS, 0), seq_len=LENGTH, max_patches=PATCHES)
    before = np.asarray(forward(params, batch))
    for b in range(len(ROWS)):
        changed = {**batch, "patches": batch["patches"].copy()}
        changed["patches"][b, 0] += 1.0
        after = np.asarray(forward(params, changed))
        others = [i for i in range(len(ROWS)) if i != b]
        np.testing.assert_array_equal(after[others], before[others])
        first = int(np.flatnonzero(batch["segment_ids"][b])[0])
        start = int(np.flatnonzero(batch["patch_index"][b] >= 0)[0])
        np.testing.assert_array_equal(after[b, first:start], before[b, first:start])
        assert np.abs(after[b, start:] - before[b, start:]).max(axis=-1).min() > 1e-6


def test_padding_holds_nothing_that_matters(params):
    """Garbage in padded patches and padded tokens leaves every real logit as it was."""
    batch = make_batch(CONFIG, pad_batch(ROWS, 0), seq_len=LENGTH, max_patches=PATCHES)
    real = batch["segment_ids"] > 0
    before = np.asarray(forward(params, batch))[real]
    changed = {**batch, "patches": batch["patches"].copy(), "tokens": batch["tokens"].copy()}
    changed["patches"][batch["patch_segment_ids"] == 0] = 9.0
    changed["tokens"][~real] = 11
    np.testing.assert_array_equal(np.asarray(forward(params, changed))[real], before)


def test_bfloat16_follows_float32_with_norms_and_routing_in_float32(params):
    batch = make_batch(CONFIG, ROWS[0])
    wide = EchoVLM(CONFIG).apply({"params": params}, batch)
    low = EchoVLM(CONFIG, jnp.bfloat16).apply({"params": params}, batch)
    assert low.hidden.dtype == low.kv[0].dtype == jnp.bfloat16
    assert low.router_logits.dtype == low.coefficient.dtype == jnp.float32
    error = jnp.abs(low.hidden.astype(jnp.float32) - wide.hidden)
    # A bfloat16 has 8 bits: a hundredth of the values' size, in the mean, after two layers.
    assert 1e-4 < error.mean() / jnp.abs(wide.hidden).mean() < 0.03
    logits = EchoVLM(CONFIG, jnp.bfloat16).apply({"params": params}, low.hidden, method="logits")
    assert logits.dtype == jnp.float32
