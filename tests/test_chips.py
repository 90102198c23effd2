"""Topology names and the roofline, against arithmetic by hand."""

import os
import types

import pytest

from echovlm_jax.chips import CHIPS, defaults, mfu_upper_bound, roofline, topology
from echovlm_jax.errors import InputError
from echovlm_jax.ops.attention.dispatch import IMPLEMENTATIONS


@pytest.mark.parametrize(
    ("name", "chip", "chips", "devices"),
    [
        ("v5e:4x4", "v5e", 16, 16),
        ("v5e:16x16", "v5e", 256, 256),
        ("v5p:4x4x8", "v5p", 128, 128),
        ("v4:8x8x8", "v4", 512, 1024),
        ("tpu7x:2x2x1", "tpu7x", 4, 8),
        ("h100:8", "h100", 8, 8),
    ],
)
def test_names(name, chip, chips, devices):
    found = topology(name)
    assert (found.name, found.chip.name, found.chips, found.devices) == (name, chip, chips, devices)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:4x4", "'v9' is unknown; choose among v4, v5e, v5p, v6e, tpu7x, t4, l4, a100"),
        ("", "'' is unknown"),
        ("v5e", "such as v5e:4x4"),
        ("v5e:4x", "such as v5e:4x4"),
        ("v5e:0x4", "such as v5e:4x4"),
        ("v5p:2x2x2x2", "such as v5p:2x2x4"),
        ("v5p:4x4\n", "such as v5p:2x2x4"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(InputError, match=message) as caught:
        topology(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("platform", "capability", "attention", "dtype"),
    [
        ("tpu", None, "splash", None),
        ("cpu", None, "xla", "float32"),
        ("gpu", "7.5", "xla", "float32"),  # T4: the Triton kernel is refused, no bfloat16
        ("gpu", "7.0", "xla", "float32"),  # V100
        ("gpu", "8.0", "triton", None),  # A100
        ("cuda", "8.9", "triton", None),  # L4
        ("gpu", "10.0", "triton", None),  # B200: a number, not a word
        ("gpu", "gfx90a", "xla", None),  # another maker's
        ("gpu", None, "xla", None),
        ("unheard of", None, "xla", None),
    ],
)
def test_a_device_has_what_it_can_compute(platform, capability, attention, dtype):
    device = types.SimpleNamespace(platform=platform)
    if capability is not None:
        device.compute_capability = capability
    dispatch = "ragged" if platform == "tpu" else "dense"
    assert defaults(device) == (attention, dtype, dispatch)
    assert attention in IMPLEMENTATIONS


def test_roofline():
    # 197 TFLOP/s, 819 GB/s, and 200 of 400 GB/s for receiving.
    bound = roofline(flops=394e12, hbm_bytes=819e9, collective_bytes=100e9, chip=CHIPS["v5e"])
    assert bound == (2.0, 1.0, 0.5, 0.0)
    assert (bound.seconds, bound.limit) == (2.0, "compute")
    assert mfu_upper_bound(197e12, bound, CHIPS["v5e"]) == pytest.approx(0.5)
    slow = roofline(flops=394e12, hbm_bytes=819e9, collective_bytes=800e9, chip=CHIPS["v5e"])
    assert (slow.seconds, slow.limit) == (4.0, "ici")
    assert mfu_upper_bound(394e12, slow, CHIPS["v5e"]) == pytest.approx(0.5)


def test_a_device_that_is_half_a_chip():
    bound = roofline(flops=137.5e12, hbm_bytes=600e9, collective_bytes=1e12, chip=CHIPS["v4"])
    assert bound == (1.0, 1.0, None, None)  # the network of a v4 isn't in the table
    assert mfu_upper_bound(137.5e12, bound, CHIPS["v4"]) == pytest.approx(1.0)
    assert roofline(flops=0, hbm_bytes=1, collective_bytes=0, chip=CHIPS["tpu7x"]).hbm is None


def test_memory():
    assert CHIPS["v5e"].device_hbm == 15.75 * 2**30
    assert CHIPS["h100"].device_hbm == 80e9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_compilers_own_limits(name, monkeypatch):
    pytest.importorskip("libtpu")
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    found = topology(name)
    assert len(devices) == found.devices
    place = SingleDeviceSharding(devices[0])
    huge = jax.ShapeDtypeStruct((200_000, 200_000), jnp.bfloat16, sharding=place)
    limit = found.chip.device_hbm / 2**30
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"available HBM \({limit:g}G\)"):
        jax.jit(jnp.matmul).lower(huge, huge).compile()
