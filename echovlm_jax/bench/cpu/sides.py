"""Two sides of a comparison: a model of a size that this machine can run, each side a process of
its own on the same processor cores, and questions to either of them.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from echovlm_jax.config import ModelConfig, preset
from echovlm_jax.errors import InputError

GRID = (1, 28, 28)  # the recipe's largest image: 784 patches, 196 tokens
PATCHES = math.prod(GRID)
# transformers' implementations of attention.
ATTENTION = ("sdpa", "eager")
# What each side's process runs: a function of one of the modules here.
PROGRAM = (
    "import json, sys; from echovlm_jax.bench.cpu.{module} import {side};"
    " {side}(json.loads(input()))"
)


def scaled_model() -> ModelConfig:
    """147 M parameters: an eighth of the released model's widths and vocabulary, and about four
    fifths of its layers; experts, heads a key/value head and the vision heads' size as released."""
    full = preset("echovlm_11b")
    assert full.moe is not None
    text, vision, moe = full.text, full.vision, full.moe
    special = preset("tiny")  # its special tokens lie within a small vocabulary
    return special.replace(
        text={
            "vocab_size": text.vocab_size // 8,
            "hidden_size": text.hidden_size // 8,
            "num_layers": 22,
            "num_heads": text.num_heads // 4,
            "num_kv_heads": text.num_kv_heads // 4,
            "head_dim": text.head_dim // 2,
            "mlp_dim": text.mlp_dim // 8,
            "mrope_section": tuple(n // 2 for n in text.mrope_section),
        },
        vision={
            "depth": 25,
            "width": vision.width // 8,
            "out_width": text.hidden_size // 8,
            "mlp_dim": vision.mlp_dim // 8,
            "num_heads": vision.num_heads // 8,
        },
        moe={
            "expert_mlp_dim": moe.expert_mlp_dim // 8,
            "shared_mlp_dim": moe.shared_mlp_dim // 8,
        },
    )


def chosen_model(size: str | None) -> ModelConfig:
    """The preset of that name, or `scaled_model`.

    Raises:
      InputError: an unknown preset, or PyTorch or transformers is not installed.
    """
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"`bench cpu` compares with PyTorch, and {name} is not installed;"
                " install it: pip install 'echovlm-jax[bench]'"
            )
    return scaled_model() if size is None else preset(size)


def check_memory(model: ModelConfig, size: str | None, bytes_a_parameter: int, what: str) -> None:
    """Refuses a model that this machine's memory doesn't hold twice (InputError)."""
    from echovlm_jax.convert.table import slots

    parameters = sum(slot.size for slot in slots(model).values())
    needed = 2 * bytes_a_parameter * parameters
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"size {size} needs about {needed / 2**30:.0f} GiB to {what} twice, and this machine"
            f" has {there / 2**30:.0f}; choose a smaller preset, or none"
        )


def inputs(model: ModelConfig, tokens: int, rows: int = 1) -> dict[str, np.ndarray]:
    """Rows as Hugging Face's models take them: an image, then text, which alone has labels."""
    rng = np.random.default_rng(0)
    count = PATCHES // model.vision.merge_unit
    image = [model.vision_start_token_id, *[model.image_token_id] * count]
    image += [model.vision_end_token_id]
    special = (getattr(model, f"{name}_token_id") for name in ("image", "video", "vision_start"))
    words = np.setdiff1d(np.arange(model.text.vocab_size), list(special))
    text = rng.choice(words, (rows, tokens - len(image)))
    ids = np.concatenate([np.tile(image, (rows, 1)), text], axis=1).astype(np.int64)
    labels = np.where(np.arange(tokens) < len(image), -100, ids)
    patches = rng.standard_normal((rows * PATCHES, model.vision.patch_dim))
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": patches.astype(np.float32),
        "image_grid_thw": np.tile(np.array([GRID], np.int64), (rows, 1)),
    }


def start(module: str, side: str, job: dict[str, Any], stack: ExitStack) -> Callable[[Any], Any]:
    """Starts one side in a process of its own, that ends with the stack.

    Args:
      module: of this package, where the side's function is.
      side: its name, "ours" or "theirs"; it is called with the job and then answers each line of
        standard input by a line of JSON.
      job: what both sides are to do.

    Returns:
      What sends it a value and waits for its answer; with None it only waits.
    """
    errors: Any = tempfile.TemporaryFile("w+")  # noqa: SIM115  (the stack closes it)
    stack.callback(errors.close)
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(module=module, side=side)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            bufsize=1,
        )
    )
    stack.callback(process.kill)
    assert process.stdin is not None and process.stdout is not None
    given, answers = process.stdin, process.stdout

    def ask(question: Any) -> Any:
        if question is not None:
            print(json.dumps(question), file=given)
        answer = answers.readline()
        if not answer:
            process.wait()
            errors.seek(0)
            raise RuntimeError(f"the run of {side} failed:\n{errors.read()}")
        return json.loads(answer)

    print(json.dumps(job), file=given)
    return ask


def serve(facts: Any, answer: Callable[[Any], Any]) -> None:
    """A side's loop: states the facts, then answers each question of standard input."""
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def take_cores(threads: int) -> None:
    """Leaves this process so many processor cores, the same ones on both sides."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
