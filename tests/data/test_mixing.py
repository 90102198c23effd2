"""How often an epoch shows each exam: whole, even, and in exact proportions in the long run."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echovlm_jax.data.mixing import epoch_draws, ratios
from echovlm_jax.errors import InputError

NAMES = ("heart", "kidney", "liver")
COUNTS = st.lists(st.integers(0, 40), min_size=3, max_size=3).filter(any)
TEMPERATURES = st.sampled_from([1.0, 1.5, 2.0, 5.0, 1e6])


def shuffled_organs(counts):
    organs = np.repeat(np.arange(len(counts)), counts).astype(np.int16)
    return np.random.default_rng(0).permutation(organs)


def draw(counts, epoch=0, seed=0, **mixture):
    organs = shuffled_organs(counts)
    return organs, epoch_draws(organs, ratios(counts, NAMES, **mixture), seed=seed, epoch=epoch)


@given(COUNTS, TEMPERATURES, st.integers(0, 5), st.integers(0, 2**40))
def test_each_exam_comes_up_floor_or_ceil_of_its_ratio(counts, temperature, epoch, seed):
    organs, draws = draw(counts, epoch, seed, temperature=temperature)
    ratio = ratios(counts, NAMES, temperature=temperature)
    times = np.bincount(draws.record, minlength=len(organs))
    for i, organ in enumerate(organs):
        assert int(ratio[organ]) <= times[i] <= -(-ratio[organ] // 1)
    assert times.min() >= 1
    assert 1 in {times[organs == o].max() for o in set(organs)}  # the least repeated, exactly once
    for exam in range(len(organs)):
        assert sorted(draws.repeat[draws.record == exam]) == list(range(times[exam]))


@given(COUNTS, TEMPERATURES, st.integers(1, 6))
def test_proportions_are_exact_over_epochs_to_less_than_one_sample(counts, temperature, epochs):
    ratio = ratios(counts, NAMES, temperature=temperature)
    organs = shuffled_organs(counts)
    shown = [epoch_draws(organs, ratio, seed=1, epoch=e).record for e in range(epochs)]
    times = np.bincount(np.concatenate(shown), minlength=len(organs))
    for organ, n in enumerate(counts):
        exact = ratio[organ] * n * epochs
        assert times[organs == organ].sum() == exact // 1
        if n:  # and each exam of an organ as often as the others
            assert np.ptp(times[organs == organ]) <= 1


def test_proportions_hold_exactly_where_the_ratio_repeats():
    """Weights 0.3 : 0.7 of 7 and 3 exams: 49 for 9, over 9 epochs without a remainder."""
    organs = shuffled_organs((7, 3))
    ratio = ratios((7, 3), NAMES[:2], weights={"heart": 0.3, "kidney": 0.7})
    assert ratio == [1, Fraction(49, 9)]
    shown = [epoch_draws(organs, ratio, seed=1, epoch=e).record for e in range(9)]
    times = np.bincount(np.concatenate(shown))
    assert set(times[organs == 0]) == {9} and set(times[organs == 1]) == {49}


def test_temperature_1_shows_each_exam_once_and_a_high_one_evens_organs_out():
    counts = (40, 9, 2)
    assert ratios(counts, NAMES, temperature=1.0) == [1, 1, 1]
    half = ratios(counts, NAMES, temperature=2.0)
    assert [float(r * n) for r, n in zip(half, counts, strict=True)] == pytest.approx(
        [40, 40 * (9 / 40) ** 0.5, 40 * (2 / 40) ** 0.5]
    )
    organs, draws = draw(counts, temperature=1e9)
    shown = np.bincount(organs[draws.record])
    assert shown[0] == 40 and all(39 <= n <= 40 for n in shown)


def test_weights_are_shares_and_0_leaves_out():
    organs, draws = draw((30, 10, 5), weights={"heart": 1, "kidney": 3, "liver": 0})
    assert np.bincount(organs[draws.record], minlength=3).tolist() == [30, 90, 0]
    assert ratios((30, 10), NAMES[:2], weights={"heart": 5, "kidney": 15, "eye": 0}) == [1, 9]


def test_repeats_of_an_exam_are_evenly_apart():
    organs, draws = draw((400, 10, 1), weights={"heart": 1, "kidney": 1, "liver": 1})
    places = {exam: np.flatnonzero(draws.record == exam) for exam in np.flatnonzero(organs == 1)}
    for where in places.values():
        assert len(where) == 40
        assert np.diff(where).min() > 15 and np.diff(where).max() < 50
    assert len(set(where[0] for where in places.values())) == 10


def test_the_order_is_random_and_another_each_epoch_and_seed():
    _, one = draw((500, 300, 200), temperature=1)
    _, again = draw((500, 300, 200), temperature=1)
    _, later = draw((500, 300, 200), 1, temperature=1)
    _, other = draw((500, 300, 200), 0, 1, temperature=1)
    np.testing.assert_array_equal(one.record, again.record)
    assert sorted(one.record) == sorted(later.record) == list(range(1000))
    for them in (later, other):
        assert abs(np.corrcoef(one.record, them.record)[0, 1]) < 0.15
    assert abs(np.corrcoef(one.record, np.arange(1000))[0, 1]) < 0.15


def test_the_extra_showings_go_round():
    """1.5 times each of 4 exams: 2 of them twice in one epoch, the other 2 in the next."""
    organs = shuffled_organs((12, 4))
    ratio = [Fraction(1), Fraction(3, 2)]
    twice = []
    for epoch in range(2):
        times = Counter(epoch_draws(organs, ratio, seed=0, epoch=epoch).record.tolist())
        twice.append({exam for exam, n in times.items() if n == 2})
    assert len(twice[0]) == len(twice[1]) == 2 and not twice[0] & twice[1]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({}, "give either mix_temperature or organ_weights"),
        (
            {"temperature": 1.0, "weights": {"heart": 1.0}},
            "give either mix_temperature or organ_weights",
        ),
        ({"temperature": 0.0}, "above 0, found 0.0"),
        ({"temperature": float("nan")}, "above 0, found nan"),
        ({"weights": {"heart": 1, "kidney": 1}}, "lacks liver"),
        ({"weights": {"heart": 1, "kidney": 1, "liver": 1, "eye": 2}}, r"organ_weights\.eye"),
        ({"weights": {"heart": -1, "kidney": 1, "liver": 1}}, r"organ_weights\.heart"),
        ({"weights": {"heart": float("nan"), "kidney": 1, "liver": 1}}, r"organ_weights\.heart"),
        ({"weights": dict.fromkeys(NAMES, 0)}, "nothing to show"),
        ({"weights": {"heart": 1, "kidney": 0, "liver": 1e6}}, "liver 3,000,000 times an epoch"),
        ({"temperature": 0.01}, "heart .* times an epoch"),
        ({"temperature": 1e-5}, "leaves rare organs no share"),
    ],
)
def test_impossible_mixtures_are_refused(mixture, message):
    with pytest.raises(InputError, match=message) as error:
        ratios((3, 2, 1), NAMES, **mixture)
    assert "\n" not in str(error.value)
