"""What is asked of a bucket: each byte once, no list where a name will do; what refusals say."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echovlm_jax.checkpoint import open_checkpoints
from echovlm_jax.cli import main
from echovlm_jax.config import to_hf
from echovlm_jax.convert import convert, export, inspect, load_params, table
from echovlm_jax.errors import InputError
from echovlm_jax.load import load_model
from echovlm_jax.model import param_specs
from echovlm_jax.storage import bucket as buckets
from echovlm_jax.storage import digests, writer
from echovlm_jax.storage.arrays import base_kvstore
from echovlm_jax.storage.files import as_path, below, copy_folder, make_folder, write_json
from echovlm_jax.storage.layout import run_files
from echovlm_jax.storage.verify import verify
from tests.buckets import Request, Server, gcs_server, s3_server
from tests.convert.checkpoints import MINI, tensors, write

ROOT = Path(__file__).parents[1]


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


# --- Lists ----------------------------------------------------------------------------------------


def test_a_folder_is_known_by_its_files(server, run, capsys):
    """What lies beside a run, or in the rest of a bucket, may be millions of objects."""
    for words in (["inspect", str(run)], ["inspect", "s3://bucket"], ["inspect", "s3://bucket/no"]):
        requests = asked(server, lambda words=words: main(words))
        prefixes = [request.query["prefix"][0] for request in requests if request.query]
        assert len(prefixes) <= 6 and all(p.startswith((run.name, "no/", "!")) for p in prefixes)
    assert "s3://bucket: has no config.json" in capsys.readouterr().err


def test_a_whole_bucket_is_no_place_for_a_model(server, tmp_path, capsys):
    write(tmp_path / "model", tensors())
    requests = asked(server, lambda: main(["convert", str(tmp_path / "model"), "s3://bucket/"]))
    assert "s3://bucket: exists; choose another place" in capsys.readouterr().err
    assert not [r for r in requests if r.method != "GET" or "prefix" not in r.query][1:]


# --- Refusals -------------------------------------------------------------------------------------


def told(words: list[str], capfd) -> str:
    """A command's one line, of what C++ prints too."""
    assert main(words) == 2
    [line] = capfd.readouterr().err.splitlines()
    return line


_NOBODY = """
import os
from echovlm_jax.cli import main
from echovlm_jax.storage import bucket
bucket._FIRST_RETRIES = {"max_retries": 1, "initial_delay": "0.1s"}
os.environ["AWS_ENDPOINT_URL"] = os.environ["TENSORSTORE_GCS_HTTP_URL"] = "http://127.0.0.1:9"
assert main(["inspect", "s3://bucket/x"]) == 2
bucket._open.cache_clear()
del os.environ["AWS_ACCESS_KEY_ID"]  # TensorStore then tells where it looks for it
assert main(["inspect", "s3://bucket/x"]) == main(["inspect", "gs://bucket/x"]) == 2
"""


def test_nobody_answers(server):
    """In a process of its own, which shows what C++ prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", _NOBODY], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    for line, scheme in zip(ran.stderr.splitlines(), ("s3", "s3", "gs"), strict=True):
        assert line.startswith(f"echovlm: error: {scheme}://bucket: CURL error"), line


def test_an_answer_that_does_not_come(server, monkeypatch, capfd):
    monkeypatch.setattr(buckets, "_FIRST_SECONDS", 0.5)
    buckets._open.cache_clear()
    server.answer = lambda request: time.sleep(1)
    assert "s3://bucket: no answer in 0 s" in told(["inspect", "s3://bucket/x"], capfd)


def test_a_model_that_is_named_in_a_configuration_is_asked_for_first(server, tmp_path, capfd):
    server.answer = lambda request: 403
    config = ROOT / "configs/phantom.py"
    words = ["train", "--config", str(config), "--workdir", str(tmp_path / "run")]
    assert "s3://bucket/m: HTTP 403" in told([*words, "--config.model=s3://bucket/m"], capfd)
    assert not (tmp_path / "run").exists()


def test_wrong_credentials_and_a_bucket_that_is_not_there(server, capfd):
    server.answer = lambda request: 403
    line = told(["inspect", "s3://bucket/x"], capfd)
    assert line.endswith("s3://bucket/x: HTTP 403; check the credentials and what they permit")
    server.answer = lambda request: None
    for name in ("nobucket/x", "b/x", "Bücket/x"):
        assert f"error: s3://{name[:-2]}: " in told(["inspect", f"s3://{name}"], capfd)
    for name in ("", "/x", "bucket/../x"):
        assert f"s3://{name}: names no bucket" in told(["inspect", f"s3://{name}"], capfd)


def test_what_fails_for_a_moment_is_asked_again(server):
    place, failed = as_path("s3://bucket/moment"), []
    place.write_bytes(b"1")
    for name in ("moment", ""):  # an object, a list

        def once(request: Request, name: str = name) -> int | None:
            if request.name == name and (name or "prefix" in request.query) and name not in failed:
                failed.append(name)
                return 503
            return None

        server.answer = once
        before = buckets.retries()
        assert place.read_bytes() == b"1" and as_path("s3://bucket/moment0").below() == []
        assert buckets.retries() == before + 1
    assert failed == ["moment", ""]


def test_what_fails_for_long_says_how_often(server, monkeypatch):
    place = as_path("s3://bucket/moment")
    monkeypatch.setitem(buckets._RETRIES, "max_retries", 2)
    monkeypatch.setitem(buckets._RETRIES, "initial_delay", "0.01s")
    buckets._open.cache_clear()
    server.answer = lambda request: 503 if request.name == "moment" else None
    with pytest.raises(OSError, match=r"SlowDown: no, tried 3 times: 's3://bucket/moment'"):
        place.read_bytes()
    buckets._open.cache_clear()


def test_google_may_refuse_a_list_without_a_word(monkeypatch):
    """TensorStore then lists nothing: a run would be begun anew."""
    with gcs_server() as server:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.address)
        place = as_path("gs://bucket/run")
        place.write_bytes(b"1")
        assert as_path("gs://bucket").below() == ["run"] and place.below() == []
        server.refuses = True
        with pytest.raises(OSError, match="check the credentials"):
            as_path("gs://bucket/other").below()


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b/名ü", "50%25+1?y=1&z#t", "(a)[b]{c}//~/"])
def test_a_folder_may_have_any_name(server, tmp_path, name):
    place, source = as_path(f"s3://bucket/{name}"), write(tmp_path / "model", tensors())
    convert(source, place / "ours")
    assert verify(place / "ours")["ok"] and inspect(place / "ours") == inspect(source)
    export(place / "ours", place / "hf")
    assert inspect(place / "hf") == inspect(source)
    assert {name.split("/")[0] for name in below(place)} == {"ours", "hf"}
    load_params(place / "hf")


def test_an_object_may_have_a_folders_name(server, tmp_path):
    place, source = as_path("s3://bucket/both"), write(tmp_path / "model", tensors())
    convert(source, place)
    place.write_bytes(b"an object")
    as_path("s3://bucket")._store.write("both/", b"").result()  # as consoles make folders
    load_params(place)
    assert verify(place)["ok"]
    with pytest.raises(InputError, match="exists"):
        export(source, place)
