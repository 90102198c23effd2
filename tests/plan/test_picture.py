"""The picture of a plan, of numbers that a plan may have."""

import numpy as np

from echovlm_jax.plan.picture import memory_picture, parts

GIB = 2**30
PLAN = {
    "parameter_bytes_per_chip": {
        "parameters": {"vision": GIB, "experts": 4 * GIB},
        "optimizer": {"experts": 2 * GIB},
    },
    "hbm_per_chip": {"peak": 9 * GIB},
    "hbm_capacity": 16 * GIB,
    "fits": True,
}


def test_parts_add_up_to_the_peak():
    found = parts(PLAN)
    assert found[0] == ("parameters", "experts", 4 * GIB)  # the largest of a kind first
    assert found[-1] == ("temporaries", "", 2 * GIB)
    assert sum(size for _, _, size in found) == 9 * GIB
    unknown = {**PLAN, "hbm_per_chip": {"peak": None}}
    assert [kind for kind, _, _ in parts(unknown)] == ["parameters", "parameters", "optimizer"]


def test_a_bar_is_as_long_as_its_bytes():
    too_large = {**PLAN, "hbm_per_chip": {"peak": 32 * GIB}, "fits": False}
    drawn = np.asarray(memory_picture([PLAN, too_large], ["a", "b"]))
    rows = [16 + 11, 16 + 22 + 3 * 16 + 11]  # the middles of the two bars
    filled = [(drawn[row, 150:] != 255).any(-1).nonzero()[0] for row in rows]
    assert abs(len(filled[1]) - 620) <= 3  # the longest has the whole width
    bar = filled[0][filled[0] < 250]  # behind it, at half the width, is the end of the memory
    assert abs(bar.max() - 9 / 32 * 620) <= 2
    assert (drawn[rows[0], 150 + 310] == (200, 30, 30)).all()
