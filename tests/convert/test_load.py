"""Loading: into Orbax's hands, onto one device, and shard by shard onto eight."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echovlm_jax.convert import convert, folder, load_params, table
from echovlm_jax.errors import InputError
from echovlm_jax.model import abstract_params
from echovlm_jax.storage import writer as store
from echovlm_jax.storage.arrays import Reader
from tests.convert.checkpoints import MINI, TIED, finite, new_name, same_bits, tensors, write


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model in both forms."""
    root = tmp_path_factory.mktemp("load")
    values = {new_name(name): value for name, value in tensors(seed=3).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_BYTES", 3000)
        source = write(root / "source", values, shards=2)
        convert(source, root / "ours")
    return source, root / "ours"


def expected(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every parameter, put together from the checkpoint by numpy."""
    shapes = table.leaf_shapes(MINI)
    out: dict[str, np.ndarray] = {}
    for name, slot in table.slots(MINI).items():
        leaf = out.setdefault(slot.path, np.empty(shapes[slot.path], values[name].dtype))
        leaf[slot.index] = values[name].reshape(slot.part)
    return out


def assert_same(tree: dict, wanted: dict[str, np.ndarray]) -> None:
    flat = table.flatten(tree)
    assert flat.keys() == wanted.keys()
    for path, value in flat.items():
        assert same_bits(value, wanted[path]), path


def test_both_forms_load_alike(folders: tuple[Path, Path]) -> None:
    wanted = expected(tensors(seed=3))
    for path in folders:
        config, params = load_params(path)
        assert config == MINI
        assert jax.tree.structure(params) == jax.tree.structure(abstract_params(config))
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
        assert_same(params, wanted)


def test_cast_on_load(tmp_path: Path) -> None:
    values = finite(dtype="bfloat16")
    wanted = {path: value.astype(np.float32) for path, value in expected(values).items()}
    source = write(tmp_path / "source", values)
    _, params = load_params(source, dtype=jnp.float32)
    assert_same(params, wanted)
    with pytest.raises(InputError, match="dtype int8 is not supported"):
        load_params(source, dtype="int8")


def specs(mesh: Mesh) -> dict:
    """Shardings that cut stacked axes, leading axes, inner axes, and nothing."""
    cuts = {
        "text/layers/moe/experts/up/kernel": PartitionSpec("a", None, "b", None),
        "text/layers/attn/q/kernel": PartitionSpec(None, "b", None, "a"),
        "text/layers/attn/o/kernel": PartitionSpec(None, ("a", "b"), None, None),
        "vision/blocks/attn/qkv/kernel": PartitionSpec("a", None, None, "b"),
        "text/embed/embedding": PartitionSpec(("b", "a")),
        "text/lm_head/kernel": PartitionSpec(None, "b"),
    }
    shapes = table.leaf_shapes(MINI)
    return table.unflatten(
        {path: NamedSharding(mesh, cuts.get(path, PartitionSpec())) for path in shapes}
    )


def test_sharded(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert jax.device_count() == 8
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    shardings = specs(mesh)
    wanted = expected(tensors(seed=3))
    for path in folders:
        opened = folder.open_model(path)
        read: dict[str, list[int]] = {}

        def spy(name, indices, take, read_blocks=opened.read_blocks, read=read):  # type: ignore[no-untyped-def]
            sizes = [int(np.prod([s.stop - s.start for s in index])) for index in indices]
            read.setdefault(name, []).extend(sizes)
            return read_blocks(name, indices, take)

        monkeypatch.setattr(opened, "read_blocks", spy)
        _, params = load_params(opened, shardings=shardings)
        assert_same(params, wanted)
        jax.tree.map(lambda leaf, s: pytest.fail("sharding") if leaf.sharding != s else 0,
                     params, shardings)  # fmt: skip
        # Each block once: eight where all devices differ, one where all have the same.
        embedding = wanted["text/embed/embedding"].size
        assert read["text/embed/embedding"] == [embedding // 8] * 8
        assert read["text/final_norm/scale"] == [wanted["text/final_norm/scale"].size]
        assert len(read["text/lm_head/kernel"]) == 4


def test_one_sharding_for_all(folders: tuple[Path, Path]) -> None:
    mesh = Mesh(np.array(jax.devices()), ("a",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    _, params = load_params(folders[1], shardings=everywhere, dtype="float32")
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(params))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


def test_shardings_of_another_model(folders: tuple[Path, Path]) -> None:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    other = jax.tree.map(lambda _: device, abstract_params(TIED))
    with pytest.raises(InputError, match=r"shardings: .* is not in both"):
        load_params(folders[1], shardings=other)


def test_orbax_restores(folders: tuple[Path, Path]) -> None:
    """With and without a target, whichever of its checkpointers is asked."""
    params, wanted = folders[1] / "params", expected(tensors(seed=3))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[5])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=device),
        abstract_params(MINI),
    )
    with ocp.StandardCheckpointer() as standard:
        assert_same(standard.restore(params), wanted)
        restored = standard.restore(params, target)
        assert_same(restored, wanted)
        assert {leaf.sharding for leaf in jax.tree.leaves(restored)} == {device}
        metadata = standard.metadata(params).item_metadata
        assert table.flatten(metadata).keys() == wanted.keys()
    with ocp.PyTreeCheckpointer() as tree:
        assert_same(tree.restore(params), wanted)
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        assert_same(tree.restore(params, ocp.args.PyTreeRestore(target, arguments)), wanted)


def test_what_orbax_saves_is_read(tmp_path: Path) -> None:
    """Training writes its parameters through Orbax: compressed, merged from its own parts."""
    wanted = expected(tensors(seed=3))
    with ocp.StandardCheckpointer() as standard:
        standard.save(tmp_path / "params", jax.tree.map(jnp.asarray, table.unflatten(wanted)))
    opened = Reader(tmp_path / "params")
    for path, value in wanted.items():
        index = tuple(slice(0, size) for size in value.shape)
        assert same_bits(opened.read(path, index), value)
