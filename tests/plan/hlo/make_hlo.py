"""Makes the modules in this folder: `python tests/plan/hlo/make_hlo.py`, with libtpu installed.

Small programs, compiled for TPUs. What `hlo` reads nothing of is left out of the text: tables of
source lines, all of backend_config but the keys in KEPT, and most of the metadata.
"""

import json
import os
import re
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

KEPT = ("known_trip_count", "cost_estimate", "async_collective_fusion_config")
HERE = Path(__file__).parent


def mesh(machine, shape, names):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=machine).devices
    return Mesh(np.array(devices)[: int(np.prod(shape))].reshape(shape), names)


def array(shape, dtype, *axes):
    sharding = NamedSharding(jax.sharding.get_mesh(), P(*axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def fsdp():
    """Three layers of attention, each weight over 16 devices."""

    def layer(x, w):
        q = jnp.einsum("BTD,NHD->BTNH", x, w["q"])
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, q, preferred_element_type=jnp.float32)
        mixed = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores).astype(x.dtype), q)
        return x + jnp.einsum("BTNH,DNH->BTD", mixed, w["o"]), None

    weights = {
        "q": array((3, 4, 128, 512), jnp.bfloat16, None, None, None, "x"),
        "o": array((3, 512, 4, 128), jnp.bfloat16, None, "x"),
    }
    x = array((16, 256, 512), jnp.bfloat16, "x")
    return jax.jit(lambda w, x: jax.lax.scan(layer, x, w)[0]).lower(weights, x)


def collectives():
    """One of each kind in a loop of 7, and a sum over all devices in a loop of 5 inside of it."""

    def turn(x, _):
        x = jax.lax.psum_scatter(x, "x", scatter_dimension=0, tiled=True)
        x = jax.lax.all_gather(x * 2, "x", axis=0, tiled=True)
        x = jax.lax.all_to_all(x.reshape(4, 256, 512), "y", 0, 0)
        x = jax.lax.ppermute(x, "y", [(i, i + 1) for i in range(3)])
        x = x.reshape(1024, 512)
        return jax.lax.scan(lambda x, _: (jax.lax.psum(x, ("x", "y")), None), x, length=5)[0], None

    def program(x):
        return jax.lax.scan(turn, x, length=7)[0]

    spec = P(("x", "y"))
    mapped = jax.shard_map(program, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(mapped).lower(array((16 * 1024, 512), jnp.float32, ("x", "y")))


def windowed():
    """Two layers of an MLP with weights over x: the gathering overlaps the products, in loops."""

    def layer(x, w):
        h = jnp.einsum("TD,FD->TF", x, w[0].astype(jnp.bfloat16))
        return jnp.einsum("TF,DF->TD", h, w[1].astype(jnp.bfloat16)), None

    weights = (
        array((2, 8192, 2048), jnp.float32, None, "y", "x"),
        array((2, 2048, 8192), jnp.float32, None, "x", "y"),
    )
    x = array((8 * 2048, 2048), jnp.bfloat16, "x")
    return jax.jit(lambda w, x: jax.lax.scan(layer, x, w)[0]).lower(weights, x)


def kernels():
    """Splash attention in a loop of 3, and a grouped product."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask = masks.MultiHeadMask([masks.CausalMask((1024, 1024)) for _ in range(4)])

    def program(q, k, v, x, w, sizes):
        attend = jax.vmap(splash.make_splash_mha_single_device(mask))
        q = jax.lax.scan(lambda q, _: (attend(q, k, v), None), q, length=3)[0]
        return q, jax.lax.ragged_dot(x, w, sizes)

    heads = array((2, 4, 1024, 128), jnp.bfloat16)
    return jax.jit(program).lower(
        *[heads] * 3,
        array((1024, 512), jnp.bfloat16),
        array((4, 512, 256), jnp.bfloat16),
        array((4,), jnp.int32),
    )


MODULES = {
    "fsdp": (fsdp, "v5e:4x4", (16,), ("x",)),
    "collectives": (collectives, "v5e:4x4", (4, 4), ("x", "y")),
    "windowed": (windowed, "v5p:2x2x4", (8, 2), ("x", "y")),
    "kernels": (kernels, "v5p:2x2x1", (1,), ("x",)),
}


def shorten(text: str) -> str:
    """The module without what nobody reads."""
    text = re.sub(r"\n(FileNames|FunctionNames|FileLocations|StackFrames)\n(.+\n)*", "", text)
    text = re.sub(r"(?<=\n)%(\S+) \(.*\) -> .* \{(?=\n)", r"%\1 () -> () {", text)
    text = re.sub(r" stack_frame_id=\d+", "", text)
    text = re.sub(r", frontend_attributes=\{(?!kernel_metadata)[^}]*\}", "", text)
    return "\n".join(_shorten_line(line) for line in text.splitlines()) + "\n"


def _shorten_line(line: str) -> str:
    if not re.search(r" (convolution|custom-call|all-\w+)\(", line):
        line = re.sub(r", metadata=\{[^}]*\}", "", line)
    head, key, config = line.partition(", backend_config=")
    if not key:
        return line
    config = json.loads(config)
    config |= config.get("custom_call_config") or {}
    kept = {name: config[name] for name in KEPT if name in config}
    return head + (key + json.dumps(kept, separators=(",", ":")) if kept else "")


if __name__ == "__main__":
    for name, (make, machine, shape, axes) in MODULES.items():
        with jax.set_mesh(mesh(machine, shape, axes)):
            text = shorten(make().compile().as_text())
        (HERE / f"{name}_{machine.partition(':')[0]}.txt").write_text(text)
