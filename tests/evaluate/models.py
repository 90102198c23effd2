"""A model folder so small that it answers at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from echovlm_jax import demo, load

CONFIG = demo.CONFIG.replace(
    text={
        **{"num_layers": 1, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16},
        **{"mlp_dim": 32, "mrope_section": (2, 3, 3)},
    },
    vision={"depth": 1, "width": 32, "out_width": 32, "num_heads": 2, "mlp_dim": 64},
    moe=None,
)
# Small images: every exam's fit the same bucket, so that one program serves all.
SMALL: dict[str, Any] = {"max_image_patches": 16, "max_new_tokens": 6, "report": False}


def make_model(folder: Path) -> Path:
    return demo.make_checkpoint(folder, CONFIG)


def answer_by_hash(
    self: load.Model, asked: Any, *, slots: int, max_new_tokens: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """In place of `load.Model.answer_each`: a text that depends on all that a prompt is made of."""
    for row, one in asked:
        digest = hashlib.blake2b(digest_size=4)
        for key in sorted(one):
            digest.update(np.ascontiguousarray(one[key]).tobytes())
        words = ("囊肿", "cyst", "是", "No", "A", "B", "fatty liver", "🙂\u2028\r")
        number = int.from_bytes(digest.digest(), "little")
        yield row, {"text": f"{words[number % len(words)]} {number} mm"}
