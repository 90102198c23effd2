"""Golden files: what a PyTorch model recorded, read and checked before anything is compared.

A key that nothing reads, a shape that nothing fits and a mask that masks everything would make a
comparison of nothing, which holds: each is refused by name.
"""

import zipfile
from pathlib import Path

import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.convert.table import quoted
from echovlm_jax.errors import InputError

Golden = dict[str, np.ndarray]

INPUTS = (
    "input_ids",
    "attention_mask",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
)
RECORDED = (
    *("position_ids", "image_embeds", "video_embeds", "hidden_states", "router_logits"),
    *("coefficient", "logits", "generated_ids", "loss", "aux_loss"),
)
GRADIENT = "grad_norm/"
IGNORED = -100  # the label of a token that does not count

_WHOLE = ("input_ids", "image_grid_thw", "video_grid_thw", "labels", "generated_ids")


def read_golden(path: Path) -> Golden:
    """Reads a golden file; never unpickles. Raises InputError where it is not one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            golden = {key: file[key] for key in file.files}
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such golden file; make one with tests/golden/make_golden.py"
        ) from None
    except (
        *(ValueError, OSError, EOFError, KeyError, AttributeError),
        *(zipfile.BadZipFile, NotImplementedError, MemoryError),
    ) as error:
        raise InputError(f"{path}: not a readable .npz file ({type(error).__name__})") from None
    for key in ("input_ids", "attention_mask"):
        if key not in golden:
            raise InputError(f"{path}: key {key} is missing; a golden file needs it")
    for key, value in golden.items():
        if key not in (*INPUTS, "labels", *RECORDED) and not key.startswith(GRADIENT):
            raise InputError(
                f"{path}: key {quoted(key)} is unknown, so nothing would be compared with it; known"
                f" are {', '.join((*RECORDED, GRADIENT + 'NAME'))}"
            )
        if value.dtype.kind not in ("iu" if key in _WHOLE else "fiub"):
            raise InputError(
                f"{path}: key {quoted(key)} holds {value.dtype}; expected"
                f" {'whole ' if key in _WHOLE else ''}numbers"
            )
        if not value.size:
            raise InputError(f"{path}: key {quoted(key)} holds no values; leave it out")
    ids, mask = golden["input_ids"], golden["attention_mask"]
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise InputError(
            f"{path}: input_ids {ids.shape} {ids.dtype} and attention_mask {mask.shape} must be"
            " whole numbers of one shape [B, S]"
        )
    if not np.isin(mask, (0, 1)).all() or not (mask == 1).any(1).all():
        raise InputError(
            f"{path}: attention_mask must be 0 and 1, with a 1 in every row; only there is compared"
        )
    if not any(key in RECORDED or key.startswith(GRADIENT) for key in golden):
        raise InputError(
            f"{path}: records nothing to compare; record one of {', '.join(RECORDED)} or"
            f" {GRADIENT}NAME"
        )
    return golden


def check_golden(golden: Golden, config: ModelConfig, path: str) -> None:
    """Refuses what is recorded and this model has nothing to compare with.

    Raises:
      InputError: a key of a part that the model lacks, or of another shape than it gives.
    """
    rows, columns = golden["input_ids"].shape
    vocab = config.text.vocab_size
    for key in ("input_ids", "labels"):
        ids = golden.get(key, golden["input_ids"])
        if not ((ids >= 0) & (ids < vocab) | (key == "labels") & (ids == IGNORED)).all():
            raise InputError(
                f"{path}: key {key} holds ids outside 0 to {vocab - 1}; was it recorded from this"
                " checkpoint?"
            )
    layers, width, moe = config.text.num_layers, config.text.hidden_size, config.moe
    for key, grid in (("image_embeds", "image_grid_thw"), ("video_embeds", "video_grid_thw")):
        if key in golden and grid not in golden:
            raise InputError(f"{path}: key {key} has no input {grid} that it is recorded of")
    for key in ("router_logits", "coefficient", "aux_loss"):
        if key in golden and moe is None:
            raise InputError(
                f"{path}: key {key} is recorded of experts, and this model has none; was it"
                " recorded from this checkpoint?"
            )
    experts = moe.num_experts if moe else 0
    shapes = {
        "position_ids": (3, rows, columns),
        "hidden_states": (layers + 1, rows, columns, width),
        "router_logits": (layers, rows * columns, experts),
        "coefficient": (layers, rows, columns, 2),
        "logits": (rows, columns, config.text.vocab_size),
        "labels": (rows, columns),
    }
    for key, shape in shapes.items():
        found = golden[key].shape if key in golden else shape
        if key == "router_logits" and len(found) == 4 and found[1:3] == (rows, columns):
            found = (found[0], rows * columns, found[3])
        if found != shape:
            raise InputError(
                f"{path}: golden key {key} has shape {golden[key].shape}, this model gives {shape};"
                " was it recorded from this checkpoint?"
            )
    answer = golden.get("generated_ids")
    if answer is not None and (answer.ndim != 2 or len(answer) != rows):
        raise InputError(f"{path}: generated_ids has shape {answer.shape}, expected [{rows}, T]")
    for key, value in golden.items():
        if (key in ("loss", "aux_loss") or key.startswith(GRADIENT)) and value.size != 1:
            raise InputError(f"{path}: {quoted(key)} has shape {value.shape}; it is one number")
    counted = [key for key in golden if key == "loss" or key.startswith(GRADIENT)]
    if counted and "labels" not in golden:
        raise InputError(f"{path}: golden key labels is missing; loss and grad_norm need it")
    if counted and not (golden["labels"][:, 1:] != IGNORED).any():
        raise InputError(
            f"{path}: labels count no token, and {quoted(counted[0])} is recorded of them"
        )
