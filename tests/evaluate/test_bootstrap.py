"""Intervals and the paired test, against theory and against sacrebleu."""

import numpy as np
import pytest

from echovlm_jax.evaluate import bootstrap
from echovlm_jax.evaluate.bootstrap import Statistic, estimate, interval, mean_of, paired


def test_an_interval_of_a_mean_is_what_theory_says():
    values = np.random.default_rng(0).normal(0.5, 0.1, 400)
    low, high = interval(mean_of(values)) or (0, 0)
    half = 1.96 * 100 * values.std() / np.sqrt(400)
    assert estimate(mean_of(values)) == pytest.approx(100 * values.mean())
    assert low == pytest.approx(100 * values.mean() - half, abs=0.12 * half)
    assert high == pytest.approx(100 * values.mean() + half, abs=0.12 * half)


def test_the_same_input_gives_the_same_interval_however_it_is_cut(monkeypatch):
    statistic = mean_of(np.random.default_rng(1).random(50))
    once = interval(statistic)
    assert interval(statistic) == once and interval(statistic, seed=1) != once
    monkeypatch.setattr(bootstrap, "_CELLS", 170)
    assert interval(statistic) == pytest.approx(once, abs=1e-9)


def test_every_sample_is_drawn_about_as_often():
    counts = np.concatenate(list(bootstrap._draws(7, 0, 1000)))
    assert counts.shape == (1000, 7) and (counts.sum(axis=1) == 7).all()
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.1)
    assert counts.var(axis=0).mean() == pytest.approx(6 / 7, abs=0.08)  # as a multinomial's


def test_nothing_and_one_sample():
    none = mean_of([])
    assert estimate(none) is None and interval(none) is None and paired(none, none) is None
    assert interval(mean_of([0.25])) == (25, 25)


def test_equal_systems_do_not_differ():
    statistic = mean_of(np.random.default_rng(2).random(30))
    found = paired(statistic, statistic)
    assert found is not None
    assert (found.difference, found.interval, found.p) == (0, (0, 0), 1)


def test_a_clear_difference_is_found_and_noise_is_not():
    rng = np.random.default_rng(3)
    base = rng.random(200)
    better = paired(mean_of(base), mean_of(base + 0.02 + rng.normal(0, 0.02, 200)))
    noise = paired(mean_of(base), mean_of(base + rng.normal(0, 0.1, 200)))
    assert better is not None and better.p < 0.01 and better.interval[0] > 0
    assert better.difference == pytest.approx(2, abs=0.5)
    assert noise is not None and noise.p > 0.05 and noise.interval[0] < 0 < noise.interval[1]


def test_a_known_p():
    """Of ±1 differences, n of them, the resampled mean is a binomial: its tail is the p."""
    b = np.array([0.6] * 60 + [0.4] * 40)  # mean difference 0.02, of standard error 0.0098
    found = paired(mean_of(np.full(100, 0.5)), mean_of(b), resamples=4000)
    assert found is not None and found.p == pytest.approx(0.05, abs=0.015)


def test_paired_rows_must_be_the_same_samples():
    with pytest.raises(ValueError, match="same samples"):
        paired(mean_of([1.0]), mean_of([1.0, 0.0]))


def test_a_ratio_is_resampled_as_a_ratio():
    columns = np.array([[1.0, 2.0], [3.0, 4.0], [0.0, 10.0]])
    ratio = Statistic(columns, lambda sums: 100 * sums[:, 0] / sums[:, 1])
    assert estimate(ratio) == pytest.approx(25)
    low, high = interval(ratio) or (0, 0)
    assert low == 0 and high == pytest.approx(75)
