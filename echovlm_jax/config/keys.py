"""The keys of config.json: where a file says what, for each model_type that is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

TEXT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "mlp_dim": "intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
}
MOE_KEYS = {
    "num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "expert_mlp_dim": "moe_intermediate_size",
    "shared_mlp_dim": "shared_expert_intermediate_size",
    "norm_topk_prob": "norm_topk_prob",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
TOKEN_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_pad_token_id",
    "image_token_id",
    "video_token_id",
)


@dataclass(frozen=True)
class Form:
    """How the files of one model_type say a model.

    Attributes:
      model_type: what they are told by.
      architectures: the dense model's class in PyTorch, and that of one with experts.
      kinds: fields of VisionConfig that the model_type says by itself.
      act: what vision_config.hidden_act may be.
      vision: field of VisionConfig → key of vision_config.
      silent_vision: what the released model has where vision_config is silent, by its own keys; the
        width that comes out is the decoder's.
      silent_text: the same of the decoder. Its sizes are not among them: a wrong guess there is no
        mercy.
    """

    model_type: str
    architectures: tuple[str, str]
    kinds: Mapping[str, str]
    act: str
    vision: Mapping[str, str]
    silent_vision: Mapping[str, Any]
    silent_text: Mapping[str, Any]

    @property
    def counts_time(self) -> bool:
        """Whether vision_config has tokens_per_second."""
        return "tokens_per_second" in self.silent_vision


_SAME = ("depth", "num_heads", "patch_size", "temporal_patch_size", "spatial_merge_size")
_SAME_KEYS = {key: key for key in (*_SAME, "in_channels")}
_SAME_SIZES = {
    "depth": 32,
    "num_heads": 16,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "in_channels": 3,
}

# The released vision_config of Qwen2-VL and EchoVLM states almost nothing.
QWEN2_VL = Form(
    model_type="qwen2_vl",
    architectures=("Qwen2VLForConditionalGeneration", "Qwen2VLMOEForConditionalGeneration"),
    kinds=MappingProxyType({"norm": "layer", "mlp": "quick_gelu"}),
    act="quick_gelu",
    vision=MappingProxyType(
        {**_SAME_KEYS, "width": "embed_dim", "out_width": "hidden_size", "mlp_dim": "mlp_ratio"}
    ),
    silent_vision=MappingProxyType({**_SAME_SIZES, "embed_dim": 1280, "mlp_ratio": 4}),
    silent_text=MappingProxyType({"rms_norm_eps": 1e-5, "max_position_embeddings": 32768}),
)
# The class defaults in PyTorch are other sizes than any released model's.
QWEN2_5_VL = Form(
    model_type="qwen2_5_vl",
    architectures=("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLMOEForConditionalGeneration"),
    kinds=MappingProxyType({"norm": "rms", "mlp": "gated"}),
    act="silu",
    vision=MappingProxyType(
        {
            **_SAME_KEYS,
            "width": "hidden_size",
            "out_width": "out_hidden_size",
            "mlp_dim": "intermediate_size",
            "window_size": "window_size",
            "full_attention_layers": "fullatt_block_indexes",
        }
    ),
    silent_vision=MappingProxyType(
        {
            **_SAME_SIZES,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "window_size": 112,
            "fullatt_block_indexes": (7, 15, 23, 31),
            "tokens_per_second": 2,
        }
    ),
    silent_text=MappingProxyType({"rms_norm_eps": 1e-6, "max_position_embeddings": 128000}),
)
FORMS = {form.model_type: form for form in (QWEN2_VL, QWEN2_5_VL)}
# Where vision_config says the MLP's width as a multiple of the tower's.
RATIO = "mlp_ratio"
# The base of the tower's rotary frequencies: newer files state it, older ones take it as known.
THETA = 10000


def form_of(norm: str, mlp: str) -> Form | None:
    """The form that says a vision tower of these kinds; None: no file can."""
    kinds = {"norm": norm, "mlp": mlp}
    return next((form for form in FORMS.values() if form.kinds == kinds), None)
