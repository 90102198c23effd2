"""Weights in few bits, stored and loaded: the same bits, whichever way they went."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echovlm_jax.convert import convert, load_params, table
from echovlm_jax.model import param_specs
from echovlm_jax.ops.product.weight import Quantized
from echovlm_jax.quantize import quantize, recipe, takes
from echovlm_jax.storage import writer as store
from tests.convert.checkpoints import MINI, finite, same_bits, write

KINDS = ("int8", "int4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in Hugging Face form, converted, and converted to each kind."""
    root = tmp_path_factory.mktemp("few")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_BYTES", 3000)
        source = write(root / "source", finite(dtype="bfloat16", seed=3), shards=2)
        convert(source, root / "wide")
        for kind in KINDS:
            convert(source, root / kind, quantize=kind)
    return {name: root / name for name in ("source", "wide", *KINDS)}


def assert_same(a: dict, b: dict) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert same_bits(one, other), path


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_gives_the_same_bits(folders: dict[str, Path], kind: str) -> None:
    """Quantized while loading, from either form, or stored so: what `quantize` makes of floats."""
    config, wide = load_params(folders["source"])
    assert config == MINI
    specs = param_specs(config)
    wanted = {
        path: quantize(value, specs[path], recipe(kind)) if takes(path, specs[path]) else value
        for path, value in table.flatten(wide).items()
    }
    assert sum(isinstance(value, Quantized) for value in wanted.values()) == 15
    for name in ("source", "wide"):
        assert_same(load_params(folders[name], quantize=kind)[1], table.unflatten(wanted))
    assert_same(load_params(folders[kind])[1], table.unflatten(wanted))
