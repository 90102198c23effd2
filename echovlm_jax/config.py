"""Model configuration: frozen dataclasses, presets, and Hugging Face's config.json both ways.

Nothing here knows a model by its name. Whether a decoder has a mixture of experts is told by the
presence of the expert keys, whether its embeddings are tied by `tie_word_embeddings`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from echovlm_jax.errors import InputError


@dataclass(frozen=True)
class VisionConfig:
    """The Qwen2-VL vision transformer and its merger; `hidden_size` is what the merger puts out."""

    depth: int = 32
    embed_dim: int = 1280
    hidden_size: int = 3584
    num_heads: int = 16
    mlp_ratio: float = 4
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)

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


# The key of config.json that a field of ours comes from: what an error has to name.
_VISION_KEYS = tuple(field.name for field in dataclasses.fields(VisionConfig))
_TEXT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "mlp_dim": "intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
}
_MOE_KEYS = {
    "num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "expert_mlp_dim": "moe_intermediate_size",
    "shared_mlp_dim": "shared_expert_intermediate_size",
    "norm_topk_prob": "norm_topk_prob",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
_TOKEN_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_pad_token_id",
    "image_token_id",
    "video_token_id",
)
# Qwen2-VL's own defaults where a config.json may be silent (the released vision_config states
# almost nothing). Sizes of the decoder are not among them: a wrong guess there is no mercy.
_TEXT_DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 32768}
_MOE_DEFAULTS = {"norm_topk_prob": False, "router_aux_loss_coef": 0.001}


def from_hf(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads the content of a Hugging Face config.json.

    Accepts the flat form (released checkpoints) and the nested `text_config` form (newer
    exporters); of a key in both, text_config's value counts, unless it is null. The rope type is
    not believed: `default` and `mrope` both mean M-RoPE wherever `mrope_section` is given, as in
    the released file.

    Args:
      raw: the parsed JSON object.
      source: what to call it in errors.

    Raises:
      InputError: a needed key is missing or a value is invalid; the message names the key.
    """
    try:
        return _from_hf(raw)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    if not isinstance(raw, Mapping):
        raise InputError(f"expected a JSON object, found {type(raw).__name__}")
    raw = _said(raw)
    nested = _said(_mapping(raw, "text_config", {}))
    text = {**raw, **nested}
    _refuse_unsupported(text)
    fields = {
        ours: _take(text, theirs, _TEXT_DEFAULTS.get(ours)) for ours, theirs in _TEXT_KEYS.items()
    }
    heads = _whole(fields["num_heads"], "num_attention_heads")
    hidden = _whole(fields["hidden_size"], "hidden_size")
    head_dim = text.get("head_dim")
    if head_dim is None:
        if hidden % heads:
            raise InputError(
                f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
            )
        head_dim = hidden // heads
    rope: dict[str, Any] = {}
    for part in (raw, nested):
        for key in ("rope_scaling", "rope_parameters"):
            rope |= _said(_mapping(part, key, {}))
    if "mrope_section" not in rope:
        raise InputError("rope_scaling.mrope_section is missing; Qwen2-VL files say [16, 24, 24]")
    section = rope["mrope_section"]
    if not isinstance(section, list | tuple):
        raise InputError(f"rope_scaling.mrope_section must be a list, found {section!r}")
    for key in ("type", "rope_type"):
        if rope.get(key, "default") not in ("default", "mrope"):
            raise InputError(
                f"rope_scaling.{key} {rope[key]!r} is not supported; Qwen2-VL says mrope or default"
            )
    theta = rope.get("rope_theta", text.get("rope_theta", 1e6))
    tied = bool(raw.get("tie_word_embeddings", nested.get("tie_word_embeddings", False)))
    vision = _said(_mapping(raw, "vision_config", {}))
    act = vision.get("hidden_act", "quick_gelu")
    if act != "quick_gelu":
        raise InputError(
            f"vision_config.hidden_act {act!r} is not supported; Qwen2-VL says quick_gelu"
        )
    if "in_chans" in vision and "in_channels" not in vision:
        vision = {**vision, "in_channels": vision["in_chans"]}
    return ModelConfig(
        text=TextConfig(
            **fields,
            head_dim=head_dim,
            rope_theta=theta,
            mrope_section=tuple(section),
            tie_word_embeddings=tied,
        ),
        vision=VisionConfig(**{k: vision[k] for k in _VISION_KEYS if k in vision}),
        moe=_moe_from_hf(text),
        **{key: _token_id(text[key]) for key in _TOKEN_KEYS if key in text},
    )


def _moe_from_hf(text: Mapping[str, Any]) -> MoEConfig | None:
    if text.get("num_experts", 0) == 0:
        return None
    return MoEConfig(
        **{ours: _take(text, theirs, _MOE_DEFAULTS.get(ours)) for ours, theirs in _MOE_KEYS.items()}
    )


def to_hf(config: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """The config.json (flat form) that PyTorch programs and `from_hf` read back to `config`."""
    text, vision, moe = config.text, config.vision, config.moe
    name = (
        "Qwen2VLForConditionalGeneration" if moe is None else "Qwen2VLMOEForConditionalGeneration"
    )
    out: dict[str, Any] = {"architectures": [name], "model_type": "qwen2_vl"}
    out |= {key: getattr(config, key) for key in _TOKEN_KEYS}
    out |= {theirs: getattr(text, ours) for ours, theirs in _TEXT_KEYS.items()}
    if text.head_dim * text.num_heads != text.hidden_size:
        out["head_dim"] = text.head_dim
    out |= {
        "hidden_act": "silu",
        "rope_theta": text.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_section)},
        "tie_word_embeddings": text.tie_word_embeddings,
        "use_sliding_window": False,
        "torch_dtype": dtype,
    }
    if moe is not None:
        out |= {theirs: getattr(moe, ours) for ours, theirs in _MOE_KEYS.items()}
    out["vision_config"] = {
        "model_type": "qwen2_vl",
        **dataclasses.asdict(vision),
    }
    return out


def _said(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says: a null says nothing, here as anywhere, and hides no value elsewhere."""
    return {key: value for key, value in raw.items() if value is not None}


def _mapping(raw: Mapping[str, Any], key: str, default: Any) -> Any:
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, Mapping):
        raise InputError(f"{key} must be an object, found {value!r}")
    return value


def _take(raw: Mapping[str, Any], key: str, default: Any) -> Any:
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise InputError(f"key {key} is missing; a Qwen2-VL config.json states it")
    return value


def _token_id(value: Any) -> Any:
    """Some files list several end tokens; the first is the model's own."""
    return value[0] if isinstance(value, list) and value else value


def _refuse_unsupported(text: Mapping[str, Any]) -> None:
    if text.get("use_sliding_window"):
        raise InputError("use_sliding_window true is not supported; Qwen2-VL says false")
    if text.get("hidden_act", "silu") != "silu":
        raise InputError(f"hidden_act {text['hidden_act']!r} is not supported; Qwen2-VL says silu")


def _whole(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{key} must be a whole number of at least 1, found {value!r}")
    return value


def _number(value: Any, key: str) -> float:
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
    for ours in (
        "depth",
        "embed_dim",
        "hidden_size",
        "num_heads",
        "patch_size",
        "temporal_patch_size",
        "spatial_merge_size",
        "in_channels",
    ):
        _whole(getattr(vision, ours), f"vision_config.{ours}")
    _number(vision.mlp_ratio, "vision_config.mlp_ratio")
    for ours, theirs in _TEXT_KEYS.items():
        check: Callable[[Any, str], float] = _number if ours == "rms_norm_eps" else _whole
        check(getattr(text, ours), theirs)
    _whole(text.head_dim, "head_dim")
    _number(text.rope_theta, "rope_theta")
    if vision.embed_dim % vision.num_heads or vision.head_dim % 4:
        raise InputError(
            f"vision_config.embed_dim {vision.embed_dim} over num_heads {vision.num_heads} must be"
            " a multiple of 4 (2-D rotary positions)"
        )
    if vision.hidden_size != text.hidden_size:
        raise InputError(
            f"vision_config.hidden_size {vision.hidden_size} must equal hidden_size"
            f" {text.hidden_size}: the merger's output goes in among the token embeddings"
        )
    if text.num_heads % text.num_kv_heads:
        raise InputError(
            f"num_attention_heads {text.num_heads} is not a multiple of num_key_value_heads"
            f" {text.num_kv_heads}"
        )
    sections = text.mrope_section
    whole = [isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in sections]
    if len(sections) != 3 or not all(whole) or 2 * sum(sections) != text.head_dim:
        raise InputError(
            f"rope_scaling.mrope_section {list(sections)} must be three whole numbers that sum to"
            f" half the head size, {text.head_dim // 2}"
        )
    if moe is not None:
        _validate_moe(moe)
    for key in _TOKEN_KEYS:
        value = getattr(config, key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise InputError(f"{key} must be a whole number below 2**31, found {value!r}")
    for key in ("image_token_id", "video_token_id", "vision_start_token_id"):
        if getattr(config, key) >= text.vocab_size:
            raise InputError(
                f"{key} {getattr(config, key)} lies outside vocab_size {text.vocab_size}"
            )


def _validate_moe(moe: MoEConfig) -> None:
    for ours in ("num_experts", "top_k", "expert_mlp_dim", "shared_mlp_dim"):
        _whole(getattr(moe, ours), _MOE_KEYS[ours])
    if moe.top_k > moe.num_experts:
        raise InputError(f"num_experts_per_tok {moe.top_k} exceeds num_experts {moe.num_experts}")
    if not isinstance(moe.norm_topk_prob, bool):
        raise InputError(f"norm_topk_prob must be true or false, found {moe.norm_topk_prob!r}")
    coef = moe.router_aux_loss_coef
    if isinstance(coef, bool) or not isinstance(coef, int | float) or coef < 0:
        raise InputError(f"router_aux_loss_coef must be a number of at least 0, found {coef!r}")


_QWEN2_VL_7B = ModelConfig(
    text=TextConfig(
        vocab_size=152064,
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        mlp_dim=18944,
    ),
)

PRESETS: dict[str, ModelConfig] = {
    # The released EchoVLM: Qwen2-VL-7B with 4 experts, top-2, and a shared expert in every layer.
    "echovlm_11b": _QWEN2_VL_7B.replace(moe=MoEConfig()),
    "qwen2_vl_7b": _QWEN2_VL_7B,
    "qwen2_vl_2b": ModelConfig(
        text=TextConfig(
            vocab_size=151936,
            hidden_size=1536,
            num_layers=28,
            num_heads=12,
            num_kv_heads=2,
            head_dim=128,
            mlp_dim=8960,
            tie_word_embeddings=True,
        ),
        vision=VisionConfig(hidden_size=1536),
    ),
    # Small enough for a laptop's CPU, with every mechanism of the large one alive.
    "tiny": ModelConfig(
        text=TextConfig(
            vocab_size=2048,
            hidden_size=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            mlp_dim=384,
            mrope_section=(4, 6, 6),
            max_position_embeddings=4096,
        ),
        vision=VisionConfig(depth=3, embed_dim=96, hidden_size=128, num_heads=4, mlp_ratio=4),
        moe=MoEConfig(num_experts=4, top_k=2, expert_mlp_dim=96, shared_mlp_dim=192),
        bos_token_id=0,
        eos_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
        vision_pad_token_id=5,
        image_token_id=6,
        video_token_id=7,
    ),
}

# Smaller still: learns the phantom's reports in minutes on two cores.
PRESETS["nano"] = PRESETS["tiny"].replace(
    text={
        "hidden_size": 96,
        "num_layers": 2,
        "num_heads": 3,
        "num_kv_heads": 1,
        "mlp_dim": 256,
    },
    vision={"hidden_size": 96, "mlp_ratio": 3},
    moe={"expert_mlp_dim": 64, "shared_mlp_dim": 128},
)
PRESETS["nano_dense"] = PRESETS["nano"].replace(moe=None)


def preset(name: str) -> ModelConfig:
    """A configuration by name. Raises InputError with the known names for an unknown one."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
