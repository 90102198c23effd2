"""Model configuration: frozen dataclasses, presets, and Hugging Face's config.json both ways."""

from echovlm_jax.config.hugging_face import from_hf, to_hf
from echovlm_jax.config.presets import PRESETS, preset
from echovlm_jax.config.sizes import ModelConfig, MoEConfig, TextConfig, VisionConfig

__all__ = [
    "PRESETS",
    "MoEConfig",
    "ModelConfig",
    "TextConfig",
    "VisionConfig",
    "from_hf",
    "preset",
    "to_hf",
]
