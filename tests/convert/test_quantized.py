"""Checkpoints that others quantized: read as the floats that the program itself makes of them."""

from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from echovlm_jax.cli import main
from echovlm_jax.convert import load_params
from echovlm_jax.storage import writer as store
from echovlm_jax.storage.verify import verify
from tests.convert import quantized_checkpoints as made
from tests.convert.checkpoints import same_bits
from tests.convert.quantized_checkpoints import Checkpoint, torch, written

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GROUP = {"strategy": "group", "group_size": 32}
KINDS: dict[str, Callable[[], Checkpoint]] = {
    "awq": made.awq,
    "awq, whole columns": lambda: made.awq(-1),
    "awq, bfloat16": lambda: made.awq(dtype=BF16),
    **{f"gptq {n}": lambda n=n: made.gptq(n) for n in (2, 3, 4, 8)},
    **{f"gptq v2 {n}": lambda n=n: made.gptq(n, form="gptq_v2") for n in (2, 3, 4, 8)},
    "gptq, desc_act": lambda: made.gptq(act=True),
    "gptq 3, desc_act": lambda: made.gptq(3, form="gptq_v2", act=True),
    "gptq, whole columns": lambda: made.gptq(group=-1),
    "w4a16": lambda: made.compressed("pack-quantized", num_bits=4, **GROUP),
    "w4a16, zero points": lambda: made.compressed(
        "pack-quantized", num_bits=4, symmetric=False, **GROUP
    ),
    "w4a16, channel, zero points": lambda: made.compressed(
        "pack-quantized", FP16, num_bits=4, symmetric=False, strategy="channel"
    ),
    "w8a16": lambda: made.compressed("pack-quantized", num_bits=8, strategy="channel"),
    "w2a16": lambda: made.compressed("pack-quantized", FP32, num_bits=2, **GROUP),
    "w8a8": lambda: made.compressed(
        "int-quantized", num_bits=8, strategy="channel", activations=True
    ),
    "w8a8, zero points": lambda: made.compressed(
        "int-quantized", num_bits=8, symmetric=False, strategy="channel", activations=True
    ),
    "w8a8, tensor": lambda: made.compressed("int-quantized", FP16, num_bits=8, strategy="tensor"),
    "w4a8, group": lambda: made.compressed("int-quantized", num_bits=4, **GROUP),
    "nf4": made.nf4,
    "nf4, float16": lambda: made.nf4(FP16, block=128),
    "nf4, float32": lambda: made.nf4(FP32, double=False),
    "nf4, blocks of 4096": lambda: made.nf4(block=4096, double=False),
    "nf4, stored as bfloat16": lambda: made.nf4(storage=BF16),
    "fp4": lambda: made.nf4(FP32, kind="fp4"),
    "int8": made.int8,
    "int8, no dtype": lambda: made.int8(None),
}


def assert_same(a: dict, b: dict) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert same_bits(one, other), path


@pytest.mark.parametrize("kind", KINDS)
def test_the_programs_own_weights(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, read as they are and converted, in pieces of a few rows."""
    monkeypatch.setattr(store, "CHUNK_BYTES", 1000)
    checkpoint = KINDS[kind]()
    source = checkpoint.write(tmp_path / "source")
    floats = written(tmp_path / "floats", checkpoint.floats, {"torch_dtype": None})
    wanted = load_params(floats)[1]
    assert_same(load_params(source)[1], wanted)
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0
    assert_same(load_params(tmp_path / "ours")[1], wanted)
    assert not verify(tmp_path / "ours")["corrupt"]
