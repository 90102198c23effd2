"""The program that a run compiles."""

import runpy

import jax

from echovlm_jax.train import program
from echovlm_jax.train.program import _known
from tests.distributed.train_steps import CONFIG, SMALL


def test_options_that_the_compiler_does_not_know_are_left_out():
    assert _known({"xla_backend_optimization_level": 0}) == {"xla_backend_optimization_level": 0}
    assert _known({"xla_no_such_option": ""}) == {}


def test_fragments_are_retired_after_each_compilation(monkeypatch):
    calls = []
    monkeypatch.setattr(program, "retire_fragments", lambda: calls.append(1))
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.update_from_flattened_dict(SMALL)
    made = program.make_program(config, jax.devices()[:1])
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *args, **kwargs: "compiled")
    assert made.compile() == "compiled" and calls == [1]
    assert made.compile_eval() == "compiled" and calls == [1, 1]
