"""Seconds between frames in a dataset: stored, read, and the positions of direct processing."""

import dataclasses
import json
import shutil
import zlib

import numpy as np
import pytest

from echovlm_jax.config import preset
from echovlm_jax.data import folder
from echovlm_jax.data.build import Options, build
from echovlm_jax.data.dataset import open_dataset
from echovlm_jax.data.epoch import Sample
from echovlm_jax.data.examples import example, open_source
from echovlm_jax.data.record import Medium
from echovlm_jax.data.rows import fill_row, row_layout
from echovlm_jax.data.settings import Settings
from echovlm_jax.errors import InputError
from echovlm_jax.phantom import PhantomDataset
from echovlm_jax.processing import mrope_positions, read_media
from tests.data.sources import record, write
from tests.processing.test_dicom import new_dicom, save

FRAMES = np.random.default_rng(0).integers(0, 256, (40, 56, 56), np.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset of two cine loops, one that states its time and one that doesn't, and an image."""
    where = tmp_path_factory.mktemp("time")
    records = [{**record(n), "image": [name]} for n, name in enumerate("abc")]
    sources, images = write(where, records)
    save(new_dicom(FRAMES, "MONOCHROME2", FrameTime="125"), images / "a")
    save(new_dicom(FRAMES[:8], "MONOCHROME2"), images / "b")
    save(new_dicom(FRAMES[:1], "MONOCHROME2", FrameTime="125"), images / "c")
    build(sources, images, where / "out", Options(validation=0, test=0, num_frames=16))
    return where / "out", images


def by_name(dataset):
    return {"abc"[int(dataset.record(n).id[-1])]: n for n in range(len(dataset))}


def row(out, name: str, **changes) -> tuple[dict[str, np.ndarray], object]:
    """One exam's row of a model that counts 2 positions a second."""
    settings = Settings(
        data=str(out), model="tiny", stage="full", seq_len=512, global_batch_size=1,
        **{"max_patches": 1024, "max_image_patches": 256} | changes,
    )  # fmt: skip
    source = open_source(settings)
    source = source._replace(model=dataclasses.replace(source.model, tokens_per_second=2))
    number = by_name(source.dataset)[name]
    made = example(source, number, 5)
    layout = row_layout(settings, source.model)
    arrays = {key: np.empty(shape, dtype) for key, (shape, dtype) in layout.items()}
    fill_row(source, [Sample(number, 5, made.tokens, made.patches)], arrays)
    return arrays, made


def steps(arrays: dict[str, np.ndarray]) -> list[int]:
    """The time ids of a row's vision tokens, from the first on."""
    times = arrays["positions"][0, arrays["patch_index"] >= 0]
    return sorted(set((times - times.min()).tolist()))


def test_it_is_stored_and_read(made):
    out, images = made
    dataset = open_dataset(out)
    found = {name: dataset.record(n).media[0] for name, n in by_name(dataset).items()}
    assert found["a"] == Medium(16, 56, 56, 40 / 16 * 0.125)
    assert found["b"] == Medium(8, 56, 56, None)
    assert found["c"] == Medium(0, 56, 56, None)
    for name, medium in found.items():
        assert read_media(images / name).seconds == medium.seconds


def test_the_same_positions_as_direct_processing(made):
    """40 frames of 0.125 s are stored as 16; a step of two lasts 0.625 s."""
    out, images = made
    arrays, exam = row(out, "a")
    assert steps(arrays) == [0, 1, 2, 3, 5, 6, 7, 8]  # trunc(1.25 i)
    tokens = arrays["tokens"][: exam.tokens]
    model = dataclasses.replace(preset("tiny"), tokens_per_second=2)
    media = read_media(images / "a")
    wanted, _ = mrope_positions(
        tokens[None], None, None, [exam.grids[0][:3]], config=model,
        second_per_grid_ts=[2 * media.seconds],
    )  # fmt: skip
    np.testing.assert_array_equal(arrays["positions"][:, : exam.tokens], wanted[:, 0])


def test_a_row_with_room_for_fewer_frames(made):
    """Half the frames, twice as long a step."""
    arrays, exam = row(made[0], "a", max_patches=64)
    assert exam.grids[0].frames == 8
    assert steps(arrays) == [0, 2, 5, 7]  # trunc(2.5 i)


def test_unknown_time_is_24_frames_a_second(made):
    assert steps(row(made[0], "b")[0]) == [0]  # trunc(i / 6), i below 4


def test_a_dataset_from_before(made, tmp_path):
    """Version 1.0.0 has three numbers a medium; its loops count as 24 frames a second."""
    old = tmp_path / "old"
    shutil.copytree(made[0], old)
    as_version_1_0_0(old)
    dataset = open_dataset(old)
    for name, n in by_name(dataset).items():
        assert dataset.record(n).media[0].seconds is None
        assert dataset.media(n)[0].shape[-1] == 3, name
    assert steps(row(old, "a")[0]) == [0, 1]  # trunc(i / 6), i below 8
    manifest = json.loads((old / folder.MANIFEST).read_text())
    del manifest["digest"]
    manifest["version"] = "2.0.0"
    (old / folder.MANIFEST).write_bytes(folder.manifest_bytes(manifest))
    with pytest.raises(InputError, match="is of another version"):
        open_dataset(old)


def as_version_1_0_0(out) -> None:
    """Takes from a dataset what 1.0.0 did not have."""
    manifest = json.loads((out / folder.MANIFEST).read_text())
    del manifest["digest"]
    manifest["version"] = "1.0.0"
    for split, entry in manifest["splits"].items():
        path = out / folder.records_name(split)
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        stored = []
        for line in lines:
            line["media"] = [medium[:3] for medium in line["media"]]
            stored.append(json.dumps(line).encode() + b"\n")
        path.write_bytes(b"".join(stored))
        index = folder.read_index(out / folder.index_name(split), entry).copy()
        index["offset"] = np.cumsum([0, *map(len, stored)])
        index["crc"][:-1] = [zlib.crc32(line) for line in stored]
        (out / folder.index_name(split)).write_bytes(index.tobytes())
        entry["index"] = folder.digest(index.tobytes())
    (out / folder.MANIFEST).write_bytes(folder.manifest_bytes(manifest))


def test_a_phantom_loop_has_the_time_of_its_file():
    """A heartbeat of 0.8 seconds, in memory and through DICOM."""
    dataset = PhantomDataset("test", 64, cine=1.0, cine_frames=8)
    loops = [m for n in range(64) for m in dataset.record(n).media if m.frames]
    assert loops and all(m.seconds == pytest.approx(0.1) for m in loops)
