"""What a run's folder says of pictures is what its training does with them."""

import json

import numpy as np
import pytest

from echovlm_jax import demo
from echovlm_jax.config import preset
from echovlm_jax.data.examples import open_source
from echovlm_jax.data.fit import fit
from echovlm_jax.data.record import Medium
from echovlm_jax.data.settings import Settings
from echovlm_jax.errors import InputError
from echovlm_jax.processing import Processor
from echovlm_jax.train.config_file import load_config, own_config
from echovlm_jax.train.start import starting_point

MODEL = preset("tiny").replace(text={"num_layers": 1, "vocab_size": 264}, vision={"depth": 1})
QWEN = {"min_pixels": 3136, "max_pixels": 12845056, "processor_class": "Qwen2VLProcessor"}
SIZE = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}
# Where a model's folder may say how large pictures get, and a stranger mean.
FILES = {
    "none": {},
    "classic": {"preprocessor_config.json": QWEN},
    "sizes": {"preprocessor_config.json": SIZE | {"image_mean": [0.5, 0.5, 0.5]}},
    "both": {"preprocessor_config.json": QWEN | SIZE, "video_preprocessor_config.json": SIZE},
    "joint": {"processor_config.json": {"image_processor": SIZE, "video_processor": QWEN}},
    "small": {"preprocessor_config.json": {"min_pixels": 784, "max_pixels": 1568}},
}
PICTURES = [(768, 1024), (1024, 768), (100, 900), (30, 30), (112, 112), (700, 333)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return demo.make_checkpoint(tmp_path_factory.mktemp("base") / "model", MODEL)


def begun(base, tmp_path, files, **changes):
    """(the configuration, the folder RUN/model) of a run that begins at a model with such files."""
    model = tmp_path / "base"
    model.mkdir()
    for path in base.iterdir():
        (model / path.name).symlink_to(path)
    for name, content in files.items():
        (model / name).write_text(json.dumps(content))
    small = {"data_workers": 0, "seq_len": 512, "max_patches": 512, "max_image_patches": 64}
    config = load_config(own_config("phantom"), {**small, "model": str(model), **changes})
    starting_point(str(model)).keep(tmp_path / "run", config)
    return config, tmp_path / "run"


def training_tokens(config, height, width, frames=0) -> int:
    """How many tokens training gives one picture, or loop, that has a row to itself."""
    settings = Settings.from_config(config)
    row = (10, settings.seq_len, settings.max_patches, settings.max_image_patches)
    grids = fit([Medium(frames, height, width)], *row, open_source(settings).images)
    return grids[0].patches // 4


def picture(height, width):
    return np.random.default_rng(height).integers(0, 255, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        *((name, {}) for name in FILES),
        ("small", {"max_image_patches": 400}),  # more than its own file says
        ("classic", {"max_patches": 48}),  # less than an image may have
    ],
)
def test_a_picture_has_the_size_that_training_gave_it(base, tmp_path, name, limits):
    config, folder = begun(base, tmp_path, FILES[name], **limits)
    processor = Processor(folder)
    for size in PICTURES:
        wanted = training_tokens(config, *size)
        (grid,) = processor([picture(*size)], "x")["image_grid_thw"]
        assert grid.prod() // 4 == wanted, size
        loop = np.stack([picture(*size)] * 2)
        (grid,) = processor([loop], "x")["video_grid_thw"]
        assert grid.prod() // 4 == training_tokens(config, *size, frames=2), size
    assert open_source(Settings.from_config(config)).images == processor.image_config
    assert processor.video_config == processor.image_config


@pytest.mark.parametrize("name", FILES)
def test_hugging_face_reads_the_same_size(base, tmp_path, name):
    pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    config, folder = begun(base, tmp_path, FILES[name])
    theirs = hf.Qwen2VLImageProcessorPil.from_pretrained(folder)
    for size in PICTURES:
        (grid,) = np.asarray(theirs(picture(*size), return_tensors="np")["image_grid_thw"])
        assert grid.prod() // 4 == training_tokens(config, *size), size


def test_who_asks_may_say_otherwise(base, tmp_path):
    _, folder = begun(base, tmp_path, FILES["classic"])
    (grid,) = Processor(folder, max_pixels=400 * 196)([picture(768, 1024)], "x")["image_grid_thw"]
    assert 300 < grid.prod() <= 400


def test_a_tokenizers_folder_does_not_say_how_large_pictures_are(base, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").symlink_to(base / "tokenizer.json")
    (other / "preprocessor_config.json").write_text(json.dumps(QWEN))
    config, folder = begun(base, tmp_path, FILES["sizes"], tokenizer=str(other))
    assert Processor(folder).image_config == open_source(Settings.from_config(config)).images


def test_loops_have_the_frames_that_training_had(base, tmp_path):
    video = {"video_preprocessor_config.json": {"fps": 2.0, "num_frames": None}}
    _, folder = begun(base, tmp_path, video)
    assert Processor(folder).num_frames == 8  # the phantom's
    assert Processor(folder, num_frames=3).num_frames == 3
    assert Processor(base).num_frames == 16
    assert "fps" not in json.loads((folder / "video_preprocessor_config.json").read_text())
    for bad in (0, -1, 1.5, True, "8", 10**9):
        (folder / "video_preprocessor_config.json").write_text(json.dumps({"num_frames": bad}))
        with pytest.raises(InputError, match=r"video_preproc.*num_frames must be a whole number"):
            Processor(folder)
