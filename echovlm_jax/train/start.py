"""Where a run's parameters come from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from echovlm_jax.config import PRESETS, ModelConfig, preset, to_hf
from echovlm_jax.convert.folder import copy_side_files, open_model, read_config
from echovlm_jax.convert.load import load_params
from echovlm_jax.data.dataset import open_dataset
from echovlm_jax.data.fit import training_images
from echovlm_jax.data.tokenizer import byte_tokenizer, images_of_preset
from echovlm_jax.errors import InputError
from echovlm_jax.processing.processor import pixel_configs, stated_pixels
from echovlm_jax.processing.tokenizer import load_tokenizer
from echovlm_jax.storage.files import as_path, make_folder, write_bytes, write_json
from echovlm_jax.storage.layout import CONFIG
from echovlm_jax.train.program import Program
from echovlm_jax.train.stages import merge

# What a tokenizer, and the template that goes with it, is read from.
_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja"),
)


class Start(NamedTuple):
    """A model to start from."""

    config: ModelConfig
    params: Callable[[Program], Any]  # the parameters, laid out as in a program; None: random ones
    files: Path | None  # the folder of the model's configuration and tokenizer, where it has one

    def keep(self, folder: Path, config: Any) -> None:
        """Puts what a model has beside its weights into a run's folder, so that it is a model too:
        config.json, the tokenizer that it is trained with, and how its pictures become patches."""
        make_folder(folder)
        described = to_hf(self.config, config.param_dtype)
        if self.files is None:
            write_json(folder / CONFIG, described)
            images = images_of_preset(self.config)
        else:
            images, _ = pixel_configs(self.files, None)
            copy_side_files(self.files, folder)
        if config.get("tokenizer"):
            _copy_tokenizer(as_path(config.tokenizer), folder)
        elif self.files is None:
            byte_tokenizer(self.config).save(str(folder / "tokenizer.json"))
        images = training_images(images, config.max_image_patches, config.max_patches)
        frames = open_dataset(config.data, config.get("split") or "train").num_frames
        for name, said in stated_pixels(folder, images, frames).items():
            write_json(folder / name, said)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Puts a folder's tokenizer in the place of the model's own; nothing of that may be left, or it
    could be read instead.

    Raises:
      InputError: there is none.
    """
    load_tokenizer(source)
    for name in _TOKENIZER:
        (folder / name).unlink(missing_ok=True)
        if (source / name).is_file():
            write_bytes(folder / name, (source / name).read_bytes())


def frozen_start(folder: Path) -> Start:
    """Of a run that has begun: its own model/; the weights are in its checkpoint."""
    return Start(read_config(folder), lambda program: None, folder)


def starting_point(model: str) -> Start:
    """What a configuration's key `model` names.

    Args:
      model: a preset's name, for random parameters; or a MODEL folder.

    Raises:
      InputError: it is neither.
    """
    if model in PRESETS:
        return Start(preset(model), lambda program: None, None)
    if not as_path(model).is_dir():
        raise InputError(
            f"config key model: {model!r} is neither a folder nor one of {', '.join(PRESETS)}"
        )

    opened = open_model(model, quantized=True)

    def params(program: Program) -> Any:
        wanted = merge(program.state.trainable["params"], program.state.frozen)
        shardings = jax.tree.map(lambda s: s.sharding, wanted)
        return load_params(opened, shardings=shardings, quantize=program.quantize)[1]

    return Start(opened.config, params, opened.folder)
