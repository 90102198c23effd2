"""Host side, numpy only: files and messages to model inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echovlm_jax.processing.batch import (
    PATCH_BUCKETS,
    SEQUENCE_BUCKETS,
    bucket,
    make_batch,
    merged_order,
    pad_batch,
)
from echovlm_jax.processing.chat import load_chat_template, qwen2_vl_prompt
from echovlm_jax.processing.images import (
    ImageConfig,
    image_config,
    load_media,
    read_media,
    to_patches,
)
from echovlm_jax.processing.media import Media
from echovlm_jax.processing.positions import mrope_positions
from echovlm_jax.processing.processor import Processor, check_length
from echovlm_jax.processing.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from echovlm_jax.processing.dicom import read_dicom

__all__ = [
    "PATCH_BUCKETS",
    "SEQUENCE_BUCKETS",
    "ImageConfig",
    "Media",
    "Processor",
    "Tokenizer",
    "bucket",
    "check_length",
    "image_config",
    "load_chat_template",
    "load_media",
    "load_tokenizer",
    "make_batch",
    "merged_order",
    "mrope_positions",
    "pad_batch",
    "qwen2_vl_prompt",
    "read_dicom",
    "read_media",
    "to_patches",
]


def __getattr__(name: str) -> Any:
    """`read_dicom` on first use: pydicom takes longer to import than all the rest."""
    if name == "read_dicom":
        from echovlm_jax.processing.dicom import read_dicom

        return read_dicom
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
