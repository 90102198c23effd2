"""Whole models: random torch models saved to disk, converted, and compared stage by stage."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from echovlm_jax.bench.torch_model import build  # noqa: E402
from echovlm_jax.convert.from_torch import convert  # noqa: E402
from echovlm_jax.convert.parity import Report, parity  # noqa: E402
from echovlm_jax.errors import InputError  # noqa: E402
from tests.golden.make_golden import record  # noqa: E402
from tests.parity.cases import CONFIGS, TOKENS, inputs  # noqa: E402
from tests.parity.torch_echovlm import released_gradients, save  # noqa: E402

CASES = ("image", "images", "video", "mixed", "text", "text_left", "left", "right")
# Every configuration and almost every kind of input; the whole product is slow.
FAST = {
    ("released_shape", "left"),
    ("released_shape", "right"),
    ("many_experts_normalised", "text_left"),
    ("one_expert_tied", "image"),
    ("all_experts", "mixed"),
    ("dense", "video"),
    ("dense_tied", "images"),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """config name → (torch model, folder of the converted checkpoint), each made once."""
    made = {}

    def make(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            model = build(CONFIGS[name], seed=len(name))
            source = save(model, CONFIGS[name], root / "torch")
            convert(source, root / "jax")
            made[name] = model, root / "jax"
        return made[name]

    return make


def write_golden(path, model, config, case, **changes):
    golden = record(
        model,
        inputs(case, config, seed=len(case)),
        tokens=TOKENS,
        top_k=config.moe and config.moe.top_k,
        gradients=released_gradients,
    )
    np.savez(path, **(golden | changes))
    return path


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
    golden = write_golden(tmp_path / "golden.npz", model, config, case)
    report = parity(folder, golden, atol=1e-4)
    assert report["ok"], report["first_divergence"]
    assert report["first_divergence"] is None
    names = [stage["name"] for stage in report["stages"]]
    assert "position_ids" in names and "logits" in names and "loss" in names
    assert f"hidden_states/{config.text.num_layers}" in names
    assert ("image_embeds" in names) == ("image_grid_thw" in inputs(case, config))
    assert ("video_embeds" in names) == ("video_grid_thw" in inputs(case, config))
    assert report["logits"]["max_abs_err"] < 1e-4
    assert report["logits"]["kl"] < 1e-6
    assert report["logits"]["top1_agreement"] == 1.0
    assert report["generated_match"] is True
    assert report["grad_norm_max_rel_err"] < 1e-3
    if config.moe is not None:
        assert report["router_agreement"] == 1.0
        assert report["aux_loss_err"] < 1e-5


@pytest.mark.slow
def test_a_changed_weight_is_named(converted, tmp_path):
    """One value of layer 1 off: the stages before it hold, the first after it is named."""
    model, _ = converted("released_shape")
    config = CONFIGS["released_shape"]
    golden = write_golden(tmp_path / "golden.npz", model, config, "image")
    weight = model.model.language_model.layers[1].mlp.moe.gate.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[2] += 0.5
        folder = save(model, config, tmp_path / "other")
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    report = parity(folder, golden)
    assert not report["ok"]
    assert report["first_divergence"] == "router_logits/1"


def test_wrong_generated_tokens_and_gradients_are_seen(converted, tmp_path):
    model, folder = converted("dense")
    config = CONFIGS["dense"]
    path = write_golden(tmp_path / "golden.npz", model, config, "image")
    with np.load(path) as file:
        golden = dict(file)
    golden["generated_ids"][0, -1] += 1
    golden["grad_norm/model.norm.weight"] *= 1.01
    np.savez(path, **golden)
    report = parity(folder, path)
    assert report["generated_match"] is False
    assert report["grad_norm_max_rel_err"] == pytest.approx(0.01, rel=0.1)
    assert not report["ok"]
    assert report["first_divergence"] == "grad_norm/model.norm.weight"


def test_layer_by_layer_equals_whole(converted, tmp_path):
    """The streamed comparison, which holds one layer at a time, reports the same stages."""
    model, folder = converted("many_experts_normalised")
    golden = write_golden(
        tmp_path / "golden.npz", model, CONFIGS["many_experts_normalised"], "left"
    )
    whole, streamed = parity(folder, golden), parity(folder, golden, stream=True)
    assert streamed["ok"] and streamed["generated_match"] is True
    assert streamed["router_agreement"] == 1.0
    assert streamed["grad_norm_max_rel_err"] is None
    theirs = {s["name"] for s in whole["stages"] if not s["name"].startswith("grad_norm")}
    assert {s["name"] for s in streamed["stages"]} == theirs


def test_streamed_parity_sees_a_wrong_token(converted, tmp_path):
    model, folder = converted("dense")
    path = write_golden(tmp_path / "golden.npz", model, CONFIGS["dense"], "left")
    with np.load(path) as file:
        golden = dict(file)
    golden["generated_ids"][1, 5] += 1
    np.savez(path, **golden)
    assert parity(folder, path, stream=True)["generated_match"] is False


def test_golden_must_be_a_golden(converted, tmp_path):
    _, folder = converted("dense")
    text = tmp_path / "text.npz"
    text.write_text("not a zip")
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, input_ids=np.array([{"a": 1}], dtype=object))
    partial = tmp_path / "partial.npz"
    np.savez(partial, input_ids=np.zeros((1, 3), np.int64))
    for path, said in (
        (tmp_path / "none.npz", "no such golden file"),
        (text, "not a readable .npz"),
        (pickled, "not a readable .npz"),
        (partial, "attention_mask is missing"),
    ):
        with pytest.raises(InputError, match=said) as error:
            parity(folder, path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)


def test_golden_of_another_model_is_refused(converted, tmp_path):
    model, _ = converted("released_shape")
    _, other = converted("all_experts")
    path = write_golden(tmp_path / "golden.npz", model, CONFIGS["released_shape"], "text")
    with pytest.raises(InputError, match="was it recorded from this checkpoint"):
        parity(other, path)


@pytest.fixture(scope="module")
def dense_golden(converted, tmp_path_factory):
    model, folder = converted("dense")
    path = write_golden(tmp_path_factory.mktemp("g") / "g.npz", model, CONFIGS["dense"], "left")
    with np.load(path) as file:
        return folder, dict(file)


INPUT_KEYS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
INPUT_KEYS += ("pixel_values_videos", "video_grid_thw")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"logits": None, "*": None}, "records nothing to compare"),
        ({"logit": np.zeros((3, 4))}, "key logit is unknown"),
        ({"hidden_states.npy": np.zeros(3)}, "is unknown"),
        ({"attention_mask": 0}, "attention_mask must be 0 and 1"),
        ({"attention_mask": 2}, "attention_mask must be 0 and 1"),
        ({"logits": np.zeros((3, 0, 5))}, "holds no values"),
        ({"logits": np.zeros((3, 2, 97))}, "logits has shape"),
        ({"logits": np.full((1,), "x")}, "logits holds <U1"),
        ({"hidden_states": np.zeros((9, 3, 15, 56))}, "hidden_states has shape"),
        ({"router_logits": np.zeros((2, 45, 4))}, "recorded of experts"),
        ({"generated_ids": np.zeros((3, 4), np.float32)}, "generated_ids holds float32"),
        ({"generated_ids": np.zeros((1, 4), np.int64)}, "generated_ids has shape"),
        ({"labels": None}, "labels is missing"),
        ({"labels": -100}, "labels count no token"),
        ({"labels": 10**6}, "labels holds ids outside"),
        ({"input_ids": -1}, "input_ids holds ids outside"),
        ({"loss": np.zeros(2)}, "loss. has shape|loss has shape"),
        ({"video_grid_thw": None, "pixel_values_videos": None}, "no input video_grid_thw"),
    ],
)
def test_a_golden_that_compares_nothing_is_refused(change, said, dense_golden, tmp_path):
    folder, golden = dense_golden
    changed = {k: v for k, v in golden.items() if "*" not in change or k in INPUT_KEYS}
    for key, value in change.items():
        if value is None:
            changed.pop(key, None)
        elif isinstance(value, int):
            changed[key] = np.full_like(golden[key], value)
        else:
            changed[key] = value
    np.savez(tmp_path / "golden.npz", **changed)
    with pytest.raises(InputError, match=said) as error:
        parity(folder, tmp_path / "golden.npz")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_no_number_never_passes(dense_golden, tmp_path):
    folder, golden = dense_golden
    values = {"logits": np.nan, "hidden_states": np.inf, "loss": np.nan, "image_embeds": np.nan}
    changed = {k: golden[k] for k in (*INPUT_KEYS, "labels")}
    changed |= {k: np.full_like(golden[k], value) for k, value in values.items()}
    np.savez(tmp_path / "golden.npz", **changed)
    report = parity(folder, tmp_path / "golden.npz")
    assert report["ok"] is False and len(report["stages"]) == 4 + CONFIGS["dense"].text.num_layers
    assert not any(stage["ok"] for stage in report["stages"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_number_of_ours_passes(bad):
    report = Report(1e-4)
    for ours, theirs in (([1.0, bad], [1.0, 2.0]), ([1.0, 2.0], [1.0, bad]), ([bad], [bad])):
        assert report.add("stage", np.array(ours), np.array(theirs)) is None
    assert not any(stage["ok"] for stage in report.stages)
