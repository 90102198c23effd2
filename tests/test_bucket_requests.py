"""What is asked of a bucket: each byte once, no list where a name will do, and what a refusal says."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echovlm_jax.checkpoint import open_checkpoints
from echovlm_jax.config import to_hf
from echovlm_jax.convert import inspect, table
from echovlm_jax.load import load_model
from echovlm_jax.model import param_specs
from echovlm_jax.storage import bucket as buckets
from echovlm_jax.storage import digests, writer
from echovlm_jax.storage.arrays import base_kvstore
from echovlm_jax.storage.files import as_path, copy_folder, make_folder, write_json
from echovlm_jax.storage.layout import run_files
from tests.buckets import Request, Server, s3_server
from tests.convert.checkpoints import MINI


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK_BYTES", 3000)
        patch.setattr("echovlm_jax.storage.state.CHUNK_BYTES", 3000)
        patch.setattr("echovlm_jax.checkpoint._CHUNK_BYTES", 3000)
        yield server


@pytest.fixture(autouse=True)
def no_answer_of_another_test(server: Server) -> Iterator[None]:
    yield
    server.answer = lambda request: None
    buckets._open.cache_clear()


# --- Bytes ----------------------------------------------------------------------------------------


def state() -> dict[str, dict[str, np.ndarray]]:
    """As training saves it: parameters that train, an update of one, frozen ones, and moments."""
    rng = np.random.default_rng(0)

    def bits(shape: tuple[int, ...]) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    flat = {"step": np.int32(1)}
    for path, shape in table.leaf_shapes(MINI).items():
        part = "trainable/params" if path.startswith("text/layers/moe") else "frozen"
        flat[f"{part}/{path}"] = bits(shape)
    path = "text/layers/attn/q/kernel"
    stacked, out, inner = param_specs(MINI)[path].cut(table.leaf_shapes(MINI)[path])
    lora = f"trainable/lora/{path.removesuffix('/kernel')}"
    flat |= {f"{lora}/a": bits((*stacked, 4, *inner)), f"{lora}/b": bits((*stacked, *out, 4))}
    moments = [name for name in flat if name.startswith("trainable")]
    for kind in ("mu", "nu"):
        flat |= {f"opt_state/{kind}/{name}": bits(flat[name].shape) for name in moments}
    return table.unflatten(flat)


def placed() -> dict[str, dict[str, jax.Array]]:
    """Over four devices by their last axis where that can be cut, whole on each where not."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))

    def put(values: np.ndarray) -> jax.Array:
        cut = values.ndim and values.shape[-1] % 4 == 0
        spec = PartitionSpec(*[None] * (values.ndim - 1), "x") if cut else PartitionSpec()
        return jax.device_put(values, NamedSharding(mesh, spec))

    return jax.tree.map(put, state())


@pytest.fixture(scope="module", params=["saved there", "saved on a disk, and copied"])
def run(request: pytest.FixtureRequest, server: Server, tmp_path_factory) -> Path:
    there = as_path(f"s3://bucket/{request.param.replace(' ', '')}")
    made = there if request.param == "saved there" else tmp_path_factory.mktemp("run")
    make_folder(made / "model")
    write_json(made / "model/config.json", to_hf(MINI))
    settings = {"model": "none", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}
    write_json(made / "config.json", settings)
    digests.write(made, names=run_files(made))
    with open_checkpoints(made / "checkpoints", keep=2) as checkpoints:
        extra = {"config": settings}
        checkpoints.save(1, placed(), extra, model=made / "model", wait=True)
    if made != there:
        copy_folder(made, there)
    return there


def spans(run: Path) -> dict[str, tuple[str, int, int]]:
    """Where each chunk of each array lies: its object and bytes, by TensorStore's own account."""
    database = run / "checkpoints/1/state"
    base = ts.KvStore.open(base_kvstore(database)).result()
    found, nodes = {}, [ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]]
    while nodes:
        for entry in ts.ocdbt.dump(base, nodes.pop()).result()["entries"]:
            if "location" in entry:
                nodes.append(entry["location"])
            elif "indirect_value" in entry:
                _, folder, file, start, size = entry["indirect_value"].split(":")
                name = f"{database}/{folder}{file}".replace("%2F", "/")
                name = name.removeprefix("s3://bucket/")
                found[entry["key"].decode()] = name, int(start), int(start) + int(size)
    return found


def times_read(requests: list[Request], run: Path) -> dict[str, float]:
    """How often each array's bytes were sent, on average over them."""
    sent, sizes = {}, {}
    for key, (name, start, stop) in spans(run).items():
        array = key.rpartition("/")[0]
        sizes[array] = sizes.get(array, 0) + stop - start
        for request in requests:
            if request.method == "GET" and request.name == name:
                end = stop if request.stop is None else request.stop
                both = min(stop, end) - max(start, request.start)
                sent[array] = sent.get(array, 0) + max(0, both)
    return {array: sent.get(array, 0) / size for array, size in sizes.items()}


def asked(server: Server, what) -> list[Request]:
    before = len(server.seen)
    what()
    return server.seen[before:]


def test_a_model_of_a_run_is_read_once_and_its_optimizer_never(server, run):
    found = times_read(asked(server, lambda: load_model(run)), run)
    moments = {name for name in found if name.startswith("opt_state")}
    assert len(moments) > 4 and len(found) > 20
    assert {name: found[name] for name in moments} == dict.fromkeys(moments, 0)
    needed = found.keys() - moments
    assert {name: found[name] for name in needed} == dict.fromkeys(needed, 1)


def test_a_run_that_resumes_reads_each_byte_once(server, run):
    def restore() -> None:
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed()
        )
        with open_checkpoints(run / "checkpoints", keep=2) as checkpoints:
            number, values, _ = checkpoints.restore_latest(wanted)
        assert number == 1
        for a, b in zip(jax.tree.leaves(values), jax.tree.leaves(state()), strict=True):
            np.testing.assert_array_equal(a, b)

    found = times_read(asked(server, restore), run)
    assert found == dict.fromkeys(found, 1)


def test_inspect_reads_no_array(server, run):
    requests = asked(server, lambda: inspect(run))
    assert set(times_read(requests, run).values()) == {0}
