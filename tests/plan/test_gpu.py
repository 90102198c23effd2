"""Compiling for NVIDIA cards that aren't here: the descriptions, and programs where XLA:GPU is."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from echovlm_jax.cards import CARDS, _described, card_devices
from echovlm_jax.chips import CHIPS
from echovlm_jax.errors import InputError

has_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="the extra `plan-gpu` is not installed",
)


@pytest.mark.parametrize("name", CARDS)
def test_every_card_has_its_rates_and_its_facts(name):
    chip, card = CHIPS[name], CARDS[name]
    text = _described(card, chip.hbm, chip.hbm_rate)
    said = dict(re.findall(r"(\w+): (\d+)", text))
    assert int(said["core_count"]) == card.cores
    assert int(said["device_memory_size"]) == chip.hbm
    # Two FLOPs a lane and cycle: what the makers call float32's peak, below bfloat16's.
    float32 = 2 * card.cores * card.lanes * card.clock * 1e9
    assert (
        float32 == pytest.approx(CHIPS["t4"].flops, rel=0.01)
        if name == "t4"
        else (float32 < chip.flops)
    )


def test_more_than_hosts_and_cards_is_refused():
    with pytest.raises(InputError, match="hosts × cards"):
        card_devices("h100", 1, 1.0, "2x2x2")


def _in_its_own_process(code: str, *words: str) -> str:
    """XLA reads its flags once."""
    flags = "--xla_gpu_autotune_level=0"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


_DEVICES = """
import sys
from echovlm_jax.cards import card_devices
from echovlm_jax.chips import CHIPS, defaults
name, size, slices = sys.argv[1:]
chip = CHIPS[name]
devices = card_devices(name, chip.hbm, chip.hbm_rate, size, int(slices))
print(len(devices), len({d.process_index for d in devices}), defaults(devices[0]).attention)
"""


@has_compiler
@pytest.mark.parametrize(
    ("card", "size", "hosts", "attention"),
    [("h100", "4x8", 4, "triton"), ("a100", "8", 1, "triton"), ("t4", "1", 1, "xla")],
)
def test_devices_are_where_they_would_be(card, size, hosts, attention):
    count = {"4x8": 32, "8": 8, "1": 1}[size]
    assert _in_its_own_process(_DEVICES, card, size, "1").split() == [
        str(count), str(hosts), attention
    ]  # fmt: skip


_COMPILED = """
import sys
import jax, jax.numpy as jnp
from echovlm_jax.cards import card_devices
from echovlm_jax.chips import CHIPS, defaults
from echovlm_jax.ops.attention.dispatch import attention
chip = CHIPS[sys.argv[1]]
device = card_devices(chip.name, chip.hbm, chip.hbm_rate, "1")[0]
how, where = defaults(device), jax.sharding.SingleDeviceSharding(device)
dtype = how.dtype or "bfloat16"
for length in (1024, 2048, 4096):
    def loss(q, k, v, ids):
        out = attention(q, k, v, q_segments=ids, kv_segments=ids, causal_offset=0,
                        implementation=how.attention)
        return out.astype(jnp.float32).sum()
    x = jax.ShapeDtypeStruct((1, length, 8, 128), dtype, sharding=where)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=where)
    made = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, ids).compile()
    print(made.memory_analysis().temp_size_in_bytes, f"{length},{length}]" in made.as_text())
"""


@has_compiler
@pytest.mark.parametrize("card", CARDS)
def test_attention_of_each_card_compiles_without_a_square(card):
    rows = [line.split() for line in _in_its_own_process(_COMPILED, card).splitlines()]
    sizes = [int(row[0]) for row in rows]
    assert all(row[1] == "False" for row in rows)
    assert sizes[2] <= 2.2 * sizes[1] <= 2.2**2 * sizes[0]


_PRODUCT = """
import sys
import jax, jax.numpy as jnp
from echovlm_jax.cards import card_devices
from echovlm_jax.chips import CHIPS
from echovlm_jax.ops.product.einsum import einsum
from echovlm_jax.ops.product.weight import Quantized
from echovlm_jax.plan import hlo
name, rows, kind = sys.argv[1:]
chip, width, made = CHIPS[name], 1024, 4096
device = card_devices(name, chip.hbm, chip.hbm_rate, "1")[0]
def shaped(shape, dtype):
    where = jax.sharding.SingleDeviceSharding(device)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)
grouped = kind == "int4"
values = (made, width // 128, 128) if grouped else (made, width)
scale = (width // 128, made) if grouped else (made,)
weight = Quantized(shaped(values, kind), shaped(scale, "float32"), 1, 1, grouped)
x = shaped((int(rows), 1, width), "float32" if name == "t4" else "bfloat16")
made = jax.jit(lambda x, w: einsum("BTD,FD->BTF", x, w)).lower(x, weight).compile()
needed = sum(jnp.dtype(a.dtype).itemsize * a.size for a in jax.tree.leaves(weight))
if grouped:
    needed -= weight.values.size // 2  # two share a byte, which itemsize doesn't know
print(hlo.read(made.as_text()).hbm_bytes / needed)
"""


@has_compiler
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("card", ["t4", "h100"])
def test_a_few_rows_never_write_a_quantized_weight_wide(card, rows, kind):
    """In one pass over it: written wide, int8 is 9 times as many bytes and int4 17 times."""
    ratio = float(_in_its_own_process(_PRODUCT, card, str(rows), kind))
    assert ratio < (1.1 if kind == "int8" else 1.2 if rows == 1 else 1.8)
