"""The configurations in configs/: they load, make a program, and compile for a TPU slice."""

import os
from pathlib import Path

import jax
import pytest

from echovlm_jax.config import ModelConfig, preset
from echovlm_jax.data.review import review
from echovlm_jax.data.settings import Settings
from echovlm_jax.data.tasks import mix_for
from echovlm_jax.train.config_file import check_config, load_config
from echovlm_jax.train.program import make_program
from echovlm_jax.train.stages import count

FOLDER = Path(__file__).parents[1] / "configs"
# The smallest slice that each of the full-size ones is for.
TOPOLOGY = {"alignment": "v5e:2x4", "instruction": "v5e:2x4", "full_finetune": "v5e:4x4"}
FILES = [FOLDER / f"{name}.py" for name in TOPOLOGY]
SMALL = ("phantom", "phantom_dense")
# Full size on one chip, and the most GiB that training may take there.
ONE_CHIP = {"colab_qlora": 15.5, "colab_int8": 15.5, "colab_int4": 11}


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request) -> Path:
    return request.param


def test_every_file_is_known() -> None:
    assert {file.stem for file in FOLDER.glob("*.py")} == {*TOPOLOGY, *SMALL, *ONE_CHIP}


def test_the_small_ones_differ_in_the_mixture_alone() -> None:
    small, dense = (load_config(FOLDER / f"{name}.py") for name in SMALL)
    made = [make_program(config, jax.devices()[:1]) for config in (small, dense)]
    assert {**small.to_dict(), "model": "nano_dense"} == dense.to_dict()
    assert made[0].model.moe and made[0].model.replace(moe=None) == made[1].model
    new = count(made[0].state.trainable) - count(made[1].state.trainable)
    assert new == new_path(made[0].model)


def new_path(model: ModelConfig) -> int:
    """Values of the experts, their router, the shared expert, its gate and the coefficients."""
    width, moe = model.text.hidden_size, model.moe
    assert moe
    experts = 3 * width * (moe.num_experts * moe.expert_mlp_dim + moe.shared_mlp_dim)
    return model.text.num_layers * (experts + width * (moe.num_experts + 1) + 2 * (width + 1))


def updates(model: ModelConfig, rank: int) -> int:
    """Values of low-rank updates beside every linear layer: rank · (inputs + outputs) each."""
    text, vision = model.text, model.vision
    width, heads = text.hidden_size, text.num_heads * text.head_dim
    kv_heads = text.num_kv_heads * text.head_dim
    decoder = 2 * (width + heads) + 2 * (width + kv_heads) + 3 * (width + text.mlp_dim)
    v, inner = vision.width, vision.mlp_dim
    tower = (v + 3 * v) + (v + v) + 2 * (v + inner)
    joined = v * vision.spatial_merge_size**2
    merger = 2 * joined + joined + width
    return rank * (text.num_layers * decoder + vision.depth * tower + merger)


def test_it_makes_a_program_at_full_size(file) -> None:
    config = load_config(file)
    check_config(config)
    # A batch of any file divides by the eight devices here.
    program = make_program(config)
    assert len(program.mesh.devices.flatten()) == len(jax.devices()) == 8
    leaves = jax.tree.leaves((program.state, program.batch))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    model = preset(config.model)
    joined = model.vision.width * model.vision.spatial_merge_size**2
    merger = (joined + 1) * joined + (joined + 1) * model.text.hidden_size
    trained = {
        "alignment": new_path(model) + merger,
        "instruction": new_path(model) + updates(model, config.lora.rank),
        "full_finetune": count(program.state.trainable),
    }[file.stem]
    assert count(program.state.trainable) == trained
    low = count(program.state.trainable.get("lora", {}))
    assert count(program.state.frozen) + count(program.state.trainable) - low > 11.6e9
    assert {leaf.dtype.name for leaf in jax.tree.leaves(program.state.trainable)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(program.state.frozen)} <= {"bfloat16"}


@pytest.mark.parametrize("name", ONE_CHIP)
def test_it_makes_a_program_of_few_bits(name) -> None:
    config = load_config(FOLDER / f"{name}.py")
    program = make_program(config, jax.devices()[:1])
    frozen = jax.tree.leaves(program.state.frozen)
    few = [leaf for leaf in frozen if leaf.dtype.name in ("int8", config.quantize)]
    assert sum(leaf.size for leaf in few) > 0.93 * (count(program.state.frozen))
    model = program.model
    text, moe = model.text, model.moe
    assert moe
    small = text.num_layers * (text.hidden_size * (moe.num_experts + 1 + 2) + 2)
    assert count(program.state.trainable["params"]) == small
    low = 0
    if name == "colab_qlora":
        each = 3 * (text.hidden_size + moe.expert_mlp_dim) * moe.num_experts
        each += 3 * (text.hidden_size + moe.shared_mlp_dim)
        low = updates(model, config.lora.rank) + config.lora.rank * text.num_layers * each
    assert count(program.state.trainable.get("lora", {})) == low


def test_overrides_reach_the_program(file) -> None:
    words = ["model=tiny", "seq_len=64", "max_patches=16", "global_batch_size=16", "mesh.tensor=2"]
    program = make_program(load_config(file, words))
    assert program.batch["tokens"].shape == (16, 64)
    assert program.batch["patches"].shape[:2] == (16, 16)
    assert program.mesh.shape["tensor"] == 2 and program.mesh.shape["fsdp"] == 4
    assert count(program.state.trainable) < 1e7


SEEN = [  # of those that show the same, one
    "phantom",
    pytest.param("alignment", marks=pytest.mark.slow),
    pytest.param("instruction", marks=pytest.mark.slow),
    pytest.param("full_finetune", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", SEEN)
def test_it_leaves_out_nothing_of_its_own_data_and_pads_little(name) -> None:
    config = load_config(FOLDER / f"{name}.py", {"data_workers": 0})
    found = review(Settings.from_config(config), allowed=0.0)
    assert not found["dropped"] and found["images_shrunk"] <= 4
    asked = {task for task, weight in mix_for(config.stage).items() if weight} - {"conversation"}
    assert all(found["tasks"][task]["trained"] for task in asked)
    used = found["packing_efficiency"]
    assert (
        used["tokens"] > 0.85 and used["patches"] > 0.7 and used["tokens"] + used["patches"] > 1.6
    )


@pytest.mark.slow
def test_it_compiles_for_its_slice(file) -> None:
    """One layer of the decoder and one of the vision tower, all widths and the whole batch."""
    pytest.importorskip("libtpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from echovlm_jax.plan import plan

    config = load_config(file)
    model = preset(config.model).replace(text={"num_layers": 1}, vision={"depth": 1})
    result = plan(config, TOPOLOGY[file.stem], model=model)
    assert result["ok"] and result["rows"] == config.global_batch_size == result["chips"]
    assert result["hbm_per_chip"]["peak"] < result["hbm_capacity"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "most"),
    [*((name, None, most) for name, most in ONE_CHIP.items()), ("colab_qlora", "int4", 11)],
)
def test_it_trains_on_one_chip(name, kind, most) -> None:
    """The whole model: minutes of compiling."""
    pytest.importorskip("libtpu")
    from echovlm_jax.plan import plan

    config = load_config(FOLDER / f"{name}.py", {"quantize": kind} if kind else {})
    result = plan(config, "v5e:1x1")
    assert result["ok"] and result["hbm_per_chip"]["peak"] <= most * 2**30
