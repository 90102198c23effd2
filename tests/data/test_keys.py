"""Hashes that a data order hangs on: fixed for ever, and even."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echovlm_jax.data.keys import mix, number, text_key, uniform

WHOLE = st.integers(-(2**63), 2**64 - 1)


def test_the_hashes_never_change():
    """Written down once. A change here changes the order of everybody's data: don't."""
    assert int(mix(0)) == 10451216379200822465
    assert int(mix(1, 2)) == 2554043094958247610
    assert int(mix(-1)) == 17519071339639777313
    assert mix(np.arange(3), 5).tolist() == [
        10754009927501035530,
        14871207630202690639,
        4517933670823692284,
    ]
    assert text_key("肝") == 6958535848326662883
    assert float(uniform(int(mix(3)))) == 0.5911897341980794


def test_one_part_is_splitmix64():
    """The published first output of splitmix64 with the state 1234567 is the hash's last step."""
    from echovlm_jax.data.keys import _STEP, _scramble

    with np.errstate(over="ignore"):
        assert (
            int(_scramble(np.asarray(np.uint64(1234567)) + np.uint64(_STEP))) == 6457827717110365317
        )


@given(st.lists(WHOLE, min_size=1, max_size=4))
def test_arrays_hash_as_their_elements(parts):
    arrays = [np.full(3, part, np.int64 if part < 0 else np.uint64) for part in parts]
    assert mix(*arrays).tolist() == [int(mix(*parts))] * 3
    assert number(*parts) == int(mix(*parts))
    assert mix(parts[0], *arrays[1:]).shape == ((3,) if len(parts) > 1 else ())


def test_every_part_and_their_order_count():
    found = [mix(1, 2, 3), mix(3, 2, 1), mix(1, 2), mix(1, 2, 4), mix(0, 2, 3), mix(1, 2, 3, 0)]
    assert len({int(one) for one in found}) == len(found)


def test_narrow_integers_hash_by_their_value():
    for dtype in (np.int8, np.uint8, np.int32, np.int64):
        assert int(mix(np.array(7, dtype))) == int(mix(7))
    assert int(mix(np.array(-7, np.int8))) == int(mix(-7))


def test_other_things_than_whole_numbers_are_refused():
    with pytest.raises(TypeError, match="whole numbers, not float64"):
        mix(np.array([0.5]))


def test_uniform_fills_the_unit_interval_evenly():
    drawn = uniform(mix(5, np.arange(100_000)))
    assert drawn.min() >= 0 and drawn.max() < 1
    counts, _ = np.histogram(drawn, 100, (0, 1))
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 160  # chi-squared, 99 degrees: p < 0.0001
    assert float(uniform(2**64 - 1)) < 1
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.015


def test_bits_of_hashes_of_neighbours_are_independent():
    flips = mix(np.arange(4096)) ^ mix(np.arange(4096) ^ 1)
    bits = (flips[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.all(np.abs(bits.mean(0) - 0.5) < 0.05)
