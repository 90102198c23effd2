"""What real compilers make of attention: memory, and the absence of squares."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

from echovlm_jax.ops.attention.dispatch import attention
from echovlm_jax.ops.layout import Layout

MIB = 2**20
VISION = dict(heads=16, kv_heads=16, dim=80, causal=False)
DECODER = dict(heads=28, kv_heads=4, dim=128, causal=True)


def functions(causal, implementation, layout=Layout()):
    """(forward, forward and backward) of q, k, v, the two segments and the result's gradient."""

    def forward(q, k, v, q_segments, kv_segments, d_out=None):
        return attention(
            q, k, v,
            q_segments=q_segments, kv_segments=kv_segments,
            causal_offset=0 if causal else None, implementation=implementation, layout=layout,
        )  # fmt: skip

    def both(q, k, v, q_segments, kv_segments, d_out):
        out, pull = jax.vjp(lambda *qkv: forward(*qkv, q_segments, kv_segments), q, k, v)
        return out, *pull(d_out)

    return forward, both


def arguments(length, heads, kv_heads, dim, batch=1, sharding=None, head_sharding=None):
    def array(shape, dtype, where):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    heads_first = [
        array((batch, length, n, dim), jnp.bfloat16, head_sharding or sharding)
        for n in (heads, kv_heads, kv_heads, heads)
    ]
    ids = array((batch, length), jnp.int32, sharding)
    return [*heads_first[:3], ids, ids, heads_first[3]]


def squares(text, length):
    """Shapes in a program that hold length × length."""
    return re.findall(rf"\w+\[(?:\d+,)*{length},{length}(?:,\d+)*\]", text)


@pytest.fixture(scope="module")
def tpu():
    """Devices of a named TPU topology, for the compiler only."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    pytest.importorskip("libtpu")

    def devices(name):
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices

    return devices


def compile_for(device, length, *, heads, kv_heads, dim, causal, backward, implementation="splash"):
    everywhere = NamedSharding(Mesh(np.array([device]), ("chip",)), PartitionSpec())
    function = functions(causal, implementation)[backward]
    args = arguments(length, heads, kv_heads, dim, sharding=everywhere)
    return jax.jit(function).lower(*args).compile()


def temporaries(program):
    return program.memory_analysis().temp_size_in_bytes / MIB


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_vision_attention_of_8192_patches_on_a_tpu(tpu, topology):
    program = compile_for(tpu(topology)[0], 8192, **VISION, backward=False)
    assert "tpu_custom_call" in program.as_text()
    assert not squares(program.as_text(), 8192)
    assert temporaries(program) <= 64


@pytest.mark.parametrize("backward", [False, True])
def test_temporaries_on_a_tpu_grow_linearly(tpu, backward):
    """On v5p: a v5e's compiler keeps more of short sequences in fast memory, which counts as 0."""
    device = tpu("v5p:2x2x1")[0]
    short, long = (
        compile_for(device, length, **VISION, backward=backward) for length in (4096, 16384)
    )
    assert not squares(long.as_text(), 16384)
    assert temporaries(short) > 1
    assert temporaries(long) < 6 * temporaries(short)  # a square would take 16


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x1"])
def test_the_decoders_attention_compiles_over_a_slice(tpu, topology):
    """Two rows of 2,048 tokens a chip, over all chips and with heads over four of them."""
    devices = np.array(tpu(topology))
    mesh = Mesh(devices.reshape(-1, 4), ("fsdp", "tensor"))
    layout = Layout((("batch", ("fsdp",)), ("attn_heads", ("tensor",))))
    with jax.set_mesh(mesh):
        args = arguments(
            2048, 28, 4, 128, batch=2 * len(devices) // 4,
            sharding=NamedSharding(mesh, layout.spec("batch", None)),
            head_sharding=NamedSharding(mesh, layout.spec("batch", None, "attn_heads", None)),
        )  # fmt: skip
        program = jax.jit(functions(True, "splash", layout)[1]).lower(*args).compile()
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2  # forward, fused backward
    assert not squares(text, 2048)
    assert not re.findall(r" (all-gather|all-to-all|collective-permute)(-start)?\(", text)


@pytest.mark.parametrize("shape", [VISION, DECODER], ids=["vision", "decoder"])
def test_the_gpu_kernels_lower_without_a_square(shape):
    """As far as this goes without a GPU: Pallas makes Triton's code for each of the kernels."""
    mesh = AbstractMesh(
        (),
        (),
        abstract_device=AbstractDevice(
            device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"
        ),
    )
    args = arguments(2048, shape["heads"], shape["kv_heads"], shape["dim"])
    both = functions(shape["causal"], "triton")[1]
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(both).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 3  # forward, row sums, backward
    assert "2048x2048x" not in text


@pytest.mark.parametrize("backward", [False, True])
def test_the_plain_form_stays_linear(backward):
    """On this machine's own compiler; 32 MiB of it are the blocks of scores."""
    sizes = []
    for length in (2048, 8192):
        args = arguments(length, VISION["heads"], VISION["kv_heads"], VISION["dim"])
        program = jax.jit(functions(False, "xla")[backward]).lower(*args).compile()
        assert not squares(program.as_text(), length)
        sizes.append(temporaries(program))
    assert sizes[1] < 4.4 * sizes[0]
