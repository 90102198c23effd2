"""Configurations: the released file's gaps, both forms of config.json, and refusals by key."""

import math

import jax
import pytest

from echovlm_jax.config import PRESETS, ModelConfig, from_hf, preset, to_hf
from echovlm_jax.errors import InputError
from echovlm_jax.model import abstract_params


def released() -> dict:
    """The released EchoVLM's config.json as it is: an empty vision_config, a misnamed rope type."""
    return {
        "architectures": ["Qwen2VLMOEForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "vocab_size": 152064,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
        "vision_config": {"in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14},
    }


def test_the_released_file_is_the_preset():
    assert from_hf(released()) == preset("echovlm_11b")


def test_without_expert_keys_it_is_qwen2_vl():
    raw = {k: v for k, v in released().items() if "expert" not in k and "moe" not in k}
    assert from_hf(raw) == preset("qwen2_vl_7b")


def test_the_nested_form_of_newer_exporters():
    raw = released()
    top = {k: raw.pop(k) for k in ("architectures", "model_type", "vision_config")}
    ids = {k: raw.pop(k) for k in list(raw) if k.startswith(("vision_", "image_", "video_"))}
    raw["rope_parameters"] = raw.pop("rope_scaling") | {"rope_theta": raw.pop("rope_theta")}
    raw["eos_token_id"] = [151645, 151643]
    assert from_hf(top | ids | {"text_config": raw}) == preset("echovlm_11b")


@pytest.mark.parametrize("name", PRESETS)
def test_there_and_back(name):
    assert from_hf(to_hf(preset(name))) == preset(name)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Counts of the published checkpoints.
    [
        ("echovlm_11b", 11_683_172_920),
        ("qwen2_vl_7b", 8_291_375_616),
        ("qwen2_vl_2b", 2_208_985_600),
        ("echovlm_v2_7b", 8_292_166_656),
        ("qwen2_5_vl_3b", 3_754_622_976),
        ("qwen2_5_vl_7b", 8_292_166_656),
        # The towers of these two have MLPs of 3456.
        ("qwen2_5_vl_32b", 33_452_718_336),
        ("qwen2_5_vl_72b", 73_410_777_344),
    ],
)
def test_full_size_parameter_counts(name, parameters):
    leaves = jax.tree.leaves(abstract_params(preset(name)))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"vocab_size": 0}, "vocab_size must be a whole number"),
        ({"vocab_size": True}, "vocab_size must be a whole number"),
        ({"num_attention_heads": "28"}, "num_attention_heads must be a whole number"),
        ({"num_attention_heads": 27}, "num_attention_heads 27"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a number"),
        ({"rope_theta": "x"}, "rope_theta must be a number"),
        ({"rope_scaling": None}, "mrope_section is missing"),
        ({"rope_scaling": {"mrope_section": [16, 24]}}, "mrope_section"),
        ({"rope_scaling": {"mrope_section": [16, 24, 25]}}, "mrope_section"),
        ({"rope_scaling": {"mrope_section": 64}}, "mrope_section must be a list"),
        ({"rope_scaling": "mrope"}, "rope_scaling must be an object"),
        ({"vision_config": {"hidden_size": 1536}}, "vision_config.hidden_size 1536"),
        ({"vision_config": {"depth": 0}}, "vision_config.depth"),
        ({"vision_config": {"num_heads": 3}}, "vision_config.embed_dim"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 exceeds num_experts 4"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ({"norm_topk_prob": "no"}, "norm_topk_prob must be true or false"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef"),
        ({"image_token_id": 200000}, "image_token_id 200000 lies outside vocab_size"),
        ({"eos_token_id": "x"}, "eos_token_id must be a whole number"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"vision_config": {"hidden_act": "silu"}}, "vision_config.hidden_act"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24]}}, "type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear", "mrope_section": [16, 24, 24]}}, "rope_type"),
    ],
)
def test_an_invalid_value_is_refused_by_key(change, said):
    with pytest.raises(InputError) as error:
        from_hf({**released(), **change}, source="folder/config.json")
    assert said in str(error.value)
    assert str(error.value).startswith("folder/config.json: ")
    assert "\n" not in str(error.value)


def test_what_is_not_an_object_is_refused():
    with pytest.raises(InputError, match="expected a JSON object, found list"):
        from_hf([])  # type: ignore[arg-type]


def test_an_unknown_preset_names_the_known():
    with pytest.raises(InputError, match="echovlm_11b"):
        preset("echovlm_12b")


def test_replace_reaches_into_parts():
    small = preset("echovlm_11b").replace(text={"num_layers": 2}, moe=None)
    assert isinstance(small, ModelConfig)
    assert small.text.num_layers == 2 and small.text.hidden_size == 3584 and small.moe is None
    with pytest.raises(InputError, match="num_hidden_layers"):
        small.replace(text={"num_layers": -1})


ROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}


@pytest.mark.parametrize(
    "nested",
    [
        {"rope_scaling": None, "image_token_id": None, "eos_token_id": None, "head_dim": None},
        {"rope_parameters": None, "num_experts": None, "hidden_act": None, "rope_theta": None},
        dict.fromkeys(released()),
        {"rope_parameters": {"rope_type": "default", "mrope_section": None, "rope_theta": None}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        None,
    ],
)
def test_a_null_hides_nothing(nested):
    """Not in text_config, not in rope_parameters, not in vision_config."""
    vision = released()["vision_config"] | dict.fromkeys(("hidden_act", "depth", "in_channels"))
    nulls = dict.fromkeys(("rope_parameters", "hidden_act", "use_sliding_window", "head_dim"))
    raw = {**nulls, **released(), "vision_config": vision, "text_config": nested}
    assert from_hf(raw) == preset("echovlm_11b")


def test_what_text_config_says_counts_before_the_root():
    raw = {**released(), "text_config": {"image_token_id": 7, "num_hidden_layers": 3}}
    assert from_hf(raw).image_token_id == 7 and from_hf(raw).text.num_layers == 3


def test_no_experts_are_a_dense_model():
    assert from_hf({**released(), "num_experts": 0}) == preset("qwen2_vl_7b")


def lingshu() -> dict:
    """The config.json of a Qwen2.5-VL-7B as released files have it: flat, vision_config in full."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 128000,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 152064,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }


def both_ways(raw: dict) -> dict:
    """4.52 to 4.57: flat, and text_config beside it, with nulls of its own."""
    text = {key: value for key, value in raw.items() if key not in ("vision_config", "model_type")}
    nulls = dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id"))
    text |= {"model_type": "qwen2_5_vl_text", "layer_types": ["full_attention"] * 28, **nulls}
    text["rope_scaling"] = {
        "mrope_section": [16, 24, 24],
        "rope_type": "default",
        "type": "default",
    }
    return {**raw, "text_config": text}


def newest(raw: dict) -> dict:
    """5.x: the decoder in text_config alone, its rope in rope_parameters; dtype."""
    text = both_ways(raw)["text_config"]
    rope = {"mrope_section": [16, 24, 24], "rope_theta": text.pop("rope_theta")}
    text.pop("rope_scaling")
    text["rope_parameters"] = rope | {"rope_type": "default"}
    text["dtype"] = text.pop("torch_dtype")
    tokens = {key: raw[key] for key in raw if key.endswith("_token_id")}
    vision = {**raw["vision_config"], "model_type": "qwen2_5_vl_vision"}
    vision["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "axial"}
    kept = {"model_type": raw["model_type"], "vision_config": vision, "dtype": "bfloat16"}
    return {**kept, **tokens, "text_config": text}


@pytest.mark.parametrize("form", [dict, both_ways, newest])
def test_the_layouts_of_qwen2_5_vl(form):
    raw = form(lingshu())
    assert from_hf(raw) == preset("echovlm_v2_7b") == preset("qwen2_5_vl_7b")
    changed = raw.get("text_config", raw)
    for key, value in (("num_hidden_layers", 3), ("rms_norm_eps", 1e-3)):
        changed[key] = value
    assert from_hf(raw).text.num_layers == 3 and from_hf(raw).text.rms_norm_eps == 1e-3
    raw["vision_config"]["fullatt_block_indexes"] = [0]
    assert from_hf(raw).vision.windowed == (False, *[True] * 31)


@pytest.mark.parametrize("where", ["root", "inside", "both", "nowhere"])
@pytest.mark.parametrize("form", [both_ways, newest])
def test_tied_embeddings_wherever_they_are_said(form, where):
    raw = form(lingshu())
    for part in (raw, raw["text_config"]):
        part.pop("tie_word_embeddings", None)
    for part, places in ((raw, ("root", "both")), (raw["text_config"], ("inside", "both"))):
        if where in places:
            part["tie_word_embeddings"] = True
    assert from_hf(raw).text.tie_word_embeddings == (where != "nowhere")


@pytest.mark.parametrize(
    "vision",
    [
        {},
        None,
        {"model_type": "qwen2_5_vl", "in_chans": 3, "spatial_patch_size": 14},
        {"hidden_size": 1280, "tokens_per_second": 2},
        dict.fromkeys(lingshu()["vision_config"]),
    ],
)
def test_a_silent_vision_config_is_the_released_tower(vision):
    """And not the class's defaults, whose hidden_size is 3584 and tokens_per_second 4."""
    raw = {**lingshu(), "vision_config": vision}
    assert from_hf(raw) == preset("qwen2_5_vl_7b")
    for key in ("rms_norm_eps", "max_position_embeddings", "rope_theta"):
        del raw[key]
    assert from_hf(raw) == preset("qwen2_5_vl_7b")
    raw |= {"hidden_size": 2048, "num_attention_heads": 16}
    assert from_hf(raw).vision.out_width == 2048


@pytest.mark.parametrize("name", ["qwen2_5_vl_3b", "qwen2_5_vl_72b", "tiny_v2"])
@pytest.mark.parametrize("experts", [False, True])
def test_transformers_reads_what_we_write(name, experts):
    transformers = pytest.importorskip("transformers")
    config = preset(name).replace(moe=preset("echovlm_11b").moe if experts else None)
    hf = transformers.AutoConfig.for_model(**to_hf(config))
    vision, text = config.vision, config.text
    theirs = hf.vision_config
    assert (theirs.hidden_size, theirs.out_hidden_size) == (vision.width, vision.out_width)
    assert (theirs.intermediate_size, theirs.depth) == (vision.mlp_dim, vision.depth)
    assert tuple(theirs.fullatt_block_indexes) == vision.full_attention_layers
    assert (theirs.window_size, theirs.tokens_per_second) == (112, 2)
    assert (hf.text_config.hidden_size, hf.text_config.rms_norm_eps) == (text.hidden_size, 1e-6)
    assert hf.tie_word_embeddings == text.tie_word_embeddings
    assert from_hf(hf.to_dict() | {"num_experts": 0}) == config.replace(moe=None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "qwen3_vl"}, "model_type 'qwen3_vl' is not supported; known are qwen2_vl"),
        ({"model_type": 5}, "model_type 5 is not supported"),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "hidden_act 'quick_gelu'"),
        ({"vision_config": {"hidden_size": 1282}}, "vision_config.hidden_size 1282 over"),
        ({"vision_config": {"hidden_size": "x"}}, "vision_config.hidden_size must be"),
        ({"vision_config": {"out_hidden_size": 2048}}, "vision_config.out_hidden_size 2048"),
        ({"vision_config": {"intermediate_size": 3420.5}}, "vision_config.intermediate_size"),
        ({"vision_config": {"window_size": 0}}, "vision_config.window_size must be"),
        ({"vision_config": {"window_size": 27}}, "vision_config.window_size 27 holds no cell"),
        ({"vision_config": {"fullatt_block_indexes": [7, -1]}}, "fullatt_block_indexes must list"),
        ({"vision_config": {"fullatt_block_indexes": [True]}}, "fullatt_block_indexes must list"),
        ({"vision_config": {"fullatt_block_indexes": "7"}}, "fullatt_block_indexes must list"),
        ({"vision_config": {"tokens_per_second": 0}}, "vision_config.tokens_per_second must be"),
        ({"vision_config": {"tokens_per_second": "2"}}, "vision_config.tokens_per_second must be"),
        ({"vision_config": {"patch_size": [14, 14]}}, "vision_config.patch_size must be"),
        ({"vision_config": {"rope_parameters": {"rope_theta": 5e5}}}, "rope_theta 500000.0 is not"),
    ],
)
def test_bad_values_of_qwen2_5_vl_are_named_in_one_line(change, said):
    with pytest.raises(InputError) as error:
        from_hf({**lingshu(), **change}, source="folder/config.json")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("folder/config.json: ")


@pytest.mark.parametrize(
    ("vision", "more"),
    [
        ({"norm": "rms"}, {}),
        ({"window_size": 112}, {}),
        ({"norm": "rms", "mlp": "gated"}, {"tokens_per_second": 2}),
        ({}, {"tokens_per_second": 2}),
    ],
)
def test_a_model_that_no_file_describes_is_refused_when_written(vision, more):
    config = preset("tiny").replace(vision=vision, **more)
    with pytest.raises(InputError, match=r"there is no config\.json for this model") as error:
        to_hf(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["norm", "mlp"])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(InputError, match=f"vision {kind} 'other' is unknown; choose one of"):
        preset("tiny").replace(vision={kind: "other"})


@pytest.mark.parametrize("width", [5, 95, 96, 97, 129, 383, 3421])
def test_a_ratio_gives_the_width_again(width):
    config = preset("tiny").replace(vision={"mlp_dim": width})
    assert from_hf(to_hf(config)) == config
