"""Attention on a mesh of eight fake devices equals attention on one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from echovlm_jax.errors import InputError
from echovlm_jax.ops.attention.dispatch import attention
from echovlm_jax.ops.layout import Layout

AXES = ("data", "fsdp", "tensor", "sequence")
LAYOUT = Layout(
    (
        ("batch", ("data", "fsdp")),
        ("length", ("sequence",)),
        ("attn_heads", ("tensor", "sequence")),
        ("attn_kv_heads", ("tensor",)),
    )
)


def mesh(*shape):
    names = tuple(name for name, size in zip(AXES, shape, strict=True) if size > 1)
    return Mesh(np.array(jax.devices()).reshape([size for size in shape if size > 1]), names)


def draw(seed, batch, length, heads, kv_heads, dim=16):
    rng = np.random.default_rng(seed)
    shapes = [(batch, length, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    keys = np.sort(rng.integers(0, 3, (batch, length)).astype(np.int32))[:, ::-1].copy()
    keys[:, 0] = 2
    queries = np.where(keys == 0, 1, keys).astype(np.int32)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes], queries, keys


def forward_and_gradients(layout, implementation, causal=True):
    def run(q, k, v, d_out, q_segments, kv_segments):
        def forward(q, k, v):
            return attention(
                q, k, v,
                q_segments=q_segments, kv_segments=kv_segments,
                causal_offset=0 if causal else None,
                implementation=implementation, layout=layout,
            )  # fmt: skip

        out, pull = jax.vjp(forward, q, k, v)
        return out, *pull(d_out)

    return jax.jit(run)


@pytest.mark.parametrize("implementation", ["xla", "splash_interpret", "triton_interpret"])
@pytest.mark.parametrize(
    ("shape", "heads", "kv_heads"),
    [
        ((2, 2, 2, 1), 4, 2),  # a key/value head for each tensor shard
        ((1, 2, 2, 2), 8, 2),  # four shards of heads, two key/value heads
        pytest.param(  # eight shards, six key/value heads: no fit before one for each head
            (1, 1, 2, 4), 24, 6, marks=pytest.mark.slow
        ),
    ],
)
def test_a_mesh_changes_no_value_and_no_gradient(implementation, shape, heads, kv_heads):
    arrays, queries, keys = draw(heads, 4, 96, heads, kv_heads)
    arrays[3] *= (queries == keys)[..., None, None]
    expected = forward_and_gradients(Layout(), "xla")(*arrays, queries, keys)
    with jax.set_mesh(mesh(*shape)):
        ours = forward_and_gradients(LAYOUT, implementation)(*arrays, queries, keys)
    used = queries == keys
    np.testing.assert_allclose(np.asarray(ours[0])[used], np.asarray(expected[0])[used], atol=5e-6)
    for a, b in zip(ours[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def compiled(implementation, shape, in_axes, batch=4, length=1024, heads=8, kv_heads=4):
    devices = mesh(*shape)
    with jax.set_mesh(devices):
        q_axes, kv_axes, rows = in_axes
        args = [
            jax.ShapeDtypeStruct(
                (batch, length, n, 16),
                jnp.float32,
                sharding=NamedSharding(devices, LAYOUT.spec(*axes)),
            )
            for n, axes in (
                (heads, q_axes),
                (kv_heads, kv_axes),
                (kv_heads, kv_axes),
                (heads, q_axes),
            )
        ]
        ids = jax.ShapeDtypeStruct(
            (batch, length), jnp.int32, sharding=NamedSharding(devices, LAYOUT.spec(*rows))
        )
        return forward_and_gradients(LAYOUT, implementation).lower(*args, ids, ids).compile()


def collectives(program):
    """Kinds of communication in a compiled program."""
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    return set(re.findall(rf" ({kinds})(?:-start)?\(", program.as_text()))


@pytest.mark.parametrize("implementation", ["xla", "splash_interpret"])
def test_rows_and_heads_need_no_communication(implementation):
    heads, rows = ("batch", None, "attn_heads", None), ("batch", None)
    program = compiled(implementation, (2, 2, 2, 1), (heads, heads, rows))
    assert not collectives(program)


def test_sequence_shards_trade_length_for_heads():
    """Pieces travel as all-to-alls, forth and back; nobody holds a whole length of all heads."""
    pieces = ("batch", "length", "attn_kv_heads", None)  # what the projections make
    program = compiled("xla", (1, 2, 2, 2), (pieces, pieces, ("batch", None)))
    assert collectives(program) == {"all-to-all"}


def test_an_odd_batch_is_computed_everywhere():
    arrays, queries, keys = draw(1, 1, 32, 4, 2)
    expected = forward_and_gradients(Layout(), "xla")(*arrays, queries, keys)
    with jax.set_mesh(mesh(2, 2, 2, 1)):
        ours = forward_and_gradients(LAYOUT, "xla")(*arrays, queries, keys)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_heads_that_do_not_divide_are_refused_with_sizes_that_do():
    arrays, queries, keys = draw(2, 8, 32, 6, 2)
    with (
        jax.set_mesh(mesh(1, 2, 2, 2)),
        pytest.raises(
            InputError,
            match="6 attention heads do not divide over 4 devices of the mesh's tensor × sequence; "
            "choose sizes whose product is one of 1, 2, 3, 6",
        ),
    ):
        forward_and_gradients(LAYOUT, "xla")(*arrays, queries, keys)
