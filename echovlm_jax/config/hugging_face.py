"""Hugging Face's config.json, read and written.

Whether a decoder has a mixture of experts is told by the presence of the expert keys, whether its
embeddings are tied by `tie_word_embeddings`; `model_type` tells which keys a file has, and what it
means where it is silent (`keys.Form`).
"""

from collections.abc import Mapping
from typing import Any

from echovlm_jax.config.keys import (
    FORMS,
    MOE_KEYS,
    QWEN2_VL,
    RATIO,
    TEXT_KEYS,
    THETA,
    TOKEN_KEYS,
    Form,
    form_of,
)
from echovlm_jax.config.sizes import (
    ModelConfig,
    MoEConfig,
    TextConfig,
    VisionConfig,
    number,
    whole,
)
from echovlm_jax.errors import InputError

_MOE_DEFAULTS = {"norm_topk_prob": False, "router_aux_loss_coef": 0.001}


def from_hf(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads the content of a Hugging Face config.json.

    Accepts the flat form (released checkpoints), the nested `text_config` form (newer exporters)
    and files that have both; of a key in both, text_config's value counts, unless it is null. The
    rope type is not believed: `default` and `mrope` both mean M-RoPE wherever `mrope_section` is
    given, as in the released files.

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
    form = _form(raw)
    _refuse_unsupported(text)
    fields = {
        ours: _take(text, theirs, form.silent_text.get(ours)) for ours, theirs in TEXT_KEYS.items()
    }
    heads = whole(fields["num_heads"], "num_attention_heads")
    hidden = whole(fields["hidden_size"], "hidden_size")
    head_dim = text.get("head_dim")
    if head_dim is None:
        if hidden % heads:
            raise InputError(
                f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
            )
        head_dim = hidden // heads
    section, theta = _rope(raw, nested)
    vision = _said(_mapping(raw, "vision_config", {}))
    return ModelConfig(
        text=TextConfig(
            **fields,
            head_dim=head_dim,
            rope_theta=theta,
            mrope_section=section,
            # Some files say it at the root, some inside; what is written nowhere is false.
            tie_word_embeddings=any(bool(x.get("tie_word_embeddings")) for x in (raw, nested)),
        ),
        vision=_vision_from_hf(vision, form, hidden),
        moe=_moe_from_hf(text),
        tokens_per_second={**form.silent_vision, **vision}["tokens_per_second"]
        if form.counts_time
        else None,
        **{key: _token_id(text[key]) for key in TOKEN_KEYS if key in text},
    )


def _form(raw: Mapping[str, Any]) -> Form:
    kind = raw.get("model_type", QWEN2_VL.model_type)
    if not isinstance(kind, str) or kind not in FORMS:
        raise InputError(f"model_type {kind!r} is not supported; known are {', '.join(FORMS)}")
    return FORMS[kind]


def _rope(raw: Mapping[str, Any], nested: Mapping[str, Any]) -> tuple[Any, Any]:
    """(mrope_section, rope_theta)."""
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
    theta = {**raw, **nested}.get("rope_theta", 1e6)
    return tuple(section), rope.get("rope_theta", theta)


def _vision_from_hf(raw: Mapping[str, Any], form: Form, out_width: int) -> VisionConfig:
    """The tower; where a file is silent, the released one, whose tokens the decoder takes."""
    if (act := raw.get("hidden_act", form.act)) != form.act:
        raise InputError(
            f"vision_config.hidden_act {act!r} is not supported; {form.model_type} says {form.act}"
        )
    theta = _said(_mapping(raw, "rope_parameters", {})).get("rope_theta", THETA)
    if theta != THETA:
        raise InputError(
            f"vision_config.rope_parameters.rope_theta {theta!r} is not supported;"
            f" {form.model_type} says {THETA}"
        )
    if "in_chans" in raw and "in_channels" not in raw:
        raw = {**raw, "in_channels": raw["in_chans"]}
    raw = {**form.silent_vision, form.vision["out_width"]: out_width, **raw}
    fields = {ours: raw[theirs] for ours, theirs in form.vision.items()}
    if form.vision["mlp_dim"] == RATIO:
        width = whole(fields["width"], f"vision_config.{form.vision['width']}")
        fields["mlp_dim"] = int(width * number(fields["mlp_dim"], f"vision_config.{RATIO}"))
    if isinstance(layers := fields.get("full_attention_layers"), list):
        fields["full_attention_layers"] = tuple(layers)
    return VisionConfig(**form.kinds, **fields)


def _moe_from_hf(text: Mapping[str, Any]) -> MoEConfig | None:
    if text.get("num_experts", 0) == 0:
        return None
    return MoEConfig(
        **{ours: _take(text, theirs, _MOE_DEFAULTS.get(ours)) for ours, theirs in MOE_KEYS.items()}
    )


def to_hf(config: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """The config.json (flat form) that PyTorch programs and `from_hf` read back to `config`.

    Raises:
      InputError: a model that no model_type describes.
    """
    text, vision, moe = config.text, config.vision, config.moe
    form = form_of(vision.norm, vision.mlp)
    if form is None:
        raise _no_file(config)
    out: dict[str, Any] = {"architectures": [form.architectures[moe is not None]]}
    out["model_type"] = form.model_type
    out |= {key: getattr(config, key) for key in TOKEN_KEYS}
    out |= {theirs: getattr(text, ours) for ours, theirs in TEXT_KEYS.items()}
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
        out |= {theirs: getattr(moe, ours) for ours, theirs in MOE_KEYS.items()}
    out["vision_config"] = _vision_to_hf(vision, form)
    if form.counts_time:
        out["vision_config"]["tokens_per_second"] = config.tokens_per_second
    if from_hf(out) != config:  # such as windows in a model_type that has no key for them
        raise _no_file(config)
    return out


def _no_file(config: ModelConfig) -> InputError:
    vision = config.vision
    return InputError(
        f"no model_type of {', '.join(FORMS)} has vision norm {vision.norm}, mlp {vision.mlp},"
        f" window_size {vision.window_size} and tokens_per_second {config.tokens_per_second}: there"
        " is no config.json for this model"
    )


def _vision_to_hf(vision: VisionConfig, form: Form) -> dict[str, Any]:
    out: dict[str, Any] = {"model_type": form.model_type, "hidden_act": form.act}
    out |= {theirs: getattr(vision, ours) for ours, theirs in form.vision.items()}
    if RATIO in out:
        whole_ratio, rest = divmod(vision.mlp_dim, vision.width)
        # A ratio that isn't whole is a little more than its quotient, which may be rounded down.
        out[RATIO] = whole_ratio if not rest else (vision.mlp_dim + 0.5) / vision.width
    out.update((key, list(value)) for key, value in out.items() if isinstance(value, tuple))
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
