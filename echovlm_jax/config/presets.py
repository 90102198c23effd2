"""The configurations that have a name."""

from echovlm_jax.config.sizes import ModelConfig, MoEConfig, TextConfig, VisionConfig
from echovlm_jax.errors import InputError

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


def _qwen2_5_vl(
    width: int, mlp: int, layers: int, heads: int, kv_heads: int, vision_mlp: int = 3420
) -> ModelConfig:
    return ModelConfig(
        text=TextConfig(
            vocab_size=152064,
            hidden_size=width,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=128,
            mlp_dim=mlp,
            max_position_embeddings=128000,
        ),
        vision=VisionConfig(
            out_width=width,
            mlp_dim=vision_mlp,
            norm="rms",
            mlp="gated",
            window_size=112,
            full_attention_layers=(7, 15, 23, 31),
        ),
        tokens_per_second=2,
    )


_QWEN2_5_VL_7B = _qwen2_5_vl(3584, 18944, layers=28, heads=28, kv_heads=4)

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
        vision=VisionConfig(out_width=1536),
    ),
    "qwen2_5_vl_3b": _qwen2_5_vl(2048, 11008, layers=36, heads=16, kv_heads=2).replace(
        text={"vocab_size": 151936, "tie_word_embeddings": True}
    ),
    "qwen2_5_vl_7b": _QWEN2_5_VL_7B,
    "qwen2_5_vl_32b": _qwen2_5_vl(5120, 27648, layers=64, heads=40, kv_heads=8, vision_mlp=3456),
    "qwen2_5_vl_72b": _qwen2_5_vl(8192, 29568, layers=80, heads=64, kv_heads=8, vision_mlp=3456),
    # The second EchoVLM: Lingshu-7B, a Qwen2.5-VL, trained further; no experts.
    "echovlm_v2_7b": _QWEN2_5_VL_7B,
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
        vision=VisionConfig(depth=3, width=96, out_width=128, num_heads=4, mlp_dim=384),
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
    vision={"out_width": 96, "mlp_dim": 288},
    moe={"expert_mlp_dim": 64, "shared_mlp_dim": 128},
)
PRESETS["nano_dense"] = PRESETS["nano"].replace(moe=None)
# The tiny decoder behind the second kind of tower: layers in windows of 4 × 4 cells, and in frames.
PRESETS["tiny_v2"] = PRESETS["tiny"].replace(
    vision={
        "depth": 4,
        "mlp_dim": 256,
        "norm": "rms",
        "mlp": "gated",
        "window_size": 112,
        "full_attention_layers": (1, 3),
    },
    moe=None,
    tokens_per_second=2,
)


def preset(name: str) -> ModelConfig:
    """A configuration by name. Raises InputError with the known names for an unknown one."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
