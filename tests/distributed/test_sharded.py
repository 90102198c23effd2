"""One model on meshes of eight devices: logits, loss and gradients are those of one device."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding

from echovlm_jax.config import ModelConfig, MoEConfig, TextConfig, VisionConfig
from echovlm_jax.mesh import AXES, activation_layout, make_mesh, param_shardings
from echovlm_jax.model import Compute, EchoVLM, abstract_params, logical_axes
from echovlm_jax.train import step as step_module
from echovlm_jax.train.loss import IGNORE, token_losses
from echovlm_jax.train.step import BATCH_AXES, Totals, loss_and_metrics, targets
from tests.distributed.train_steps import random_batch

ROWS, LENGTH, PATCHES = 8, 32, 32
# Every size that a mesh axis splits is a multiple of eight, the experts of four.
MODEL = ModelConfig(
    text=TextConfig(
        vocab_size=512,
        hidden_size=64,
        num_layers=2,
        num_heads=8,
        num_kv_heads=8,
        head_dim=8,
        mlp_dim=64,
        mrope_section=(2, 1, 1),
    ),
    vision=VisionConfig(depth=2, width=64, out_width=64, num_heads=8, mlp_dim=64, patch_size=2),
    # The balancing loss weighs as much as the cross-entropy: an error in it would be seen.
    moe=MoEConfig(expert_mlp_dim=16, shared_mlp_dim=32, router_aux_loss_coef=0.5),
    bos_token_id=0,
    eos_token_id=2,
    vision_start_token_id=3,
    vision_end_token_id=4,
    vision_pad_token_id=5,
    image_token_id=6,
    video_token_id=7,
)
# The einsum dispatch with room for exactly an even load is a form of its own.
FORMS = {
    "dense": {"moe_dispatch": "dense"},
    "ragged": {"moe_dispatch": "ragged"},
    "einsum": {"moe_dispatch": "einsum"},
    "einsum_full": {"moe_dispatch": "einsum", "capacity_factor": 1.0},
}
LOGIT_BYTES = 2**14  # a device's share of 32 tokens goes in four chunks of the vocabulary


def shapes_of(count: int) -> list[tuple[int, int, int, int]]:
    """All (data, fsdp, expert, tensor) that make `count` devices and split the four experts."""
    sizes = [n for n in range(1, count + 1) if count % n == 0]
    return [
        shape
        for shape in itertools.product(sizes, repeat=4)
        if np.prod(shape) == count and 4 % shape[2] == 0
    ]


SHAPES = [(*shape, 1) for shape in shapes_of(8)]
FAST = [
    ((1, 2, 2, 2, 1), "ragged"),
    ((2, 1, 2, 2, 1), "einsum"),
    ((1, 4, 1, 2, 1), "dense"),
]
REST = [
    *(pair for pair in itertools.product(SHAPES, FORMS) if pair not in FAST),
    *(((1, 4, 1, 1, 2), form) for form in FORMS if form != "einsum_full"),
]


# --- Cases: parameters and batches ----------------------------------------------------------------


@functools.cache
def base_params() -> dict:
    """Random values for every parameter; biases and norms too, and routers that have an opinion."""
    rng = np.random.default_rng(0)

    def value(path: tuple[str, ...], leaf: jax.Array) -> np.ndarray:
        if path[-1] == "scale":
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        size = 0.5 if path[-1] == "bias" else 1.0 if "router" in path else 0.15
        return (size * rng.normal(size=leaf.shape)).astype(np.float32)

    return {path: value(path, leaf) for path, leaf in flatten_dict(abstract_params(MODEL)).items()}


def marked(signs: np.ndarray, router: list[float]) -> dict:
    """Parameters with which a token's first feature decides where it goes.

    The residual stream's first feature is ±8 by token (images: +8) and no layer changes it much;
    the router reads nothing else.
    """
    params = {path: value.copy() for path, value in base_params().items()}
    params["text", "embed", "embedding"][:, 0] = 8 * signs
    params["vision", "merger", "fc2", "bias"][0] = 8
    params["vision", "merger", "fc2", "kernel"][0] = 0
    for path, value in params.items():
        if path[-2:] == ("router", "kernel"):
            value[:] = 0
            value[:, :, 0] = router
        if path[-2:] == ("mlp_norm", "scale"):
            value[:, 0] = 0.5
    return params


def packed(*, padding: bool) -> dict:
    """Rows of two exams with images; with padding, also a row that is nothing else."""
    batch = random_batch(1, MODEL, ROWS, LENGTH, PATCHES)
    if padding:
        for name, nothing in (("segment_ids", 0), ("labels", IGNORE), ("patch_index", -1)):
            batch[name][3] = nothing
        batch["patch_segment_ids"][3] = 0
    else:
        batch["segment_ids"] = np.where(batch["segment_ids"] == 1, 1, 2)
        # Images count as even tokens: as many odd ones make each row's halves equal.
        images = batch["patch_index"] >= 0
        for row, image in zip(batch["tokens"], images, strict=True):
            text = np.flatnonzero(~image)
            row[text] -= row[text] % 2
            row[text[: LENGTH // 2]] += 1
    return batch


@functools.cache
def cases() -> dict[str, tuple[dict, dict]]:
    """Name → parameters and batch: where tokens go, and how many are none."""
    ones = np.ones(MODEL.text.vocab_size)
    signs = np.where(np.arange(MODEL.text.vocab_size) % 2, -1, 1)
    ties = {
        path: np.zeros_like(value) if "router" in path else value
        for path, value in base_params().items()
    }
    some, full = packed(padding=True), packed(padding=False)
    one_expert = marked(ones, [0.0, 0.2, 0.0, 0.4])
    halves = marked(signs, [0.4, 0.2, -0.4, -0.2])
    made = {
        "random": (base_params(), some),
        "ties": (ties, some),
        "one expert": (one_expert, some),
        "one expert, nothing padded": (one_expert, full),
        "every place taken": (halves, full),
    }
    return {name: (unflatten_dict(params), batch) for name, (params, batch) in made.items()}


def case_names(form: str) -> list[str]:
    """With room for an even load only, an even load is what no grouping of tokens changes."""
    return ["every place taken"] if form == "einsum_full" else list(cases())


# --- The function under test ----------------------------------------------------------------------


def everything(params: dict, batch: dict, *, compute: Compute) -> dict:
    """Logits, loss, its parts, and the gradients of the loss with respect to all parameters."""
    wanted = targets(batch["labels"], batch["segment_ids"])
    labels = jnp.sum(wanted != IGNORE).astype(jnp.float32)
    totals = Totals(
        labels=labels,
        weight=labels,
        tokens=jnp.sum(batch["segment_ids"] != 0).astype(jnp.float32),
    )
    hidden = []

    def losses(x: jax.Array, head: jax.Array, *args: jax.Array, **options) -> jax.Array:
        # On a mesh the vocabulary goes by in chunks; one device holds all of its logits at once.
        hidden.append(x)
        most = LOGIT_BYTES if compute.layout.rules else 2**30
        return token_losses(x, head, *args, **options, logit_bytes=most)

    def loss(params: dict) -> tuple[jax.Array, tuple]:
        settings = {"config": MODEL, "compute": compute, "dtype": jnp.float32}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_module, "token_losses", losses)
            value, metrics = loss_and_metrics({"params": params}, batch, totals, **settings)
        return value, (metrics, hidden.pop())

    grads, (metrics, last) = jax.grad(loss, has_aux=True)(params)
    model = EchoVLM(MODEL, jnp.float32, compute=compute)
    logits = model.apply({"params": params}, last, method="logits")
    # What comes out at padding is nobody's; it is not compared.
    logits = jnp.where((batch["segment_ids"] != 0)[..., None], logits, 0)
    return {"logits": logits, "metrics": metrics, "grads": grads}


@functools.cache
def compiled(form: str, sizes: tuple[int, ...] | None):
    """(params, batch) → everything, on a mesh of these sizes (in the order of AXES), or on none."""
    if sizes is None:
        return jax.jit(functools.partial(everything, compute=Compute(**FORMS[form])))
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    layout = activation_layout(mesh)
    run = jax.jit(functools.partial(everything, compute=Compute(**FORMS[form], layout=layout)))
    places = param_shardings(logical_axes(MODEL), abstract_params(MODEL), mesh)

    def call(params: dict, batch: dict) -> dict:
        with jax.set_mesh(mesh):
            batch = {
                name: jax.device_put(x, NamedSharding(mesh, layout.spec(*BATCH_AXES[name])))
                for name, x in batch.items()
            }
            return run(jax.device_put(params, places), batch)

    return call


def found(form: str, sizes: tuple[int, ...] | None, case: str) -> dict[str, np.ndarray]:
    params, batch = cases()[case]
    batch = {
        name: jnp.asarray(x, jnp.float32 if name == "patches" else jnp.int32)
        for name, x in batch.items()
    }
    made = flatten_dict(compiled(form, sizes)(params, batch), sep="/")
    return {name: np.asarray(value) for name, value in made.items()}


@functools.cache
def on_one_device(form: str, case: str) -> dict[str, np.ndarray]:
    return found(form, None, case)


def check_equal(made: dict, wanted: dict, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of each array's largest value."""
    assert made.keys() == wanted.keys()
    wrong = {}
    for name, value in wanted.items():
        scale = float(np.abs(value).max()) or 1.0
        error = float(np.abs(made[name].astype(np.float64) - value).max()) / scale
        if not error <= tolerance:
            wrong[name] = error
    assert not wrong


def check_mesh(sizes: tuple[int, ...], form: str) -> None:
    """Nothing is dropped in any case, so that dense is what every form has to equal."""
    for case in case_names(form):
        check_equal(found(form, sizes, case), on_one_device("dense", case))


@pytest.mark.parametrize(("sizes", "form"), FAST, ids=str)
def test_a_mesh_changes_nothing(sizes, form):
    check_mesh(sizes, form)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "form"), REST, ids=str)
def test_no_mesh_changes_anything(sizes, form):
    check_mesh(sizes, form)


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in FORMS if form != "dense"])
def test_the_dispatches_agree_on_one_device(form):
    for case in case_names(form):
        check_equal(on_one_device(form, case), on_one_device("dense", case))


def choices(case: str) -> np.ndarray:
    """The experts of every token, best first: [L, B, T, k]."""
    params, batch = cases()[case]
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    out = jax.jit(EchoVLM(MODEL, jnp.float32).apply)({"params": params}, batch)
    return np.asarray(jax.lax.top_k(out.router_logits, MODEL.moe.top_k)[1])


def test_the_cases_are_what_they_are_called():
    tokens = cases()["one expert"][1]["segment_ids"] != 0
    assert (choices("one expert")[:, tokens] == [3, 1]).all()
    assert (choices("ties")[:, tokens] == [0, 1]).all()
    full = choices("every place taken")
    for expert in range(4):
        assert ((full == expert).sum(axis=(2, 3)) == LENGTH // 2).all()
    assert (cases()["every place taken"][1]["segment_ids"] != 0).all()
    assert not tokens[3].any() and 0 < tokens[0].sum() < LENGTH
    assert len(SHAPES) == 19 and {pair[0] for pair in FAST + REST} >= set(SHAPES)
