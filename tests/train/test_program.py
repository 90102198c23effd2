"""The program that a run compiles."""

from echovlm_jax.train.program import _known


def test_options_that_the_compiler_does_not_know_are_left_out():
    assert _known({"xla_backend_optimization_level": 0}) == {"xla_backend_optimization_level": 0}
    assert _known({"xla_no_such_option": ""}) == {}
