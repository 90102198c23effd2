"""FLOPs by formula: against compiled programs of the real model, and against sums by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from echovlm_jax.config import ModelConfig, preset
from echovlm_jax.errors import InputError
from echovlm_jax.flops import Execution, Work, executed_flops, layer_flops, model_flops, score_flops
from echovlm_jax.model import Compute, EchoVLM, abstract_params, param_specs, shapes_of
from echovlm_jax.plan import hlo
from echovlm_jax.plan.plan import branches
from echovlm_jax.train.lora import lora_specs
from echovlm_jax.train.stages import how_it_trains, merge, split

ROWS, SEQ, PATCHES = 2, 256, 128
PLAIN = Compute()
FULL = preset("echovlm_11b")


def real_widths(layers: int) -> ModelConfig:
    """The released model's widths: nothing is run, so only compilation takes its time."""
    return FULL.replace(text={"num_layers": layers}, vision={"depth": layers})


def narrow(layers: int) -> ModelConfig:
    """No two sizes alike, so that one in another's place shows; wide enough for 2 %."""
    return preset("tiny").replace(
        text={
            "num_layers": layers,
            "hidden_size": 256,
            "num_heads": 6,
            "num_kv_heads": 2,
            "mlp_dim": 640,
            "vocab_size": 2304,
        },
        vision={"depth": layers, "width": 160, "out_width": 256, "mlp_dim": 608},
        moe={"expert_mlp_dim": 288, "shared_mlp_dim": 416},
    )


def batch(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((ROWS, *shape), jnp.int32)

    return {
        "tokens": ints(SEQ),
        "positions": ints(3, SEQ),
        "segment_ids": ints(SEQ),
        "patches": jax.ShapeDtypeStruct((ROWS, PATCHES, config.vision.patch_dim), jnp.float32),
        "patch_segment_ids": ints(PATCHES),
        "patch_positions": ints(PATCHES, 2),
        "patch_index": ints(SEQ),
    }


def compiled(config: ModelConfig, trained: str | None, compute: Compute = PLAIN):
    """The model's forward pass, or its gradient for the parameters that a part of a path names."""
    model = EchoVLM(config, compute=compute)

    def loss(trained, frozen, batch):
        params = jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=_none)
        logits = model.apply({"params": params}, batch, method="forward")
        return jnp.sum(jnp.square(logits))

    params = abstract_params(config)
    chosen = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if trained is not None and trained in _path(path) else None, params
    )
    rest = jax.tree.map(lambda a, b: b if a is None else None, chosen, params, is_leaf=_none)
    function = loss if trained is None else jax.grad(loss)
    return jax.jit(function).lower(chosen, rest, batch(config)).compile()


def _none(x) -> bool:
    return x is None


def _path(path) -> str:
    return "/".join(key.key for key in path)


def paths(config: ModelConfig) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    return [_path(path) for path, _ in leaves]


def work(config: ModelConfig, trained: str | None) -> Work:
    how = {
        path: "full" if trained is not None and trained in path else "frozen"
        for path in paths(config)
    }
    return Work(rows=ROWS, seq_len=SEQ, max_patches=PATCHES, trains=how)


def check(config: ModelConfig, trained: str | None, compute: Compute, execution: Execution):
    program = compiled(config, trained, compute)
    formula = executed_flops(config, work(config, trained), execution)
    counted = hlo.read(program.as_text(), branches=branches(config)).matmul_flops
    assert counted == pytest.approx(formula.total, rel=0.005)
    return program, formula


def once(layers: int) -> Execution:
    """One layer is no loop: its forward and backward pass lie side by side."""
    return Execution(attention="whole" if layers == 1 else "blocks")


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "trained",
    [pytest.param(None, id="forward", marks=pytest.mark.slow), pytest.param("", id="gradient")],
)
def test_formula_is_the_compiled_programs_count(layers, trained):
    check(narrow(layers), trained, PLAIN, once(layers))


# With one layer, and nothing before it that trains, no input of the first products needs a
# gradient; a loop over more gives it to all of them.
@pytest.mark.parametrize(
    "trained",
    [
        "vision/merger/fc",
        pytest.param("text/layers/moe", marks=pytest.mark.slow),
        pytest.param("text/lm_head", marks=pytest.mark.slow),
        pytest.param("vision/blocks/mlp/fc1", marks=pytest.mark.slow),
    ],
)
def test_frozen_parameters_cost_no_gradients(trained):
    check(narrow(2), trained, PLAIN, Execution())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compute", "execution"),
    [
        (Compute(remat="full"), Execution(remat=True, attention="whole")),
        (
            Compute(moe_dispatch="einsum", capacity_factor=1.25),
            Execution(dispatch="einsum", capacity_factor=1.25),
        ),
    ],
    ids=["remat", "einsum"],
)
def test_the_way_it_is_executed(compute, execution):
    check(narrow(2), "", compute, execution)


def with_windows(depth: int, *full: int) -> ModelConfig:
    """The second kind of tower; a window of 2 × 2 cells, 16 patches, sees 48 of 128."""
    return narrow(2).replace(
        vision={
            "depth": depth,
            "norm": "rms",
            "mlp": "gated",
            "window_size": 56,
            "full_attention_layers": full,
        },
        tokens_per_second=2,
    )


@pytest.mark.parametrize(
    ("config", "trained", "compute", "execution"),
    [
        pytest.param(with_windows(2), None, PLAIN, Execution(), id="windows"),
        pytest.param(with_windows(3, 1), "", PLAIN, Execution(), id="both"),
        pytest.param(
            with_windows(3, 2),
            "",
            Compute(remat="full"),
            Execution(remat=True, attention="whole"),
            id="both, remat",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_layers_of_windows_cost_what_their_windows_do(config, trained, compute, execution):
    """By the program, whose condition is taken as often as there are layers of each kind."""
    program, formula = check(config, trained, compute, execution)
    scores = {t.name: t.forward for t in formula.terms if t.name.endswith("scores")}
    windows = sum(config.vision.windowed)
    a_layer = 2 * 2 * ROWS * PATCHES * 160
    assert scores["vision window scores"] == windows * 48 * a_layer
    full = config.vision.depth - windows
    assert scores.get("vision attention scores", 0) == full * PATCHES * a_layer
    # A reader that isn't told counts both branches in every layer.
    whole = {t.name: t.forward + t.backward for t in formula.terms}
    more = whole["vision window scores"] / windows * full
    if full:
        more += whole["vision attention scores"] / full * windows
    told = hlo.read(program.as_text(), branches=branches(config)).matmul_flops
    untold = hlo.read(program.as_text()).matmul_flops
    assert untold - told == pytest.approx(more if full else 0, rel=0.01)


def test_useful_work_of_windows():
    """A patch meets its window's 64 at the released sizes, or its frame's where that is smaller."""
    full, step = preset("qwen2_5_vl_7b"), Work(rows=1, seq_len=512, max_patches=1024)
    for frame in (None, 256, 16):
        flops = model_flops(full, dataclasses.replace(step, frame_patches=frame))
        seen = 2 * 2 * 1024 * 1280
        assert named(flops)["vision window scores"][0] == 28 * min(64, frame or 64) * seen
        assert named(flops)["vision attention scores"][0] == 4 * (frame or 1024) * seen
    block = 1280 * 3840 + 1280 * 1280 + 3 * 1280 * 3420
    assert named(flops)["vision blocks"][0] == 2 * 32 * 1024 * block
    splash = executed_flops(
        full, dataclasses.replace(step, max_patches=4096), Execution(attention="splash")
    )
    assert named(splash)["vision window scores"][0] == 28 * 384 * 2 * 2 * 4096 * 1280


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("trained", [None, ""], ids=["forward", "gradient"])
def test_formula_at_the_released_widths(layers, trained):
    program, formula = check(real_widths(layers), trained, PLAIN, once(layers))
    if layers == 1:
        # XLA's own count has element-wise work in it and knows no loops; one turn is no loop.
        assert program.cost_analysis()["flops"] == pytest.approx(formula.total, rel=0.02)


@pytest.mark.slow
def test_low_rank_updates_cost_what_they_need():
    config, rank = narrow(2), 24
    shapes = abstract_params(config)
    how = how_it_trains(shapes, "instruction")
    full, frozen = split(shapes, how)

    def loss(trained, frozen, batch):
        variables = {"params": merge(trained["full"], frozen), "lora": trained["lora"]}
        return jnp.sum(jnp.square(EchoVLM(config).apply(variables, batch, method="forward")))

    trained = {"full": full, "lora": shapes_of(lora_specs(param_specs(config), how, rank))}
    program = jax.jit(jax.grad(loss)).lower(trained, frozen, batch(config)).compile()
    step = Work(rows=ROWS, seq_len=SEQ, max_patches=PATCHES, trains=how, lora_rank=rank)
    formula = executed_flops(config, step, Execution())
    assert (
        formula.total
        > 1.02 * executed_flops(config, dataclasses.replace(step, lora_rank=0), Execution()).total
    )
    assert hlo.read(program.as_text()).matmul_flops == pytest.approx(formula.total, rel=0.005)


def named(flops) -> dict[str, tuple[float, float]]:
    return {term.name: term[1:] for term in flops.terms}


def test_the_released_models_layer_is_six_times_its_parameters():
    """Parameters of a layer's parts, from the sizes in the released config.json."""
    tokens = 3 * 2048
    parts = named(layer_flops(FULL, Work(rows=3, seq_len=2048)))
    for name, parameters in {
        "attention weights": 2 * 3584 * 3584 + 2 * 3584 * 512,
        "MLP": 3 * 3584 * 18944,
        "shared expert": 3 * 3584 * 5632 + 3584,
        "experts": 2 * 3 * 3584 * 1408,
        "router and coefficient": 3584 * 4 + 3584 * 2,
    }.items():
        assert parts.pop(name) == (2 * parameters * tokens, 4 * parameters * tokens)
    # Half of 2048 keys on average, 28 heads of 128, a multiply-add for q·k and one for weights·v.
    scores = tokens * 1024 * 28 * 128 * 2 * 2
    assert parts == {"attention scores": (scores, 2 * scores)}


def test_the_whole_model_is_its_layers_the_head_and_the_vision_tower():
    flops = model_flops(FULL, Work(rows=1, seq_len=512, max_patches=1024, frame_patches=256))
    parts = named(flops)
    assert parts["MLP"] == (2 * 28 * 512 * 203_685_888, 4 * 28 * 512 * 203_685_888)
    assert parts["lm_head"] == (2 * 512 * 152064 * 3584, 4 * 512 * 152064 * 3584)
    # Pixels need no gradient.
    assert parts["vision patch embedding"] == (2 * 1024 * 1176 * 1280, 2 * 1024 * 1176 * 1280)
    block = 1280 * 3840 + 1280 * 1280 + 2 * 1280 * 5120
    assert parts["vision blocks"] == (2 * 32 * 1024 * block, 4 * 32 * 1024 * block)
    seen = 2 * 2 * 32 * 1024 * 256 * 1280
    assert parts["vision attention scores"] == (seen, 2 * seen)
    merger = 5120 * 5120 + 5120 * 3584
    assert parts["vision merger"] == (2 * 256 * merger, 4 * 256 * merger)
    assert flops.total == sum(forward + backward for forward, backward in parts.values())
    lines = str(flops).splitlines()
    assert len(lines) == len(parts) + 1
    assert lines[-1].split()[0] == "total"
    assert lines[-1].endswith("100.0%")


def test_generating_has_no_backward_pass_and_few_logits():
    prompt = model_flops(FULL, Work(rows=2, seq_len=700, max_patches=64, step="prefill"))
    assert prompt.backward == 0
    assert named(prompt)["lm_head"][0] == 2 * 2 * 152064 * 3584
    assert named(prompt)["MLP"][0] == 2 * 28 * 1400 * 203_685_888
    token = named(model_flops(FULL, Work(rows=2, seq_len=700, max_patches=64, step="decode")))
    assert not any(name.startswith("vision") for name in token)
    assert token["MLP"] == (2 * 28 * 2 * 203_685_888, 0)
    assert token["attention scores"] == (28 * 2 * 700 * 28 * 128 * 2 * 2, 0)


def test_what_a_dispatch_runs_beside_the_chosen_experts():
    step = Work(rows=1, seq_len=1024)
    expert = 2 * 1024 * 3 * 3584 * 1408

    def forward(**how) -> tuple[float, float]:
        parts = named(layer_flops(FULL, step, Execution(**how)))
        return parts["experts"][0] / expert, parts.get("dispatch and combine", (0.0,))[0]

    assert forward(dispatch="ragged") == (2, 0)
    assert forward(dispatch="dense") == (4, 0)
    # 160 places of 4 experts in a group of 256; each token meets all of them, going and coming.
    einsum = forward(dispatch="einsum", capacity_factor=1.25)
    assert einsum == (2.5, 2 * 2 * 1024 * 640 * 3584)
    assert forward(dispatch="einsum") == (4, 2 * 2 * 1024 * 1024 * 3584)


def test_scores_of_the_executed_forms():
    step = Work(rows=1, seq_len=1024)
    half = named(layer_flops(FULL, step))["attention scores"][0]

    def scores(**how) -> tuple[float, float]:
        forward, backward = named(layer_flops(FULL, step, Execution(**how)))["attention scores"]
        return forward / half, backward / half

    assert scores(attention="whole") == (2, 4)
    assert scores(attention="blocks") == (2, 5)  # q·k once more
    assert scores(attention="splash") == (1, 3.5)  # kernels of 3 and of 4 products
    assert scores(attention="splash", remat=True) == (1, 4.5)
    # Shorter segments are useful work saved, and no work saved by a program that masks them.
    packed = Work(rows=1, seq_len=1024, segment_len=256, max_patches=512, frame_patches=64)
    useful, executed = (
        named(count)
        for count in (
            model_flops(FULL, packed),
            executed_flops(FULL, packed, Execution(attention="splash")),
        )
    )
    assert executed["attention scores"][0] == 4 * useful["attention scores"][0] == 28 * half
    assert executed["vision attention scores"][0] == 8 * useful["vision attention scores"][0]
    sizes = {"rows": 3, "heads": 5, "queries": 7, "keys": 11, "head_dim": 13}
    assert score_flops(**sizes, causal=False) == 2 * 2 * 3 * 5 * 7 * 11 * 13
    assert score_flops(**sizes, causal=True, products=3) == 3 * 3 * 5 * 7 * 11 * 13


def test_unknown_words_are_refused():
    with pytest.raises(InputError, match="step 'test' is unknown"):
        Work(rows=1, seq_len=1, step="test")
    with pytest.raises(InputError, match="moe_dispatch 'sparse' is unknown"):
        executed_flops(FULL, Work(rows=1, seq_len=1), Execution(dispatch="sparse"))


def test_what_is_no_padding_is_counted_by_the_rows_that_are_full():
    """Half of the rows empty is the work of half as many rows; a part alone is that part."""
    whole, half = (model_flops(FULL, Work(rows, 2048, 4096, 784)) for rows in (8, 4))
    assert whole.used(0.5, 0.5) == pytest.approx(half.total)
    assert whole.used(1, 1) == pytest.approx(whole.total)
    assert whole.used(1, 0) == pytest.approx(model_flops(FULL, Work(8, 2048)).total, rel=1e-3)
    assert 0 < whole.used(0, 1) < whole.used(1, 0)
