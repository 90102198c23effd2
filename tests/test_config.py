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
    # Counts of the published checkpoints: 11.7 B, 8.29 B and 2.21 B.
    [
        ("echovlm_11b", 11_683_172_920),
        ("qwen2_vl_7b", 8_291_375_616),
        ("qwen2_vl_2b", 2_208_985_600),
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
