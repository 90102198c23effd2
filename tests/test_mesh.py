"""Meshes, the rules table, and what they refuse."""

import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echovlm_jax.config import PRESETS as MODELS
from echovlm_jax.config import preset
from echovlm_jax.errors import InputError
from echovlm_jax.mesh import (
    AXES,
    PRESETS,
    RULES,
    activation_layout,
    make_mesh,
    param_shardings,
    preset_sizes,
    topology_devices,
)
from echovlm_jax.model import abstract_params, logical_axes
from echovlm_jax.train.config_file import check_config, load_config
from echovlm_jax.train.program import config_mesh

CONFIG = Path(__file__).parents[1] / "configs" / "full_finetune.py"


def shardings(config, mesh, **changes):
    return param_shardings(
        logical_axes(config), abstract_params(config), mesh, {**RULES, **changes}
    )


class FakeDevice:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def fake_devices(slices=1, per_slice=4, platform="cpu", **more):
    """Stand-ins with what placing a device reads; `coords` make each slice one row of chips."""
    return [
        FakeDevice(
            id=i,
            platform=platform,
            device_kind="TPU v4" if platform == "tpu" else platform,
            process_index=i // per_slice,
            coords=(i % per_slice, 0, 0),
            core_on_chip=0,
            **{key: value(i // per_slice) for key, value in more.items()},
        )
        for i in range(slices * per_slice)
    ]


def ids(mesh: Mesh) -> list:
    return np.vectorize(lambda device: device.id)(mesh.devices).squeeze().tolist()


@pytest.fixture(scope="module")
def libtpu():
    pytest.importorskip("libtpu")
    with pytest.MonkeyPatch.context() as patch:  # libtpu reads it at the first topology
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        topology_devices("v5e:2x2")


def test_a_mesh_has_all_axes():
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 1, "tensor": 4, "sequence": 1}


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"fsdp": -1}, (1, 8, 1, 1, 1)),
        ({"fsdp": -1, "tensor": 4}, (1, 2, 1, 4, 1)),
        ({"data": 8, "sequence": -1}, (8, 1, 1, 1, 1)),
    ],
)
def test_minus_one_takes_what_is_left(sizes, shape):
    assert make_mesh(sizes).devices.shape == shape


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"fsdp": 3}, "mesh fsdp 3 makes 3 devices, but there are 8; mesh.fsdp may be 8; or .* -1"),
        ({"fsdp": 2, "tensor": 2}, "makes 4 .*; mesh.fsdp may be 4; mesh.tensor may be 4; or"),
        ({"fsdp": 2, "tensor": 3}, "makes 6 devices, but there are 8; mesh.tensor may be 4; or"),
        ({}, "of no axis makes 1 devices, but there are 8; or leave one axis to be inferred: -1"),
        ({"model": 8}, "mesh axis 'model' is unknown; choose among data, fsdp"),
        ({"data": 0}, "mesh.data must be at least 1, or -1 for what the others leave; found 0"),
        ({"data": -2}, "mesh.data must be at least 1, or -1 for what the others leave; found -2"),
        ({"data": -1, "fsdp": -1}, "mesh.data and mesh.fsdp are -1, but only one axis can be inf"),
        (
            {"fsdp": -1, "tensor": 3},
            "mesh tensor 3 makes 3 .* 8, no multiple of it; mesh.tensor may be 1, 2, 4 or 8$",
        ),
        ({"fsdp": -1, "data": 2, "tensor": 3}, r"6 .*; mesh.tensor may be 1, 2 or 4$"),
    ],
)
def test_bad_meshes_are_refused(sizes, named):
    with pytest.raises(InputError, match=named):
        make_mesh(sizes)


@pytest.mark.parametrize(
    "devices",
    [
        fake_devices(2, platform="tpu", slice_index=lambda i: i),
        fake_devices(2, platform="gpu", slice_index=lambda i: i),
        fake_devices(2),  # no slice_index: the processes tell
        fake_devices(2, platform="gpu", slice_index=lambda i: 0),
    ],
)
def test_slices_stay_together(devices):
    devices = devices[::2] + devices[1::2]  # whatever order they come in
    mesh = make_mesh({"fsdp": 2, "tensor": -1}, devices, dcn={"data": 2})
    assert mesh.devices.shape == (2, 2, 1, 2, 1)
    for i, one in enumerate(ids(mesh)):
        assert sorted(itertools.chain(*one)) == list(range(4 * i, 4 * i + 4))
    # One axis may reach over slices: its slow steps are the outer ones.
    mesh = make_mesh({"fsdp": 4}, devices, dcn={"fsdp": 2})
    assert [i // 4 for i in ids(mesh)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_bad_slices_are_refused():
    devices = fake_devices(2, platform="tpu", slice_index=lambda i: i)
    with pytest.raises(InputError, match=r"devices are 2 slices; .* such as mesh.dcn.data 2"):
        make_mesh({"fsdp": 8}, devices)
    with pytest.raises(InputError, match=r"mesh.dcn data 4 makes 4 slices, but these .* are 2"):
        make_mesh({"fsdp": 2}, devices, dcn={"data": 4})
    with pytest.raises(InputError, match=r"makes 8 devices, but a slice has 4; mesh.fsdp may be 4"):
        make_mesh({"fsdp": 8}, devices, dcn={"data": 2})
    with pytest.raises(InputError, match=r"mesh.dcn axis 'pods' is unknown"):
        make_mesh({"fsdp": 4}, devices, dcn={"pods": 2})
    with pytest.raises(InputError, match=r"mesh.dcn.data must be at least 1; found -1"):
        make_mesh({"fsdp": 4}, devices, dcn={"data": -1})
    with pytest.raises(InputError, match=r"7 TPU v4 devices do not form whole slices"):
        make_mesh({"fsdp": -1}, devices[:-1], dcn={"data": 2})
    # A dcn of ones is none: the same config serves one process and several.
    mesh = make_mesh({"fsdp": 2, "tensor": -1}, fake_devices(2), dcn={"data": 1})
    assert ids(mesh) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_neighbours_of_an_axis_are_neighbours_on_the_torus(libtpu):
    devices = topology_devices("v5e:4x4")
    ring = make_mesh({"fsdp": -1}, devices).devices.ravel()
    steps = [np.abs(np.subtract(a.coords, b.coords)).sum() for a, b in itertools.pairwise(ring)]
    assert set(steps) == {1}
    # What talks most has whole rows of the torus.
    tensor = make_mesh({"fsdp": 4, "tensor": 4}, devices).devices.squeeze()
    for line in tensor:
        assert any(len({device.coords[d] for device in line}) == 1 for d in (0, 1))
    two = make_mesh({"fsdp": 16}, topology_devices("v5e:4x4", slices=2), dcn={"data": 2})
    for i, one in enumerate(two.devices):
        assert {device.slice_index for device in one.flat} == {i}
    with pytest.raises(InputError, match="6 TPU v5 lite devices do not form whole slices"):
        make_mesh({"fsdp": 6}, devices[:6])


def test_a_configuration_names_the_axis_that_joins_slices(libtpu):
    devices = topology_devices("v5e:2x4", slices=2)
    words = ["mesh.dcn.data=2", "mesh.tensor=2"]
    config = load_config(CONFIG, words)
    check_config(config)
    mesh = config_mesh(config, devices)
    assert mesh.shape == {"data": 2, "fsdp": 4, "expert": 1, "tensor": 2, "sequence": 1}
    for i, one in enumerate(mesh.devices):  # weights are split inside a slice alone
        assert {device.slice_index for device in one.flat} == {i}
    with pytest.raises(InputError, match=r"config key mesh.dcn.rows is unknown"):
        load_config(CONFIG, ["mesh.dcn.rows=2"])
    with pytest.raises(InputError, match=r"mesh.dcn.data must be .*at least 1"):
        check_config(load_config(CONFIG, ["mesh.dcn.data=0"]))


@pytest.mark.parametrize("topology", PRESETS)
def test_presets_fit_their_slice_and_the_model(libtpu, topology):
    devices = topology_devices(topology)
    assert len(devices) == math.prod(map(int, topology.split(":")[1].split("x")))
    config = preset("echovlm_11b")
    mesh = make_mesh(preset_sizes(topology), devices)
    largest = max(
        math.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(
            jax.tree.leaves(abstract_params(config)),
            jax.tree.leaves(shardings(config, mesh)),
            strict=True,
        )
    )
    # The largest parameters, one of the dense MLP's three, are split over all of fsdp.
    assert largest == 28 * 18944 * 3584 // mesh.shape["fsdp"]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        (
            "v5e",
            "topology 'v5e' is not generation:shape, as in v5e:4x4; there are v5e:1x1,",
        ),
        ("v5e:0x4", "topology 'v5e:0x4' is not generation:shape"),
        (
            "v99:4x4",
            r"libtpu refuses topology 'v99:4x4' \(.*v99\); there are v5e:1x1",
        ),
        ("v5e:3x3", "libtpu refuses topology 'v5e:3x3' .*chips_per_host"),
    ],
)
def test_unknown_topologies_are_refused(libtpu, name, named):
    with pytest.raises(InputError, match=named):
        topology_devices(name)
    with pytest.raises(InputError, match=f"no mesh preset for '{name}', only for v5e:1x1"):
        preset_sizes(name)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    def missing(**_):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
    with pytest.raises(InputError, match="v5e:4x4 needs the TPU compiler: pip install libtpu"):
        topology_devices("v5e:4x4")


def test_the_released_model_on_eight_devices():
    config = preset("echovlm_11b")
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    made = shardings(config, mesh)
    layers = made["text"]["layers"]
    wide = ("fsdp", "expert")
    assert layers["attn"]["q"]["kernel"].spec == PartitionSpec(None, "tensor", None, wide)
    experts = layers["moe"]["experts"]["down"]["kernel"].spec
    assert experts == PartitionSpec(None, "expert", "fsdp", "tensor")
    # Every large parameter is split over all devices: one holds an eighth of the whole.
    whole = held = 0
    for leaf, sharding in zip(
        jax.tree.leaves(abstract_params(config)), jax.tree.leaves(made), strict=True
    ):
        whole += np.prod(leaf.shape)
        held += np.prod(sharding.shard_shape(leaf.shape))
    assert 0.125 <= held / whole < 0.126


def test_axes_of_size_one_split_nothing():
    made = shardings(preset("tiny"), make_mesh({"fsdp": 8}), mlp="data", expert="data")
    specs = {axis for sharding in jax.tree.leaves(made) for axis in sharding.spec}
    assert specs == {None, "fsdp"}


@pytest.mark.parametrize("name", MODELS)
def test_every_axis_of_every_parameter_is_named(name):
    axes = jax.tree.leaves(logical_axes(preset(name)), is_leaf=lambda x: isinstance(x, tuple))
    shapes = jax.tree.leaves(abstract_params(preset(name)))
    assert [len(a) for a in axes] == [len(s.shape) for s in shapes]
    # Only these stay whole; a new name has to be given a rule, or be added here.
    whole = {
        *("layers", "norm", "head_dim", "path", "router", "gate", "qkv", "channel"),
        *("patch_t", "patch_h", "patch_w"),
    }
    assert {axis for names in axes for axis in names} - set(RULES) <= whole


def test_rules_name_mesh_axes_only():
    named = {axis for rule in RULES.values() for axis in ([rule] if type(rule) is str else rule)}
    assert named <= set(AXES)


# Which sizes of one axis the released model takes, from its sizes: 28 heads, 4 kv heads and 16
# vision heads over tensor; widths of 3,584, 1,280 and 5,120 over fsdp and expert; 4 experts.
@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"tensor": 8}, r"kv_heads 4 does .* axis tensor 8; mesh.tensor may be 1, 2 or 4$"),
        ({"expert": 8}, r"expert 4 does not .* axis expert 8; mesh.expert may be 1, 2 or 4$"),
        (
            {"fsdp": 512},
            r"vision_embed 1280 .* axis fsdp 512; mesh.fsdp may be 1, 2, 4, .*, 128 or 256$",
        ),
        (
            {"fsdp": 256, "expert": 2},
            r"\w*embed \d+ .* axes fsdp 256 × expert 2; mesh.fsdp may be 1, 2, 4, 8, 16, 32, 64 or"
            r" 128, or mesh.expert may be 1$",
        ),
        (
            {"fsdp": 3, "expert": 5},
            r"embed 3584 .* axes fsdp 3 × expert 5; make .*fsdp × mesh.expert a divisor of 256$",
        ),
    ],
)
def test_a_size_that_does_not_divide_is_refused_by_name(sizes, named):
    count = math.prod(sizes.values())
    mesh = jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)
    assert mesh.size == count
    with pytest.raises(InputError, match=r"^parameter .*/.* \[.*\]: " + named):
        shardings(preset("echovlm_11b"), mesh)


def test_the_sizes_that_a_refusal_names_work():
    config = preset("echovlm_11b")
    for sizes in [{"fsdp": 256}, {"fsdp": 128, "expert": 2}, {"expert": 4, "tensor": 4}]:
        mesh = jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)
        assert shardings(config, mesh)


def test_colliding_rules_are_refused_by_name():
    mesh = make_mesh({"fsdp": 8})
    with pytest.raises(
        InputError, match=r"text/.*: rules .* → fsdp and .* → fsdp collide; .* make mesh.fsdp 1$"
    ):
        shardings(preset("tiny"), mesh, mlp="fsdp", heads=None, kv_heads=None, vocab=None)


def test_colliding_tuples_are_refused_by_name():
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    with pytest.raises(InputError, match=r"experts/.*: rules expert → expert and expert_embed → e"):
        shardings(preset("tiny"), mesh, expert_embed=("fsdp", "expert"))


def test_a_rule_for_an_axis_that_the_mesh_lacks_is_refused():
    mesh = make_mesh({"fsdp": 8})
    with pytest.raises(InputError, match="mlp → model: the mesh has no axis model"):
        shardings(preset("tiny"), mesh, mlp="model")
    with pytest.raises(InputError, match="batch → model: the mesh has no axis model"):
        activation_layout(mesh, {"batch": ("data", "model")})


def test_activations_follow_the_table():
    mesh = make_mesh({"fsdp": 2, "expert": 2, "sequence": 2})
    layout = activation_layout(mesh)
    assert hash(layout) == hash(activation_layout(mesh))
    with jax.set_mesh(mesh):
        assert layout.spec("batch", "length", "mlp") == PartitionSpec(
            ("fsdp", "expert"), ("sequence",), None
        )
        assert layout.spec("expert", "expert_embed", None) == PartitionSpec(
            ("expert",), ("fsdp",), None
        )
        x = jax.jit(lambda x: layout.constrain(x, "batch", None, "attn_heads"))(jnp.ones((8, 3, 2)))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3, 1)}


def test_nothing_is_split_on_one_device():
    mesh = make_mesh({}, jax.devices()[:1])
    assert not activation_layout(mesh).rules
    assert activation_layout(mesh).spec("batch", None) == PartitionSpec(None, None)


def test_the_rows_of_a_batch():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, activation_layout(mesh).spec("batch", None))
    rows = jax.device_put(np.arange(12).reshape(4, 3), sharding)
    # Each of the four pairs of data and fsdp has its own row; tensor's two devices share it.
    held = sorted(shard.data.ravel().tolist() for shard in rows.addressable_shards)
    assert held == sorted(2 * np.arange(12).reshape(4, 3).tolist())
