"""The program that a run compiles."""

import jax
import pytest

from echovlm_jax.train.config_file import load_config, own_config
from echovlm_jax.train.program import _known, make_program


def test_options_that_the_compiler_does_not_know_are_left_out():
    assert _known({"xla_backend_optimization_level": 0}) == {"xla_backend_optimization_level": 0}
    assert _known({"xla_no_such_option": ""}) == {}


@pytest.mark.parametrize("said", [None, "bfloat16"])
def test_gradients_are_summed_in_float32_unless_asked_otherwise(said):
    """What the setting does to the sums themselves: tests/ops/test_collectives.py."""
    changes = {"dtype": "bfloat16"} | ({"grad_sum_dtype": said} if said else {})
    program = make_program(load_config(own_config("phantom"), changes), jax.devices()[:1])
    assert program.compute.layout.sum_dtype == (said or "float32")


@pytest.mark.parametrize(("said", "is_"), [("auto", "dense"), ("ragged", "ragged")])
def test_what_is_left_open_is_the_devices_choice(said, is_):
    """A TPU's is ragged: tests/test_chips.py."""
    config = load_config(own_config("phantom"), {"moe_dispatch": said})
    assert make_program(config, jax.devices()[:1]).compute.moe_dispatch == is_
