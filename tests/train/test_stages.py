"""Which parameters train in which stage, and low-rank updates beside frozen weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from echovlm_jax.config import ModelConfig, preset
from echovlm_jax.errors import InputError
from echovlm_jax.model import EchoVLM, abstract_params, init_params, param_specs, shapes_of
from echovlm_jax.train.config_file import load_config
from echovlm_jax.train.lora import init_lora, lora_specs, scaled
from echovlm_jax.train.program import make_program
from echovlm_jax.train.stages import (
    STAGES,
    count,
    how_it_trains,
    merge,
    split,
    training_table,
)

CONFIGS = Path(__file__).parents[2] / "configs"
RELEASED = preset("echovlm_11b")
D, D_VISION, LAYERS, BLOCKS = 3584, 1280, 28, 32
MOE = LAYERS * (
    4 * D  # router
    + 4 * 3 * 1408 * D  # four experts of three matrices
    + D  # the shared expert's gate
    + 3 * 5632 * D  # the shared expert
)
COEFFICIENT = LAYERS * (2 * D + 2)
MERGER = 5120 * 5120 + 5120 + 5120 * D + D
VISION = (
    3 * 2 * 14 * 14 * D_VISION
    + BLOCKS
    * (
        4 * D_VISION  # two norms
        + 3 * D_VISION * D_VISION + 3 * D_VISION  # qkv
        + D_VISION * D_VISION + D_VISION  # proj
        + 2 * D_VISION * 5120 + 5120 + D_VISION  # mlp
    )
    + 2 * D_VISION  # ln_q
    + MERGER
)  # fmt: skip
TEXT = 2 * 152064 * D + D + LAYERS * (
    2 * D  # two norms
    + 28 * 128 * (D + 1)  # q
    + 2 * 4 * 128 * (D + 1)  # k and v
    + 28 * 128 * D  # o
    + 3 * 18944 * D
)  # fmt: skip
# Inputs plus outputs of every linear layer: what one rank costs.
PER_RANK = (
    BLOCKS * ((D_VISION + 3 * D_VISION) + 2 * D_VISION + 2 * (D_VISION + 5120))
    + (5120 + 5120) + (5120 + D)
    + LAYERS * ((D + D) + 2 * (D + 512) + (D + D) + 3 * (D + 18944))
)  # fmt: skip


def trained(stage: str, model: ModelConfig = RELEASED) -> dict[str, str]:
    """Path → how, of what doesn't stay frozen."""
    how = how_it_trains(abstract_params(model), stage)
    return {path: value for path, value in how.items() if value != "frozen"}


NEW = {
    *(f"text/layers/moe/{name}/kernel" for name in ("router", "shared_gate")),
    *(
        f"text/layers/moe/{group}/{name}/kernel"
        for group in ("experts", "shared")
        for name in ("gate", "up", "down")
    ),
    *(f"text/layers/coefficient/{name}" for name in ("kernel", "bias")),
}
PROJECTOR = {f"vision/merger/{fc}/{name}" for fc in ("fc1", "fc2") for name in ("kernel", "bias")}
LORA = {
    *(f"text/layers/attn/{name}/kernel" for name in "qkvo"),
    *(f"text/layers/mlp/{name}/kernel" for name in ("gate", "up", "down")),
    *(f"vision/blocks/attn/{name}/kernel" for name in ("qkv", "proj")),
    *(f"vision/blocks/mlp/{name}/kernel" for name in ("fc1", "fc2")),
    *(f"vision/merger/{name}/kernel" for name in ("fc1", "fc2")),
}


def test_alignment_trains_the_new_path_and_the_projector():
    assert trained("alignment") == dict.fromkeys(NEW | PROJECTOR, "full")


def test_alignment_with_vision_trains_the_whole_tower():
    found = trained("alignment_with_vision")
    every = flatten_dict(abstract_params(RELEASED), sep="/")
    tower = {path for path in every if path.startswith("vision/")}
    assert found == dict.fromkeys(NEW | tower, "full") and tower > PROJECTOR


def test_instruction_puts_updates_beside_every_linear_layer():
    wanted = dict.fromkeys(NEW, "full") | dict.fromkeys(LORA, "lora")
    assert trained("instruction") == wanted


@pytest.mark.parametrize(
    ("stage", "full"),
    [
        ("alignment", MOE + COEFFICIENT + MERGER),
        ("alignment_with_vision", MOE + COEFFICIENT + VISION),
        ("instruction", MOE + COEFFICIENT),
        ("full", TEXT + MOE + COEFFICIENT + VISION),
    ],
)
def test_counts_are_those_of_the_released_sizes(stage, full):
    shapes = abstract_params(RELEASED)
    how = how_it_trains(shapes, stage)
    trainable, rest = split(shapes, how)
    assert count(trainable) == full
    assert count(trainable) + count(rest) == TEXT + MOE + COEFFICIENT + VISION
    low = count(shapes_of(lora_specs(param_specs(RELEASED), how, 8)))
    assert low == (8 * PER_RANK if stage == "instruction" else 0)
    assert flatten_dict(merge(trainable, rest)) == flatten_dict(shapes)


def test_every_parameter_has_one_rule_and_one_axis_name_a_dimension():
    specs = param_specs(RELEASED)
    for stage in STAGES:
        how = how_it_trains(specs, stage)
        assert how.keys() == specs.keys()
        for spec in lora_specs(specs, how, 8).values():
            assert len(spec.axes) == len(spec.shape)
            rank = spec.axes.index("rank")
            assert spec.shape[rank] == 8 and spec.axes.count("rank") == 1
    updates = lora_specs(specs, how_it_trains(specs, "instruction"), 8)
    assert updates["text/layers/attn/q/a"].axes == ("layers", "rank", "embed")
    assert updates["text/layers/attn/q/b"].axes == ("layers", "heads", "head_dim", "rank")
    assert updates["text/layers/attn/o/a"].axes == ("layers", "rank", "heads", "head_dim")


def test_wrong_stages_are_refused_by_name():
    shapes = abstract_params(preset("tiny"))
    with pytest.raises(InputError, match="stage 'pretrain' is unknown; choose one of alignment, "):
        how_it_trains(shapes, "pretrain")
    with pytest.raises(InputError, match=r"alignment.*text/layers/\(moe\|coefficient\)"):
        how_it_trains(abstract_params(preset("qwen2_vl_2b")), "alignment")


# --- Rules of a configuration's own ---------------------------------------------------------------

OWN = (
    ("text/layers/moe/experts/.*", "lora", 0.5),
    ("text/layers/(moe|coefficient)/.*", "full", 3.0, 0.25),
    ["vision/merger/.*", "full", 0.1],
    ("text/layers/.*/bias", "full", 1, None),
    (".*", "frozen"),
)


def own_program(**changes):
    config = load_config(CONFIGS / "alignment.py", {"model": "tiny", "lora.dropout": 0, **changes})
    config.stage_rules = OWN
    return make_program(config, jax.devices()[:1])


def test_a_configuration_may_have_rules_of_its_own():
    """The first that matches decides; rates and decays go with it, to updates too."""
    made = own_program(weight_decay=0.01)
    found = {path: made.rules[path] for path in made.rules if made.rules[path].how != "frozen"}
    assert found["text/layers/moe/experts/up/kernel"][1:] == ("lora", 0.5, 0.01)
    assert found["text/layers/moe/shared/up/kernel"][1:] == ("full", 3.0, 0.25)
    assert found["vision/merger/ln_q/scale"][1:] == ("full", 0.1, 0.01)
    assert found["text/layers/attn/q/bias"][1:] == ("full", 1, 0.01)
    experts = {f"text/layers/moe/experts/{name}/kernel" for name in ("gate", "up", "down")}
    assert {path for path in found if found[path].how == "lora"} == experts
    assert {path for path, how in made.how.items() if how != "frozen"} == found.keys()
    moments = [leaf for leaf in jax.tree.leaves(made.state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * count(made.state.trainable)
    table = training_table(made.state, made.how, made.rules).splitlines()
    [up] = [line for line in table if line.startswith("text/layers/moe/experts/up/kernel")]
    rank, model = 8, preset("tiny")
    moe, width = model.moe, model.text.hidden_size
    size = model.text.num_layers * moe.num_experts * rank * (width + moe.expert_mlp_dim)
    assert up.split()[3:] == ["lora", f"{size:,}", "0.5", "0.01", "text/layers/moe/experts/.*"]
    assert len(table) == len(made.how) + 2
    [frozen] = [line for line in table if line.startswith("text/lm_head")]
    assert frozen.split()[3:] == ["frozen", "0", ".*"]


def test_updates_may_be_all_that_trains():
    config = load_config(CONFIGS / "alignment.py", {"model": "tiny"})
    config.stage_rules = ((r"text/layers/attn/q/kernel", "lora", 2.0), (".*", "frozen"))
    made = make_program(config, jax.devices()[:1])
    layers, width = made.model.text.num_layers, made.model.text.hidden_size
    heads = made.model.text.num_heads * made.model.text.head_dim
    assert count(made.state.trainable) == layers * config.lora.rank * (width + heads)
    moments = [leaf for leaf in jax.tree.leaves(made.state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * count(made.state.trainable)
    assert jax.tree.structure(made.optimizer.init(made.state.trainable)) == jax.tree.structure(
        made.state.opt_state
    )


def test_rates_and_decays_reach_what_they_are_for():
    made = own_program(weight_decay=0.01, adam_eps=1e-30, warmup_fraction=0.0, clip_norm=1e9)
    rng = np.random.default_rng(0)
    params, grads = (  # all of one shape, for which operations are compiled once
        jax.tree.map(lambda _: rng.normal(size=3).astype(np.float32), made.state.trainable)
        for _ in range(2)
    )
    updates, state = made.optimizer.update(grads, made.optimizer.init(params), params)
    peak = 1e-4
    for part, path, rate, decay in (
        ("lora", "text/layers/moe/experts/up/a", 0.5, 0.01),
        ("lora", "text/layers/moe/experts/down/b", 0.5, 0.01),
        ("params", "text/layers/moe/router/kernel", 3.0, 0.25),
        ("params", "vision/merger/fc1/bias", 0.1, 0.01),
        ("params", "text/layers/attn/v/bias", 1.0, 0.01),
    ):
        u, g, p = (flatten_dict(tree[part], sep="/")[path] for tree in (updates, grads, params))
        # Adam's first step is the gradient's sign.
        np.testing.assert_allclose(u, -peak * rate * (np.sign(g) + decay * p), rtol=1e-4)
    # As many parts as the optimizer of a stage without rates: checkpoints are the same.
    plain = make_program(load_config(CONFIGS / "alignment.py", {"model": "tiny"}))
    assert len(state) == len(plain.state.opt_state) == 4


@pytest.mark.parametrize("stage", STAGES)
def test_the_optimizer_holds_two_moments_of_what_trains(stage):
    """At full size, from shapes alone."""
    made = make_program(load_config(CONFIGS / "instruction.py", {"stage": stage}))
    full = {
        "alignment": MOE + COEFFICIENT + MERGER,
        "alignment_with_vision": MOE + COEFFICIENT + VISION,
        "instruction": MOE + COEFFICIENT + 8 * PER_RANK,
        "full": TEXT + MOE + COEFFICIENT + VISION,
    }[stage]
    moments = [leaf for leaf in jax.tree.leaves(made.state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * full
    assert all(leaf.dtype == jnp.float32 for leaf in moments)
    assert count(made.state.trainable) == full


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ((), "must be a tuple of"),
        (("text/.*", "full"), r"rule 1, 'text/\.\*': write \(pattern, how\)"),
        (((".*",),), r"rule 1, \('\.\*',\): write \(pattern, how\)"),
        (((".*", "frozen"), ("(", "full")), r"rule 2, \('\(', 'full'\): the pattern is no regular"),
        (((3, "full"),), "the pattern is no regular"),
        (((".*", "train"),), "how must be one of full, lora, frozen"),
        (((".*", "full", 0),), "rate must be a number above 0; what shall not train is frozen"),
        (((".*", "full", True),), "rate must be a number above 0"),
        (((".*", "full", float("nan")),), "rate must be a number above 0"),
        (((".*", "full", 1, -0.1),), "weight decay must be a number of at least 0"),
        (((".*", "frozen", 1),), "neither rate nor weight decay"),
        (((".*", "frozen"),), "leaves every parameter frozen"),
        ((("text/.*", "full"),), "no rule says how vision/.* trains"),
        ((("texts/.*", "full"), (".*", "full")), "no parameter for its rule texts/"),
        (((".*", "full"), ("text/.*", "frozen")), "no parameter for its rule text/.*before it"),
        (((".*", "lora"),), "an update beside .*, which can't have one"),
        ((("text/lm_head/kernel", "lora"), (".*", "frozen")), "an update beside text/lm_head"),
    ],
)
def test_wrong_rules_are_refused(rules, said):
    config = load_config(CONFIGS / "alignment.py", {"model": "tiny"})
    with config.unlocked():
        config.stage_rules = rules
    with pytest.raises(InputError, match=said) as error:
        make_program(config)
    assert "\n" not in str(error.value)


def test_updates_of_experts_go_without_dropout():
    with pytest.raises(InputError, match=r"lora.dropout must be 0 where text/layers/moe/experts"):
        own_program(**{"lora.dropout": 0.05})


# --- Low-rank updates -----------------------------------------------------------------------------

# PyTorch's [out, in] matrix of a kernel: by how many of its dimensions, after the layers', are out.
OUT_DIMS = {"attn/q/": 2, "attn/k/": 2, "attn/v/": 2, "attn/qkv/": 3}
SMALL = preset("tiny").replace(text={"num_layers": 2}, vision={"depth": 2})


@pytest.fixture(scope="module")
def model():
    """Parameters, updates with b ≠ 0, a batch, and (variables) → logits."""
    rng = np.random.default_rng(0)
    params = init_params(SMALL, jax.random.key(0))
    specs = lora_specs(param_specs(SMALL), how_it_trains(params, "instruction"), 3)
    low = jax.jit(lambda key: init_lora(specs, key))(jax.random.key(1))
    index = np.full((2, 12), -1)
    index[:, 1:3] = [0, 1]
    batch = {
        "tokens": rng.integers(8, 100, (2, 12)),
        "positions": np.tile(np.arange(12), (2, 3, 1)),
        "segment_ids": np.ones((2, 12), np.int32),
        "patch_index": index,
        "patches": rng.normal(size=(2, 8, SMALL.vision.patch_dim)).astype(np.float32),
        "patch_segment_ids": np.ones((2, 8), np.int32),
        "patch_positions": rng.integers(0, 4, (2, 8, 2)),
    }
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    run = jax.jit(lambda variables: EchoVLM(SMALL).apply(variables, batch, method="forward"))
    return params, low, run


def nonzero(low: dict) -> dict:
    """The updates with random values in b as well."""
    flat = flatten_dict(low, sep="/")
    rng = np.random.default_rng(2)
    return unflatten_dict(
        {
            path: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32)
            if path.endswith("/b")
            else leaf
            for path, leaf in flat.items()
        },
        sep="/",
    )


def test_updates_begin_as_nothing(model):
    params, low, run = model
    flat = flatten_dict(low, sep="/")
    inputs = {"text/layers/attn/q": 128, "text/layers/attn/o": 4 * 32, "text/layers/mlp/down": 384,
              "vision/blocks/attn/qkv": 96, "vision/merger/fc1": 4 * 96}  # fmt: skip
    for module, size in inputs.items():
        a, b = np.asarray(flat[f"{module}/a"]), np.asarray(flat[f"{module}/b"])
        assert not b.any()
        assert 0.9 * size**-0.5 < np.abs(a).max() <= size**-0.5
        assert abs(a.mean()) < 0.1 * size**-0.5
    made = run({"params": params, "lora": scaled(low, 2.0)})
    np.testing.assert_array_equal(made, run({"params": params}))


@pytest.mark.parametrize("module", [path.removesuffix("/kernel") for path in sorted(LORA)])
def test_an_update_equals_a_merged_weight(model, module):
    """W + scale · b a, of the [out, in] matrices that PyTorch would have: one kernel at a time."""
    params, low, run = model
    low = flatten_dict(nonzero(low), sep="/")
    scale = 2.0
    merged = flatten_dict(params, sep="/")
    kernel = np.asarray(merged[f"{module}/kernel"], np.float64)
    layers = 0 if "merger" in module else 1
    rank = 3
    out = next((n for name, n in OUT_DIMS.items() if name in f"{module}/"), 1)
    lead = kernel.shape[:layers]
    rows = int(np.prod(kernel.shape[layers : layers + out]))
    a = np.asarray(low[f"{module}/a"], np.float64).reshape(*lead, rank, -1)
    b = np.asarray(low[f"{module}/b"], np.float64).reshape(*lead, rows, rank)
    merged[f"{module}/kernel"] = kernel + scale * (b @ a).reshape(kernel.shape)
    merged[f"{module}/kernel"] = jnp.asarray(merged[f"{module}/kernel"], jnp.float32)
    wanted = run({"params": unflatten_dict(merged, sep="/")})
    zeroed = {
        path: leaf if path.rpartition("/")[0] == module else jnp.zeros_like(leaf)
        for path, leaf in low.items()
    }
    made = run({"params": params, "lora": scaled(unflatten_dict(zeroed, sep="/"), scale)})
    base = np.asarray(run({"params": params}))
    assert np.abs(wanted - base).max() > 1e-3 * np.abs(base).max()
    np.testing.assert_allclose(made, wanted, atol=1e-5 * np.abs(base).max())
