"""Grouping: whatever ties records keeps them in one split, whatever order they come in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echovlm_jax.data.groups import HASH_BYTES, NUMBERS, TIE, group, key_of, near_duplicates
from echovlm_jax.data.keys import mix
from echovlm_jax.data.official import group_ids, pattern_groups
from echovlm_jax.data.sources import compile_pattern
from echovlm_jax.errors import InputError


def tie_array(found):
    ties = np.zeros(len(found), TIE)
    for n, (row, kind, value) in enumerate(found):
        ties[n] = (row, NUMBERS[kind], key_of(kind, str(value), b"salt"))
    return ties


def components(count, found):
    """Independent: a walk through the graph of rows and values."""
    left, out = set(range(count)), []
    while left:
        todo, seen = [left.pop()], set()
        while todo:
            row = todo.pop()
            seen.add(row)
            left.discard(row)
            values = {(kind, value) for r, kind, value in found if r == row}
            todo += [r for r, kind, value in found if (kind, value) in values and r not in seen]
        out.append(frozenset(seen))
    return set(out)


@settings(max_examples=40)
@given(
    st.integers(1, 30),
    st.lists(
        st.tuples(st.integers(0, 29), st.sampled_from(["patient_id", "file"]), st.integers(0, 12)),
        max_size=40,
    ),
)
def test_groups_are_the_connected_records(count, found):
    found = [(row % count, kind, value) for row, kind, value in found]
    own = mix(np.arange(count))
    grouped = group(own, tie_array(found), validation=0.3, test=0.3)
    parts = {}
    for row, label in enumerate(grouped.group.tolist()):
        parts.setdefault(label if label >= 0 else ("alone", row), set()).add(row)
    expected = components(count, found)
    assert {frozenset(part) for part in parts.values()} == expected
    assert all(len({int(grouped.split[row]) for row in part}) == 1 for part in expected)
    assert grouped.counts["largest_group"] == max(map(len, expected))
    # The order of the records is nothing.
    turned = tie_array([(count - 1 - row, kind, value) for row, kind, value in found])
    other = group(own[::-1].copy(), turned, validation=0.3, test=0.3)
    assert other.split[::-1].tolist() == grouped.split.tolist()


def test_a_long_chain_is_one_group():
    order = np.random.default_rng(0).permutation(100_000)
    found = np.zeros(2 * (len(order) - 1), TIE)
    found["row"] = np.stack([order[:-1], order[1:]], 1).ravel()
    found["key"] = np.repeat(np.arange(1, len(order)), 2)
    assert group(mix(order), found, validation=0, test=0).counts["largest_group"] == len(order)


def test_what_grouped_is_counted():
    ties = tie_array(
        [
            *[(0, "patient_id", "A"), (1, "patient_id", "A"), (2, "exam_id", "e"), (3, "file", 1)],
            *[(4, "file", 1), (4, "file", 1), (5, "file", 2), (5, "pixels", 9)],
        ]
    )
    counts = group(mix(np.arange(7)), ties, validation=0, test=0).counts
    assert counts == {
        "groups": {"patient_id": 1, "exam_id": 1, "file": 1},  # file 2 and the pixels tie nothing
        "ungrouped": 4,
        "unnamed": 5,
        "largest_group": 2,
    }


def test_a_patient_is_one_however_records_name_it():
    keys = {key_of(kind, "7", b"s") for kind in ("patient_id", "pattern", "dicom_patient")}
    assert len(keys) == 1 and key_of("study_id", "7", b"s") not in keys
    assert key_of("patient_id", "7", b"other salt") not in keys


def test_what_a_pattern_finds():
    pattern = compile_pattern(r"(p\d+)|other")
    paths = {"image": ["x/p2.png", "x/p3.png", "x/4.png"]}
    assert pattern_groups({"id": "p1-l", **paths}, pattern) == ["p1"]
    assert pattern_groups({"id": "1-l", **paths}, pattern) == ["p2", "p3"]
    assert pattern_groups({"id": "other", "image": []}, pattern) == []  # its group took no part
    for nothing in ("text", {}, {"id": None}, {"id": ["p1"]}, {"image": 7}, {"id": "q"}):
        assert pattern_groups(nothing, pattern) == []
    for one_file in ("p4/a.png", r"p4\a.png", "./p4/a.png", r".\p4\a.png"):
        assert pattern_groups({"image": one_file}, compile_pattern("^([^/]+)")) == ["p4"]
    assert pattern_groups({"image": r"p4\a.png"}, compile_pattern(r"(p\d)\\")) == ["p4"]
    assert pattern_groups({"id": 31}, compile_pattern(r"(\d)\d")) == ["3"]
    assert group_ids({"patient_id": " p1 ", "study_id": " "}) == [("patient_id", "p1")]


@pytest.mark.parametrize("bad", ["(", "bus_", "", "[z-a]", "(?P<a>x)(?P<a>y)", "(?:bus)", "*"])
def test_a_bad_pattern_is_refused(bad):
    with pytest.raises(InputError, match=r"--group-pattern .*(mend it|parentheses)") as error:
        compile_pattern(bad)
    assert "\n" not in str(error.value)


def test_near_duplicates_are_those_that_brute_force_finds():
    draw = np.random.default_rng(1)
    hashes = draw.integers(0, 256, (120, HASH_BYTES), dtype=np.uint8)
    for n in range(60):  # some near another, some not quite
        hashes[n] = hashes[n + 60]
        for bit in draw.choice(256, n // 2, replace=False):
            hashes[n, bit // 8] ^= 1 << (bit % 8)
    hashes[50:55] = hashes[110:115] = 0  # pictures that say nothing
    split, row = draw.integers(0, 3, 60).astype(np.int8), np.arange(120) // 2
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(-1)
    some = hashes.any(1)
    near = (apart <= 12) & some[:, None] & some[None] & (split[row][:, None] > split[row][None])
    found = near_duplicates(split, row, hashes)
    assert found == len(np.unique(row[near.any(1)])) > 3
    assert near_duplicates(np.zeros(60, np.int8), row, hashes) == 0
