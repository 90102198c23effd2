"""Qwen2.5-VL whole: random models of transformers' own class, saved, converted, compared by stage.

Text behind a video goes on at the largest position + 1, as these models were trained (transformers
up to 4.57, vLLM). transformers 5.24 goes on at start + max(h, w) / 2: the recorder computes the
trained positions by itself and hands them to PyTorch's model.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from echovlm_jax.bench.torch_model import build  # noqa: E402
from echovlm_jax.config import ModelConfig, TextConfig, VisionConfig  # noqa: E402
from echovlm_jax.convert.from_torch import convert  # noqa: E402
from echovlm_jax.convert.parity import parity  # noqa: E402
from tests.golden.make_golden import record  # noqa: E402
from tests.parity.cases import _IDS, TOKENS, inputs_of  # noqa: E402
from tests.parity.torch_echovlm import released_gradients, save  # noqa: E402


def _config(
    *, heads: int, kv: int, dim: int, section: tuple[int, int, int], tower: dict,
    rate: float = 2, layers: int = 2, tied: bool = False,
) -> ModelConfig:  # fmt: skip
    return ModelConfig(
        text=TextConfig(
            vocab_size=97, hidden_size=heads * dim, num_layers=layers, num_heads=heads,
            num_kv_heads=kv, head_dim=dim, mlp_dim=48, mrope_section=section,
            tie_word_embeddings=tied,
        ),
        vision=VisionConfig(out_width=heads * dim, norm="rms", mlp="gated", **tower),
        tokens_per_second=rate,
        **_IDS,
    )  # fmt: skip


CONFIGS = {
    # Windows of 4 × 4 cells, a full layer after each three: two periods, as the released four.
    "released_shape": _config(
        heads=4, kv=2, dim=16, section=(2, 3, 3),
        tower=dict(
            depth=8, width=32, num_heads=2, mlp_dim=45, window_size=112,
            full_attention_layers=(3, 7),
        ),
    ),
    # 2 × 2 cells and something over; full layers in no period, and one past the last.
    "irregular_tied": _config(
        heads=3, kv=1, dim=12, section=(1, 2, 3), layers=3, tied=True, rate=4,
        tower=dict(
            depth=5, width=48, num_heads=3, mlp_dim=20, window_size=60,
            full_attention_layers=(0, 3, 31),
        ),
    ),
    "all_windows": _config(
        heads=2, kv=2, dim=20, section=(4, 3, 3),
        tower=dict(depth=2, width=24, num_heads=2, mlp_dim=64, window_size=56, patch_size=7),
    ),
    "all_full": _config(
        heads=4, kv=4, dim=8, section=(2, 1, 1), layers=1, rate=1,
        tower=dict(
            depth=2, width=40, num_heads=2, mlp_dim=31, window_size=112,
            full_attention_layers=(0, 1),
        ),
    ),
    # A window of one cell: 4 patches see one another.
    "one_cell": _config(
        heads=5, kv=1, dim=8, section=(0, 2, 2), rate=8,
        tower=dict(
            depth=3, width=32, num_heads=4, mlp_dim=50, window_size=8, patch_size=4,
            full_attention_layers=(1,),
        ),
    ),
}  # fmt: skip

_MIXED = [
    [2, ("image", 1, 10, 18), 6],
    [3],
    [("image", 1, 2, 2), 1, ("video", 3, 6, 10, 1.0), 5],
]
CASES = {
    "exact": [[3, ("image", 1, 16, 8), 7]],
    "edges": [[3, ("image", 1, 10, 18), 4]],  # one cell over, both ways
    "smaller": [[1, ("image", 1, 2, 4), 3]],  # than a window
    "several": [
        [2, ("image", 1, 10, 2), ("image", 1, 8, 8), 2, ("image", 1, 6, 20), ("image", 1, 2, 2), 5]
    ],
    **{
        f"video_{fps:g}": [[2, ("video", 7, 4, 10, 2 / fps), 3, ("image", 1, 8, 6), 4]]
        for fps in (1, 2, 24, 29.97)
    },
    "two_videos": [[2, ("video", 2, 12, 6, 2 / 24), 1, ("video", 9, 2, 2, 0.7), 8]],
    "left": _MIXED,
    "right": _MIXED,
    "text": [[11], [11]],
}
# Every configuration and every case once; the whole product is slow.
FAST = {
    ("released_shape", "edges"),
    ("released_shape", "right"),
    ("irregular_tied", "several"),
    ("irregular_tied", "video_29.97"),
    ("all_windows", "left"),
    ("all_full", "video_1"),
    ("one_cell", "two_videos"),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """config name → (torch model, folder of the converted checkpoint), each made once."""
    made = {}

    def make(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            model = build(CONFIGS[name], seed=len(name))
            with torch.no_grad():  # never the likeliest: an answer has no marks of images
                model.get_output_embeddings().weight[list(TOKENS.values())] = 0
            convert(save(model, CONFIGS[name], root / "torch"), root / "jax")
            made[name] = model, root / "jax"
        return made[name]

    return make


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(n, c, marks=() if (n, c) in FAST else pytest.mark.slow)
        for n in CONFIGS
        for c in CASES
    ],
)
def test_parity(name, case, converted, tmp_path):
    model, folder = converted(name)
    config = CONFIGS[name]
    given = inputs_of(CASES[case], config, seed=len(case), left=case != "right")
    golden = record(
        model,
        given,
        tokens=TOKENS,
        tokens_per_second=config.tokens_per_second,
        gradients=released_gradients,
    )
    np.savez(tmp_path / "golden.npz", **golden)
    report = parity(folder, tmp_path / "golden.npz", atol=1e-4)
    assert report["ok"], report["first_divergence"]
    names = [stage["name"] for stage in report["stages"]]
    assert {"position_ids", "logits", "loss", f"hidden_states/{config.text.num_layers}"} <= {*names}
    assert ("image_embeds" in names) == ("image_grid_thw" in given)
    assert ("video_embeds" in names) == ("video_grid_thw" in given)
    assert report["logits"]["max_abs_err"] < 1e-4
    assert report["logits"]["top1_agreement"] == 1.0
    assert report["generated_match"] is True and golden["generated_ids"].shape[1] == 24
    assert report["grad_norm_max_rel_err"] < 1e-3
