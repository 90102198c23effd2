"""The program that a run compiles."""

import importlib.util

import jax
import pytest

from echovlm_jax.train.config_file import load_config, own_config
from echovlm_jax.train.program import _known, fingerprint, make_program


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


KERNEL = """
from jax.experimental import pallas as pl


def add_one(x_ref, out_ref):
    out_ref[...] = x_ref[...] + {number}


def f(x):
    return pl.pallas_call(add_one, out_shape=x)(x * {factor})
"""


def test_a_programs_name_does_not_tell_where_it_is_installed(tmp_path):
    """A kernel's code has the path of its source in it. What is around it is in the name."""

    def name(folder: str, **numbers: int) -> str:
        (tmp_path / folder).mkdir()
        place = tmp_path / folder / "kernel.py"
        place.write_text(KERNEL.format(**{"number": 1, "factor": 1, **numbers}))
        spec = importlib.util.spec_from_file_location("kernel", place)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        x = jax.ShapeDtypeStruct((128, 128), jax.numpy.float32)
        lowered = jax.jit(module.f).trace(x).lower(lowering_platforms=("tpu",))
        assert "tpu_custom_call" in lowered.as_text()
        return fingerprint(lowered)

    assert name("here") == name("there")
    assert name("other", factor=2) != name("again")
