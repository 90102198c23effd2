"""Rows on two budgets: nothing lost, doubled, split or over, and hardly anything empty."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echovlm_jax.data.fit import fit
from echovlm_jax.data.packing import pack
from echovlm_jax.data.record import Medium
from echovlm_jax.processing.images import ImageConfig

SAMPLES = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 120)), max_size=80)
# What ultrasound images come as, height x width.
SIZES = [(256, 256), (225, 300), (400, 500), (480, 640), (600, 800), (768, 1024), (560, 469)]


def realistic(count, seed=0):
    """Texts of about 90 tokens, as the public reports have by Qwen2's tokenizer; 1 to 8 images."""
    rng = np.random.default_rng(seed)
    each = [
        fit([Medium(0, *size)], 0, 10**6, 10**6, 784, ImageConfig())[0].patches for size in SIZES
    ]
    number = rng.integers(1, 9, count)
    which = rng.integers(0, len(SIZES), (count, 8))
    patches = np.where(np.arange(8) < number[:, None], np.array(each)[which], 0).sum(1)
    return np.clip(rng.normal(92, 12, count), 58, 154).astype(int) + patches // 4, patches


def used(rows, values, budget):
    return values.sum() / (len(rows.offsets) - 1) / budget


@given(SAMPLES, st.integers(0, 2**64 - 1), st.integers(1, 90), st.booleans())
def test_each_sample_is_in_one_row_and_rows_keep_their_budgets(samples, key, window, grouped):
    tokens, patches = np.array(samples, int).reshape(-1, 2).T
    groups = np.arange(len(tokens)) % 5 if grouped else None
    rows = pack(tokens, patches, 50, 120, key=key, groups=groups, window=window)
    assert sorted(rows.samples) == list(range(len(samples)))
    assert rows.offsets[0] == 0 and rows.offsets[-1] == len(samples)
    for start, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
        row = rows.samples[start:end]
        assert len(row) and tokens[row].sum() <= 50 and patches[row].sum() <= 120
        assert list(row) == sorted(row)
        if grouped:
            assert len(set(groups[row])) == len(row)


def test_a_realistic_mix_uses_97_percent_of_tokens_and_85_of_patches():
    tokens, patches = realistic(8192)
    for seq_len in (2048, 4096):
        # The budget that `stats` suggests: 8 % over what full rows would use.
        max_patches = int(seq_len * patches.sum() / tokens.sum() * 1.08) // 4 * 4
        rows = pack(tokens, patches, seq_len, max_patches, key=0)
        assert used(rows, tokens, seq_len) >= 0.985
        assert used(rows, patches, max_patches) >= 0.90


def test_either_budget_may_be_the_tight_one():
    tokens, patches = realistic(4096)
    rows = pack(tokens, patches, 2048, 6272, key=0)
    assert used(rows, patches, 6272) >= 0.97
    rows = pack(tokens, patches, 2048, 10**6, key=0)
    assert used(rows, tokens, 2048) >= 0.985


def test_text_alone_needs_no_patches():
    rows = pack(np.array([3, 3, 4, 4]), np.zeros(4, int), 7, 0, key=0)
    assert np.diff(rows.offsets).tolist() == [2, 2]


def test_samples_of_one_group_never_share_a_row():
    ones = np.ones(12, int)
    assert len(pack(ones, ones, 9, 9, key=0, groups=np.arange(12) % 4).offsets) - 1 == 3
    assert len(pack(ones, ones, 9, 9, key=0, groups=np.zeros(12, int)).offsets) - 1 == 12


def test_rows_are_not_in_the_order_of_their_fill():
    tokens, patches = realistic(4096)
    rows = pack(tokens, patches, 2048, 7680, key=0)
    count = np.diff(rows.offsets)
    assert abs(np.corrcoef(count, np.arange(len(count)))[0, 1]) < 0.1
    again = pack(tokens, patches, 2048, 7680, key=1)
    assert sorted(map(tuple, np.split(rows.samples, rows.offsets[1:-1]))) == sorted(
        map(tuple, np.split(again.samples, again.offsets[1:-1]))
    )
    assert not np.array_equal(rows.samples, again.samples)


def test_samples_stay_in_their_window():
    tokens, patches = realistic(1000)
    rows = pack(tokens, patches, 2048, 7680, key=0, window=100)
    assert np.all(rows.samples // 100 == np.arange(1000) // 100)


@pytest.mark.parametrize(("tokens", "patches"), [(8, 0), (1, 9)])
def test_what_is_larger_than_a_row_is_refused(tokens, patches):
    with pytest.raises(ValueError, match="larger than a row"):
        pack(np.array([1, tokens]), np.array([0, patches]), 7, 8, key=0)


def golden_rows():
    """Rows of made-up lengths, from arithmetic alone: no generator of numpy's is in it."""
    n = np.arange(5000)
    return pack(50 + n * 7919 % 900, n * 104729 % 3000, 2048, 5000, key=7, groups=n % 1700)


def test_rows_never_change():
    """A run that resumes after an upgrade must find the rows it left. To make the digest anew,
    print what this compares; but then every run in progress loses its place."""
    rows = golden_rows()
    assert rows.samples.dtype == np.int32 and rows.offsets.dtype == np.int64
    digest = hashlib.sha256(rows.samples.tobytes() + rows.offsets.tobytes()).hexdigest()
    assert digest[:16] == "00bcc0337e46fdc9"
