"""A model's sizes and kinds, as frozen dataclasses that refuse what no model can be built from.

Nothing here knows a model by its name: what differs between models is a field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from echovlm_jax.config.keys import MOE_KEYS, TEXT_KEYS, TOKEN_KEYS, form_of
from echovlm_jax.errors import InputError

NORMS = ("layer", "rms")
MLPS = ("quick_gelu", "gated")


@dataclass(frozen=True)
class VisionConfig:
    """The vision transformer and its merger.

    Attributes:
      width: of the patches' vectors.
      out_width: of the tokens that the merger puts out: the decoder's.
      mlp_dim: of an MLP's hidden layer.
      norm: "layer", with scale and bias, or "rms", with a scale.
      mlp: "quick_gelu" is fc2(quick_gelu(fc1(x))), "gated" down(silu(gate(x)) · up(x)); both have
        biases.
      window_size: side in pixels of the windows that patches attend in; None: all layers attend in
        whole frames.
      full_attention_layers: layers, from 0, that attend in whole frames beside those that don't;
        numbers past the last say nothing.
    """

    depth: int = 32
    width: int = 1280
    out_width: int = 3584
    num_heads: int = 16
    mlp_dim: int = 5120
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    norm: str = "layer"
    mlp: str = "quick_gelu"
    window_size: int | None = None
    full_attention_layers: tuple[int, ...] = ()

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def window(self) -> int | None:
        """Side of a window in merged cells; None without windows."""
        if self.window_size is None:
            return None
        return self.window_size // (self.spatial_merge_size * self.patch_size)

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Of each layer, whether it attends in windows."""
        none = self.window_size is None
        return tuple(not none and n not in self.full_attention_layers for n in range(self.depth))

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch: channel · time · height · width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that the merger joins into one token."""
        return self.spatial_merge_size**2


@dataclass(frozen=True)
class TextConfig:
    """The decoder. `mrope_section` splits head_dim / 2 channels among time, height and width."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class MoEConfig:
    """The second path of every decoder layer: routed experts and one shared expert."""

    num_experts: int = 4
    top_k: int = 2
    expert_mlp_dim: int = 1408
    shared_mlp_dim: int = 5632
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.001


@dataclass(frozen=True)
class ModelConfig:
    """A whole model. `moe=None` is plain Qwen2-VL: the same code without the second path.

    `tokens_per_second`: how fast a video's time positions count; None: one a step of its grid.
    """

    text: TextConfig
    vision: VisionConfig = VisionConfig()
    moe: MoEConfig | None = None
    tokens_per_second: float | None = None
    bos_token_id: int = 151643
    eos_token_id: int = 151645
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    vision_pad_token_id: int = 151654
    image_token_id: int = 151655
    video_token_id: int = 151656

    def __post_init__(self) -> None:
        _validate(self)

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with fields changed; `text`, `vision`, `moe` take mappings of changes."""
        parts = {
            key: dataclasses.replace(getattr(self, key), **value)
            if isinstance(value, Mapping)
            else value
            for key, value in changes.items()
        }
        return dataclasses.replace(self, **parts)


def whole(value: Any, key: str) -> int:
    """A whole number of at least 1, or InputError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{key} must be a whole number of at least 1, found {value!r}")
    return value


def number(value: Any, key: str) -> float:
    """A finite number above 0, or InputError."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value < float("inf")
    ):
        raise InputError(f"{key} must be a number above 0, found {value!r}")
    return value


def _validate(config: ModelConfig) -> None:
    """Refuses what the model can't be built from, by the key of config.json that says it."""
    text, vision, moe = config.text, config.vision, config.moe
    for ours, theirs in TEXT_KEYS.items():
        check: Callable[[Any, str], float] = number if ours == "rms_norm_eps" else whole
        check(getattr(text, ours), theirs)
    whole(text.head_dim, "head_dim")
    number(text.rope_theta, "rope_theta")
    _validate_vision(vision, text.hidden_size)
    if config.tokens_per_second is not None:
        number(config.tokens_per_second, "vision_config.tokens_per_second")
    if text.num_heads % text.num_kv_heads:
        raise InputError(
            f"num_attention_heads {text.num_heads} is not a multiple of num_key_value_heads"
            f" {text.num_kv_heads}"
        )
    sections = text.mrope_section
    are_whole = [isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in sections]
    if len(sections) != 3 or not all(are_whole) or 2 * sum(sections) != text.head_dim:
        raise InputError(
            f"rope_scaling.mrope_section {list(sections)} must be three whole numbers that sum to"
            f" half the head size, {text.head_dim // 2}"
        )
    if moe is not None:
        _validate_moe(moe)
    for key in TOKEN_KEYS:
        value = getattr(config, key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise InputError(f"{key} must be a whole number below 2**31, found {value!r}")
    for key in ("image_token_id", "video_token_id", "vision_start_token_id"):
        if getattr(config, key) >= text.vocab_size:
            raise InputError(
                f"{key} {getattr(config, key)} lies outside vocab_size {text.vocab_size}"
            )


def _validate_vision(vision: VisionConfig, out_width: int) -> None:
    for key, kinds in (("norm", NORMS), ("mlp", MLPS)):
        if getattr(vision, key) not in kinds:
            raise InputError(
                f"vision {key} {getattr(vision, key)!r} is unknown; choose one of"
                f" {', '.join(kinds)}"
            )
    form = form_of(vision.norm, vision.mlp)
    keys = {field.name: f"vision {field.name}" for field in dataclasses.fields(vision)}
    if form is not None:
        keys |= {ours: f"vision_config.{theirs}" for ours, theirs in form.vision.items()}
    for ours in (
        *("depth", "width", "out_width", "num_heads", "mlp_dim", "patch_size"),
        *("temporal_patch_size", "spatial_merge_size", "in_channels"),
    ):
        whole(getattr(vision, ours), keys[ours])
    if vision.width % vision.num_heads or vision.head_dim % 4:
        raise InputError(
            f"{keys['width']} {vision.width} over num_heads {vision.num_heads} must be a multiple"
            " of 4 (2-D rotary positions)"
        )
    if vision.out_width != out_width:
        raise InputError(
            f"{keys['out_width']} {vision.out_width} must equal hidden_size {out_width}: the"
            " merger's output goes in among the token embeddings"
        )
    if vision.window_size is not None:
        whole(vision.window_size, keys["window_size"])
        if not vision.window:
            raise InputError(
                f"{keys['window_size']} {vision.window_size} holds no cell of"
                f" {vision.spatial_merge_size} patches of {vision.patch_size} pixels a side"
            )
    layers = vision.full_attention_layers
    if not isinstance(layers, tuple) or any(
        isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in layers
    ):
        raise InputError(
            f"{keys['full_attention_layers']} must list whole numbers of at least 0, found"
            f" {list(layers) if isinstance(layers, tuple) else layers!r}"
        )


def _validate_moe(moe: MoEConfig) -> None:
    for ours in ("num_experts", "top_k", "expert_mlp_dim", "shared_mlp_dim"):
        whole(getattr(moe, ours), MOE_KEYS[ours])
    if moe.top_k > moe.num_experts:
        raise InputError(f"num_experts_per_tok {moe.top_k} exceeds num_experts {moe.num_experts}")
    if not isinstance(moe.norm_topk_prob, bool):
        raise InputError(f"norm_topk_prob must be true or false, found {moe.norm_topk_prob!r}")
    coef = moe.router_aux_loss_coef
    if isinstance(coef, bool) or not isinstance(coef, int | float) or coef < 0:
        raise InputError(f"router_aux_loss_coef must be a number of at least 0, found {coef!r}")
