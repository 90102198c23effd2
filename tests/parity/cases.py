"""Configurations and inputs for the parity tests: small, odd, and unlike one another."""

from __future__ import annotations

import numpy as np

from echovlm_jax.config import ModelConfig, MoEConfig, TextConfig, VisionConfig

TOKENS = {"image": 6, "video": 7}
_IDS = dict(
    bos_token_id=0, eos_token_id=2, vision_start_token_id=3, vision_end_token_id=4,
    vision_pad_token_id=5, image_token_id=6, video_token_id=7,
)  # fmt: skip


def _config(
    *, heads: int, kv: int, dim: int, section: tuple[int, int, int], layers: int = 2,
    moe: MoEConfig | None = None, tied: bool = False, vocab: int = 97, mlp: int = 48,
    vision: tuple[int, int, int, int] = (2, 32, 4, 4),
) -> ModelConfig:  # fmt: skip
    depth, width, vision_heads, ratio = vision
    return ModelConfig(
        text=TextConfig(
            vocab_size=vocab, hidden_size=heads * dim, num_layers=layers, num_heads=heads,
            num_kv_heads=kv, head_dim=dim, mlp_dim=mlp, mrope_section=section,
            tie_word_embeddings=tied,
        ),
        vision=VisionConfig(
            depth=depth, width=width, out_width=heads * dim, num_heads=vision_heads,
            mlp_dim=ratio * width,
        ),
        moe=moe,
        **_IDS,
    )  # fmt: skip


CONFIGS: dict[str, ModelConfig] = {
    "released_shape": _config(
        heads=4, kv=2, dim=16, section=(2, 3, 3),
        moe=MoEConfig(num_experts=4, top_k=2, expert_mlp_dim=24, shared_mlp_dim=40),
    ),
    "many_experts_normalised": _config(
        heads=6, kv=3, dim=8, section=(2, 1, 1), layers=3, vision=(1, 48, 3, 2),
        moe=MoEConfig(
            num_experts=9, top_k=4, expert_mlp_dim=20, shared_mlp_dim=12, norm_topk_prob=True
        ),
    ),
    "one_expert_tied": _config(
        heads=5, kv=1, dim=12, section=(1, 2, 3), tied=True, vocab=131,
        moe=MoEConfig(num_experts=3, top_k=1, expert_mlp_dim=33, shared_mlp_dim=17),
    ),
    "all_experts": _config(
        heads=3, kv=3, dim=20, section=(4, 3, 3), layers=1, vision=(3, 40, 2, 3),
        moe=MoEConfig(num_experts=2, top_k=2, expert_mlp_dim=16, shared_mlp_dim=64),
    ),
    "dense": _config(heads=7, kv=1, dim=8, section=(0, 2, 2), mlp=61),
    "dense_tied": _config(heads=4, kv=4, dim=12, section=(2, 2, 2), tied=True, layers=3),
}  # fmt: skip


def inputs(case: str, config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of one kind: HF-style arrays with labels on the last third of each row."""
    rng = np.random.default_rng(seed)
    image, video = config.image_token_id, config.video_token_id
    grids: dict[int, list[tuple[int, int, int]]] = {image: [], video: []}

    def text(n: int) -> list[int]:
        return rng.integers(8, config.text.vocab_size, n).tolist()

    def vision(token: int, *grid: int) -> list[int]:
        grids[token].append(grid)  # type: ignore[arg-type]
        count = int(np.prod(grid)) // config.vision.merge_unit
        return [config.vision_start_token_id, *[token] * count, config.vision_end_token_id]

    rows = {
        "image": lambda: [text(3) + vision(image, 1, 4, 6) + text(7)],
        "images": lambda: [
            text(2) + vision(image, 1, 2, 4) + vision(image, 1, 6, 4) + text(2)
            + vision(image, 1, 2, 2) + text(5)
        ],
        "video": lambda: [text(4) + vision(video, 5, 4, 2) + text(6)],
        "mixed": lambda: [
            text(2) + vision(video, 2, 2, 4) + text(1) + vision(image, 1, 4, 4) + text(4)
        ],
        "text": lambda: [text(11), text(11)],
        "left": lambda: [
            text(2) + vision(image, 1, 4, 4) + text(6), text(3),
            vision(image, 1, 2, 2) + vision(video, 2, 2, 2) + text(2),
        ],
        "text_left": lambda: [text(9), text(4), text(1)],
    }  # fmt: skip
    rows = rows | {"right": rows["left"]}
    made = rows[case]()
    length = max(map(len, made))
    ids = np.full((len(made), length), 1, np.int64)
    mask = np.zeros_like(ids)
    labels = np.full_like(ids, -100)
    for b, row in enumerate(made):
        at = 0 if case == "right" else length - len(row)
        ids[b, at : at + len(row)] = row
        mask[b, at : at + len(row)] = 1
        tail = max(1, len(row) // 3)
        labels[b, at + len(row) - tail : at + len(row)] = row[-tail:]
    out = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    for token, pixels, grid in (
        (image, "pixel_values", "image_grid_thw"),
        (video, "pixel_values_videos", "video_grid_thw"),
    ):
        if grids[token]:
            patches = sum(int(np.prod(g)) for g in grids[token])
            shape = (patches, config.vision.patch_dim)
            out[pixels] = rng.standard_normal(shape).astype(np.float32)
            out[grid] = np.array(grids[token], np.int64)
    return out
