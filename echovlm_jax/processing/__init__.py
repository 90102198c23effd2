"""Host side, numpy only: files and messages to model inputs."""

from echovlm_jax.processing.batch import (
    PATCH_BUCKETS,
    SEQUENCE_BUCKETS,
    bucket,
    make_batch,
    merged_order,
    pad_batch,
)
from echovlm_jax.processing.chat import load_chat_template, qwen2_vl_prompt
from echovlm_jax.processing.dicom import read_dicom
from echovlm_jax.processing.images import ImageConfig, image_config, load_media, to_patches
from echovlm_jax.processing.positions import mrope_positions
from echovlm_jax.processing.processor import Processor, check_length
from echovlm_jax.processing.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "PATCH_BUCKETS",
    "SEQUENCE_BUCKETS",
    "ImageConfig",
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
    "to_patches",
]
