"""The rules table, and what it refuses."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from echovlm_jax.config import PRESETS, preset
from echovlm_jax.errors import InputError
from echovlm_jax.mesh import AXES, RULES, make_mesh, param_shardings
from echovlm_jax.model import abstract_params, logical_axes


def shardings(config, mesh, **changes):
    return param_shardings(
        logical_axes(config), abstract_params(config), mesh, {**RULES, **changes}
    )


def test_a_mesh_has_all_axes():
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 1, "tensor": 4, "sequence": 1}


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"fsdp": 3}, "fsdp 3 makes 3 devices, but there are 8"),
        ({}, "makes 1 devices, but there are 8"),
        ({"model": 8}, "axis 'model' is unknown"),
        ({"data": 0}, "data must have a size of at least 1, found 0"),
    ],
)
def test_bad_meshes_are_refused(sizes, named):
    with pytest.raises(InputError, match=named):
        make_mesh(sizes)


def test_the_released_model_on_eight_devices():
    config = preset("echovlm_11b")
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    made = shardings(config, mesh)
    layers = made["text"]["layers"]
    assert layers["attn"]["q"]["kernel"].spec == PartitionSpec(None, "tensor", None, "fsdp")
    experts = layers["moe"]["experts"]["down"]["kernel"].spec
    assert experts == PartitionSpec(None, "expert", "fsdp", "tensor")
    # Every large parameter is split: what one device holds is near an eighth of the whole.
    whole = held = 0
    for leaf, sharding in zip(
        jax.tree.leaves(abstract_params(config)), jax.tree.leaves(made), strict=True
    ):
        whole += np.prod(leaf.shape)
        held += np.prod(sharding.shard_shape(leaf.shape))
    assert held / whole < 0.25


@pytest.mark.parametrize("name", PRESETS)
def test_every_axis_of_every_parameter_is_named(name):
    axes = jax.tree.leaves(logical_axes(preset(name)), is_leaf=lambda x: isinstance(x, tuple))
    shapes = jax.tree.leaves(abstract_params(preset(name)))
    assert [len(a) for a in axes] == [len(s.shape) for s in shapes]
    assert set(RULES.values()) <= set(AXES)


def test_a_size_that_does_not_divide_is_refused_by_name():
    mesh = make_mesh({"tensor": 8})
    with pytest.raises(
        InputError, match=r"text/layers/attn/k/.*: kv_heads 4 does not divide by .* tensor 8"
    ):
        shardings(preset("echovlm_11b"), mesh)


def test_colliding_rules_are_refused_by_name():
    mesh = make_mesh({"fsdp": 8})
    with pytest.raises(InputError, match=r"text/.*: rules .* → fsdp and .* → fsdp collide"):
        shardings(preset("tiny"), mesh, mlp="fsdp", heads=None, kv_heads=None, vocab=None)


def test_a_rule_for_an_axis_that_the_mesh_lacks_is_refused():
    mesh = make_mesh({"fsdp": 8})
    with pytest.raises(InputError, match="mlp → model: the mesh has no axis model"):
        shardings(preset("tiny"), mesh, mlp="model")
