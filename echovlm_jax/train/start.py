"""Where a run's parameters come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from echovlm_jax.config import PRESETS, ModelConfig, preset
from echovlm_jax.convert.folder import open_model
from echovlm_jax.convert.load import load_params
from echovlm_jax.errors import InputError
from echovlm_jax.train.program import Program
from echovlm_jax.train.stages import merge


class Start(NamedTuple):
    """A model to start from."""

    config: ModelConfig
    params: Callable[[Program], Any]  # the parameters, laid out as in a program; None: random ones


def starting_point(model: str) -> Start:
    """What a configuration's key `model` names.

    Args:
      model: a preset's name, for random parameters; or a MODEL folder.

    Raises:
      InputError: it is neither.
    """
    if model in PRESETS:
        return Start(preset(model), lambda program: None)
    if not Path(model).is_dir():
        raise InputError(
            f"config key model: {model!r} is neither a folder nor one of {', '.join(PRESETS)}"
        )

    def params(program: Program) -> Any:
        wanted = merge(program.state.trainable["params"], program.state.frozen)
        return load_params(model, shardings=jax.tree.map(lambda s: s.sharding, wanted))[1]

    return Start(open_model(model).config, params)
