"""The train step: global means, accumulation, frozen parameters, and what its program holds."""

import functools
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from echovlm_jax.config import ModelConfig, preset
from echovlm_jax.model import Compute, EchoVLM, abstract_params
from echovlm_jax.model.compute import REMAT
from echovlm_jax.plan import hlo
from echovlm_jax.train import step as step_module
from echovlm_jax.train.loss import IGNORE, WEIGHTINGS, token_losses
from echovlm_jax.train.program import Program, init_state, make_program
from echovlm_jax.train.stages import STAGES, count
from echovlm_jax.train.step import Objective, TrainState, make_train_step
from tests.distributed.train_steps import CONFIG, SMALL, place, random_batch

ROWS, LENGTH = 8, 32
# The balancing loss weighs as much as the cross-entropy: an error in it would be seen.
MODEL = preset("tiny").replace(
    text={"num_layers": 2},
    vision={"depth": 1, "patch_size": 4},
    moe={"router_aux_loss_coef": 0.5},
)


@functools.cache
def uneven_batch(images: bool = False) -> dict[str, jax.Array]:
    """Rows of two segments; the first has 1 label, some have all, one is nothing but padding."""
    batch = random_batch(0, MODEL, ROWS, LENGTH, 32)
    labels, segments = batch["labels"], batch["segment_ids"]
    labels[0] = IGNORE
    labels[0, 5] = 9
    labels[1:3] = np.where(segments[1:3] > 0, batch["tokens"][1:3], IGNORE)
    labels[3], segments[3], batch["patch_index"][3] = IGNORE, 0, -1
    return {
        name: jnp.asarray(x, jnp.float32 if name == "patches" else jnp.int32)
        for name, x in batch.items()
        if images or "patch" not in name
    }


@functools.cache
def params() -> dict:
    """Large enough values that layers, routers and tokens differ."""
    rng = np.random.default_rng(1)

    def value(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + 0.1 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(value, abstract_params(MODEL))


@functools.cache
def plain_step(
    grad_accum: int = 1, remat: str = "none", model: ModelConfig = MODEL, weighting: str = "token"
):
    """(params, batch) → (metrics, gradients) of one step on one device."""
    optimizer = optax.sgd(1.0, momentum=0.5)  # its first momentum is the gradient
    compute = Compute(moe_dispatch="ragged", remat=remat)
    step = jax.jit(
        make_train_step(
            model,
            compute,
            optimizer,
            dtype=jnp.float32,
            grad_accum=grad_accum,
            objective=Objective(loss_weighting=weighting),
        )
    )

    def run(params: dict, batch: dict) -> tuple[dict, dict]:
        trainable = {"params": params}
        state = TrainState(jnp.zeros((), jnp.int32), trainable, {}, optimizer.init(trainable))
        after, metrics = step(state, batch)
        assert after.step == 1
        gradients = flatten_dict(optax.tree.get(after.opt_state, "trace")["params"], sep="/")
        for path, leaf in flatten_dict(after.trainable["params"], sep="/").items():
            before = flatten_dict(params, sep="/")[path]
            np.testing.assert_allclose(leaf, before - gradients[path], rtol=1e-6, atol=1e-6)
        return {name: np.asarray(x) for name, x in metrics.items()}, gradients

    return run


def check_same(made: tuple[dict, dict], wanted: tuple[dict, dict], tolerance: float) -> None:
    for name, value in wanted[0].items():
        np.testing.assert_allclose(made[0][name], value, rtol=tolerance, err_msg=name)
    for name, value in wanted[1].items():
        error = np.abs(np.asarray(made[1][name]) - value).max()
        assert error <= tolerance * (np.abs(value).max() or 1.0), name


# --- The loss and its gradient --------------------------------------------------------------------


@functools.cache
def by_hand(weighting: str) -> dict[str, float]:
    """Loss and parts by their formulas, in numpy, from the model's logits."""
    batch = {name: np.asarray(x) for name, x in uneven_batch().items()}
    model = EchoVLM(MODEL)

    @jax.jit
    def forward(params, batch):
        out = model.apply({"params": params}, batch)
        logits = model.apply({"params": params}, out.hidden, method="logits")
        return logits, out.router_logits

    logits, routers = (np.asarray(x, np.float64) for x in forward(params(), uneven_batch()))
    samples: dict[tuple[int, int], list[float]] = {}
    for b in range(ROWS):
        for t in range(LENGTH - 1):
            label, segment = batch["labels"][b, t + 1], batch["segment_ids"][b, t]
            if label != IGNORE and segment and segment == batch["segment_ids"][b, t + 1]:
                row = logits[b, t] - logits[b, t].max()
                loss = np.log(np.exp(row).sum()) - row[label]
                samples.setdefault((b, segment), []).append(loss)
    labels = sum(map(len, samples.values()))
    power = {"token": 0.0, "square_root": 0.5, "sample": 1.0}[weighting]
    total = sum(sum(each) / len(each) ** power for each in samples.values())
    weight = sum(len(each) ** (1 - power) for each in samples.values())
    # Over all layers and tokens of the batch at once.
    counted = batch["segment_ids"] != 0
    rows = np.exp(routers[:, counted].reshape(-1, 4))
    rows /= rows.sum(axis=-1, keepdims=True)
    best = np.argsort(-rows, axis=-1)[:, :2]
    shares = np.array([(best == e).sum() / len(best) for e in range(4)])
    tokens = counted.sum()
    ce, aux = total / weight, 4 * (shares * rows.mean(axis=0)).sum()
    return {"loss": ce + 0.5 * aux, "ce_loss": ce, "aux_loss": aux, "labels": labels,
            "tokens": tokens, "dropped": 0.0}  # fmt: skip


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_loss_is_the_mean_over_all_labels(weighting):
    metrics, gradients = plain_step(weighting=weighting)(params(), uneven_batch())
    for name, value in by_hand(weighting).items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    norm = np.sqrt(sum(float(jnp.sum(x**2)) for x in gradients.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_the_slope_of_the_loss(seed):
    """Along a random direction, by central differences.

    Every token goes to all experts: where a choice of two changes, the loss has a step.
    """
    run, rng = plain_step(model=MODEL.replace(moe={"top_k": 4})), np.random.default_rng(seed)
    _, gradients = run(params(), uneven_batch())
    flat = flatten_dict(params(), sep="/")
    moved = [path for path in flat if not path.startswith("vision/")]
    norms = {path: np.linalg.norm(np.asarray(gradients[path])) for path in moved}
    assert all(norms.values())
    # Along the gradient of each array, up to its sign: the slope is then large against rounding.
    signs = {path: rng.choice([0.0, 1.0]) for path in moved}
    direction = {path: signs[path] * np.asarray(gradients[path]) / norms[path] for path in moved}
    slope = sum(float(np.vdot(gradients[path], direction[path])) for path in moved)
    ends = []
    for size in (1e-3, -1e-3):
        at = {path: x + size * direction.get(path, 0.0) for path, x in flat.items()}
        ends.append(run(_nested(at), uneven_batch())[0]["loss"])
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-3, slope, rtol=2e-3)


def _nested(flat: dict) -> dict:
    out: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        here = out
        for parent in parents:
            here = here.setdefault(parent, {})
        here[last] = jnp.asarray(leaf)
    return out


@pytest.mark.parametrize(
    ("parts", "weighting"),
    [pytest.param(2, "token", marks=pytest.mark.slow), (4, "token"), (4, "sample")],
)
def test_accumulation_makes_the_same_update(parts, weighting):
    check_same(
        plain_step(parts, weighting=weighting)(params(), uneven_batch()),
        plain_step(weighting=weighting)(params(), uneven_batch()),
        1e-6,
    )


@pytest.mark.slow
@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_what_is_stored_changes_no_gradient(remat):
    """By no more than its rounding: what is computed again may be rounded otherwise, and where a
    sum cancels (the coefficient's bias) that shows."""
    batch = uneven_batch(images=True)
    made, wanted = plain_step(remat=remat)(params(), batch), plain_step()(params(), batch)
    check_same((made[0], {}), (wanted[0], {}), 1e-6)
    rounding = last_bits_matter(batch)
    for name, value in wanted[1].items():
        error = np.abs(np.asarray(made[1][name]) - value).max()
        assert error <= max(1e-6 * np.abs(value).max(), rounding[name]), name


@functools.cache
def _last_bits_differ(seed: int) -> dict:
    """`params`, each number itself or one of the two beside it."""
    rng = np.random.default_rng(seed)

    def near(x: np.ndarray) -> np.ndarray:
        return np.nextafter(x, x + rng.choice([-1, 0, 1], x.shape).astype(np.float32))

    return jax.tree.map(near, params())


def last_bits_matter(batch: dict) -> dict[str, float]:
    """How much each gradient moves where the parameters' last bits do."""
    run = plain_step()
    wanted = run(params(), batch)[1]
    moved = [run(_last_bits_differ(seed), batch)[1] for seed in range(3)]
    return {
        name: max(float(np.abs(np.asarray(other[name]) - value).max()) for other in moved)
        for name, value in wanted.items()
    }


# --- The whole program ----------------------------------------------------------------------------


def program(devices: int = 1, model=MODEL, **changes) -> Program:
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.update_from_flattened_dict({**SMALL, "seq_len": LENGTH, **changes})
    return make_program(config, jax.devices()[:devices], model=model)


def bytes_of(tree: dict) -> dict[str, bytes]:
    return {path: np.asarray(leaf).tobytes() for path, leaf in flatten_dict(tree, sep="/").items()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_three_steps_train_what_trains_and_nothing_else(stage):
    """In bfloat16: what is frozen keeps every byte, and has no moments."""
    made = program(stage=stage, dtype="bfloat16", remat="none", warmup_fraction=0.0)
    state = init_state(made, jax.random.key(0))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * count(state.trainable)
    assert all(x.dtype == jnp.float32 for x in moments)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), made.state
    )
    frozen, first = bytes_of(state.frozen), bytes_of(state.trainable)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state.frozen))
    for seed in range(3):
        state, metrics = made.step(state, place(made, random_batch(seed, MODEL, 8, LENGTH, 32)))
        assert all(np.isfinite(x).all() for x in metrics.values()) and metrics["grad_norm"] > 0
    assert int(state.step) == 3
    assert bytes_of(state.frozen) == frozen
    last = bytes_of(state.trainable)
    assert {path for path in first if first[path] == last[path]} == set()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.trainable))


# --- What the compiled program holds --------------------------------------------------------------

# The largest weight of a layer; the stack of four and the tables, 8192 × 128, are larger.
WIDE = MODEL.replace(text={"vocab_size": 8192, "mlp_dim": 1536, "num_layers": 4})
ONE_LAYER = 1536 * 128 * 4


def shapes_in(text: str) -> set[tuple[int, ...]]:
    return {
        tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]\w*\[([\d,]+)\]", text)
    }


@pytest.fixture(scope="module")
def compiled():
    """The step of WIDE with its weights over eight devices, and the logits in 16 chunks."""
    with pytest.MonkeyPatch.context() as patch:
        losses = functools.partial(token_losses, logit_bytes=LENGTH * 512 * 4)
        patch.setattr(step_module, "token_losses", losses)
        made = program(8, WIDE, **{"mesh.fsdp": 8, "mesh.data": 1})
        return made.compile().as_text()


def test_no_parameter_is_gathered_whole(compiled):
    moved = [c for c in hlo.read(compiled).collectives if c.group_size > 1]
    kinds = {collective.kind for collective in moved}
    assert {"all-gather", "reduce-scatter"} <= kinds
    gathered = [c.result_bytes for c in moved if c.kind == "all-gather"]
    # A layer's weight is gathered when its turn comes, and no more than that at a time.
    assert max(gathered) == ONE_LAYER
    # Gradients of weights are scattered at once: what is summed whole are norms and biases.
    summed = [c.result_bytes for c in moved if c.kind == "all-reduce"]
    assert max(summed) < ONE_LAYER / 8


def test_logits_and_tables_never_exist_whole(compiled):
    shapes = shapes_in(compiled)
    local = (ROWS // 8) * LENGTH
    assert (8192, 128 // 8) in shapes or (16, 512, 128 // 8) in shapes
    assert not any(np.prod(shape) >= local * 8192 and 8192 in shape for shape in shapes
                   if LENGTH in shape)  # fmt: skip
    assert not {(8192, 128), (128, 8192)} & shapes
    assert (1, LENGTH, 512) in shapes  # a chunk
    assert not any(np.prod(shape) >= 8192 * 128 for shape in shapes)


def moved_tokens(dispatch: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """What the routed experts send over the four devices of the expert axis, while 32 tokens of
    width 128 lie on each device: kind, shape of the largest operand, whether of the backward pass.
    """
    sizes = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.expert": 4}
    changes = {"moe_dispatch": dispatch, "max_patches": 0, "remat": "none", **sizes}
    text = program(8, **changes).compile().as_text()
    return [
        (c.kind, max((s.dims for s in c.operands), key=np.prod), "transpose(jvp" in c.op_name)
        for c in hlo.read(text).collectives
        if c.group_size == 4 and "/layers/moe/" in c.op_name and "/moe/shared" not in c.op_name
    ]


@pytest.mark.slow
def test_einsum_sends_tokens_to_their_experts_and_back():
    moved = moved_tokens("einsum")
    for backward in (False, True):
        calls = [dims for kind, dims, back in moved if kind == "all-to-all" and back == backward]
        # Of each device's 32 places at each expert, one expert's go to each other device.
        assert len(calls) == 2 and all(dims[-2:] == (32, 128) for dims in calls)
    assert not [dims for kind, dims, _ in moved if kind == "all-gather"]


@pytest.mark.slow
def test_ragged_gathers_tokens_and_scatters_sums():
    moved = moved_tokens("ragged")
    for backward in (False, True):
        assert ("all-gather", (32, 128), backward) in moved
        assert ("reduce-scatter", (4 * 32, 128), backward) in moved
    # Weights of experts stay where they are: nothing else of more than two values a token moves.
    gathered = [dims for kind, dims, _ in moved if kind == "all-gather"]
    assert all(dims in ((32, 128), (32, 2), (32,)) for dims in gathered)
