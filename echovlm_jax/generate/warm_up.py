"""The programs that answers will need, compiled before they are asked for: by made-up prompts."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.generate.engine import request
from echovlm_jax.generate.offline import Run, columns_for
from echovlm_jax.generate.prompts import Prompt, split_rows
from echovlm_jax.ops.sampling import SamplingOptions
from echovlm_jax.processing.batch import PATCH_BUCKETS
from echovlm_jax.progress import progress

_MARKS = 2  # tokens around an image


def warm_up(
    model: Any, prompt: str = "", *, system: str | None = None, max_new_tokens: int = 512
) -> dict[str, Any]:
    """Runs every program that `model.generate` with this prompt needs, about no image or one of any
    size that the model reads. Where compiled programs are kept, the next process finds them.

    Args:
      model: a `load.Model`.
      prompt, system, max_new_tokens: as of `generate`; a prompt of other length may need others.

    Returns:
      prompts (how many were made up, each with programs of its own), compile_seconds and seconds.
    """
    started = time.perf_counter()
    text = model.prepare([], prompt, system=system, max_new_tokens=max_new_tokens)
    images = model.processor.image_config
    made = prompts(
        model.config,
        text=text["input_ids"].shape[1],
        patches=math.ceil(images.max_pixels / images.patch_size**2),
        new=max_new_tokens,
    )
    own = request(SamplingOptions(), model.stop_ids, 2, 0)
    compiling = 0.0
    place = contextlib.nullcontext() if model.mesh is None else jax.set_mesh(model.mesh)
    with place, progress(len(made), "prompt", "warm-up") as tick:
        for one in made:
            run = Run(model.config, model.params, model.dtype, model.compute)
            list(run.answer([(one, own)], rows=1, new=max_new_tokens))
            compiling += run.seconds["compile"]
            tick(1)
    return {
        "prompts": len(made),
        "compile_seconds": compiling,
        "seconds": time.perf_counter() - started,
    }


def prompts(config: ModelConfig, *, text: int, patches: int, new: int) -> list[Prompt]:
    """Prompts whose answers need every program that answers to this text need, about no image or
    one of any size up to a bound.

    Args:
      config: sizes.
      text: tokens of the prompt without an image.
      patches: of the largest image; 0 for text alone.
      new: limit of new tokens.
    """
    made: dict[object, Prompt] = {}
    for count in (0, *_image_tokens(config.vision.merge_unit, patches)):
        length = text + (count + _MARKS if count else 0)
        if length + new > config.text.max_position_embeddings:
            break
        [prompt] = split_rows(config, _inputs(config, count, length - count))
        shapes = tuple(sorted((name, array.shape) for name, array in prompt.batch.items()))
        made.setdefault((shapes, columns_for(length + new)), prompt)
    return list(made.values())


def _image_tokens(unit: int, patches: int) -> Iterator[int]:
    """Ascending numbers of an image's tokens: of each bucket that images up to `patches` fall into
    the ends, and what lies between in steps by which no size of the cache is passed over."""
    step, most, lower = 64, patches // unit, 0
    for size in PATCH_BUCKETS:
        if lower >= most:
            return
        upper = min(size // 4, most)  # the buckets count 4 patches a token
        yield from sorted({*range(lower + 1, upper, step), upper})
        lower = upper


def _inputs(config: ModelConfig, count: int, text: int) -> dict[str, np.ndarray]:
    """A row as the processor gives it: one image of `count` tokens, and text around it."""
    words = np.full(text, _word(config), np.int64)
    if not count:
        return {"input_ids": words[None]}
    merge = config.vision.spatial_merge_size
    image = np.full(count, config.image_token_id, np.int64)
    patches = (count * config.vision.merge_unit, config.vision.patch_dim)
    return {
        "input_ids": np.concatenate([words[:1], image, words[1:]])[None],
        "pixel_values": np.zeros(patches, np.float32),
        "image_grid_thw": np.array([[1, merge, merge * count]], np.int64),
    }


def _word(config: ModelConfig) -> int:
    """A token that is neither an image's nor a video's."""
    taken = {config.image_token_id, config.video_token_id, config.vision_start_token_id}
    return next(token for token in range(config.text.vocab_size) if token not in taken)
