"""Dropout of the updates' inputs: what it depends on, and what it doesn't; updates of experts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from echovlm_jax.config import MoEConfig, preset
from echovlm_jax.model import Compute, param_specs, shapes_of
from echovlm_jax.model.layers import Linear
from echovlm_jax.model.moe import MoE
from echovlm_jax.model.params import describe
from echovlm_jax.train import step as step_module
from echovlm_jax.train.lora import init_lora, lora_specs, scaled, with_dropout
from echovlm_jax.train.program import init_state
from echovlm_jax.train.stages import how_it_trains
from echovlm_jax.train.step import Objective, TrainState, make_eval_step, make_train_step
from tests.distributed.train_steps import place, random_batch
from tests.train.test_step import LENGTH, MODEL, program

RNG = np.random.default_rng(0)
SPECS = param_specs(preset("tiny"))


def some_updates():
    low = shapes_of(lora_specs(SPECS, how_it_trains(SPECS, "instruction"), 2))
    return jax.tree.map(lambda s: RNG.normal(size=s.shape).astype(np.float32), low)


def keys_of(tree) -> dict[str, np.ndarray]:
    flat = flatten_dict(tree, sep="/")
    return {
        path: np.asarray(jax.random.key_data(key)).reshape(-1, 2)
        for path, key in flat.items()
        if path.endswith("/key")
    }


def test_every_matrix_of_every_layer_has_a_key_of_its_own():
    low = some_updates()
    made = with_dropout(low, SPECS, jax.random.key(1), 0.25)
    flat, before = flatten_dict(made, sep="/"), flatten_dict(low, sep="/")
    assert all(flat[path] is before[path] for path in before)
    keys = keys_of(made)
    model = preset("tiny")
    assert len(keys) == len(before) // 2
    layers = {"text": model.text.num_layers, "vision": model.vision.depth}
    for path, data in keys.items():
        assert len(data) == (1 if "merger" in path else layers[path.split("/")[0]])
        np.testing.assert_array_equal(flat[path.replace("/key", "/keep")], 0.75)
    every = np.concatenate(list(keys.values()))
    assert len(np.unique(every, axis=0)) == len(every)
    again = keys_of(with_dropout(low, SPECS, jax.random.key(1), 0.25))
    assert all((again[path] == keys[path]).all() for path in keys)
    other = np.concatenate(
        list(keys_of(with_dropout(low, SPECS, jax.random.key(2), 0.25)).values())
    )
    assert len(np.unique(np.concatenate([every, other]), axis=0)) == 2 * len(every)


def test_dropout_is_of_the_updates_inputs_alone():
    """Over many keys the mean is the product without it; the product itself never changes."""
    layer = Linear("BTD,NHD->BTNH", (2, 3, 16), ("heads", "head_dim", "embed"))
    x = jnp.asarray(RNG.normal(size=(2, 5, 16)), jnp.float32)
    kernel, a, b = (
        jnp.asarray(RNG.normal(size=shape), jnp.float32)
        for shape in ((2, 3, 16), (4, 16), (2, 3, 4))
    )

    def run(x, lora):
        return layer.apply({"params": {"kernel": kernel}, "lora": lora}, x)

    boxed = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    specs = describe({"layer": boxed})

    def dropped(key):
        return run(x, with_dropout({"layer": {"a": a, "b": b}}, specs, key, 0.25)["layer"])

    plain = np.asarray(run(x, {"a": a, "b": b}))
    base = np.asarray(run(x, {"a": a, "b": jnp.zeros_like(b)}))
    keys = jax.random.split(jax.random.key(0), 4000)
    made = np.asarray(jax.jit(jax.vmap(dropped))(keys))
    error = made.std(axis=0) / len(keys) ** 0.5
    assert error.min() > 0
    assert np.abs((made.mean(axis=0) - plain) / error).max() < 5
    # One draw is the update of inputs of which some are 0 and the others 4/3 of what they were.
    low = np.linalg.lstsq(
        np.asarray(b).reshape(6, 4), (made[0] - base).reshape(10, 6).T, rcond=None
    )
    assert low[1].max() < 1e-6 and np.abs(made[0] - plain).max() > 0.1


# --- A step's keys, seen through a loss that shows them -------------------------------------------

TINY_BATCH = {
    "labels": jnp.asarray(RNG.integers(0, 9, (4, 6)), jnp.int32),
    "segment_ids": jnp.ones((4, 6), jnp.int32),
}


@pytest.fixture
def shown(monkeypatch):
    """A loss whose gradient over `a` is a number made of the module's key."""
    seen = []

    def loss(variables, batch, totals, **_):
        flat = flatten_dict(variables["lora"], sep="/")
        seen.append(set(path.rpartition("/")[2] for path in flat))
        total = jnp.float32(0)
        for path in [path for path in flat if path.endswith("/a")]:
            key = flat.get(path.removesuffix("a") + "key")
            if key is not None:
                noise = jax.random.uniform(key if key.ndim == 0 else key[0])
                total += noise * jnp.sum(flat[path]) * jnp.sum(batch["segment_ids"])
        return total, {"loss": total, "ce_loss": total}

    monkeypatch.setattr(step_module, "loss_and_metrics", loss)
    return seen


def updates(*names: str) -> dict:
    one = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
    return {"params": {}, "lora": {"vision": {"merger": dict.fromkeys(names, one)}}}


def noises(step_number: int, *, grad_accum: int = 1, seed: int = 0, rate: float = 0.1):
    optimizer = optax.sgd(1.0)
    trainable = updates("fc1", "fc2")
    state = TrainState(jnp.int32(step_number), trainable, {}, optimizer.init(trainable))
    update = make_train_step(
        MODEL,
        Compute(),
        optimizer,
        grad_accum=grad_accum,
        lora_dropout=rate,
        seed=seed,
        objective=Objective(balance_over="row"),  # over the batch it asks the model itself
    )
    after, _ = jax.jit(update)(state, TINY_BATCH)
    moved = after.trainable["lora"]["vision"]["merger"]
    return {name: float(1 - moved[name]["a"][0, 0]) / 24 for name in moved}


def test_a_draw_depends_on_seed_step_part_and_matrix(shown):
    first = noises(3)
    assert noises(3) == first  # a run that goes on draws what it would have drawn
    assert 0 < first["fc1"] != first["fc2"]
    others = [noises(4), noises(3, seed=1), noises(3, grad_accum=4)]
    values = [round(one["fc1"], 5) for one in (first, *others)]
    assert len(set(values)) == len(values)


def test_no_rate_no_keys_and_an_evaluation_has_none(shown):
    noises(3, rate=0.0)
    assert shown and all(names == {"a", "b"} for names in shown)
    shown.clear()
    make_eval_step(MODEL, Compute())(updates("fc1"), {}, TINY_BATCH)
    assert shown == [{"a", "b"}]


# --- Experts --------------------------------------------------------------------------------------


def test_an_update_of_stacked_experts_equals_merged_weights():
    config = MoEConfig(num_experts=4, top_k=2, expert_mlp_dim=24, shared_mlp_dim=16)
    layer = MoE(config, 32, Compute(moe_dispatch="ragged"))
    u = jnp.asarray(RNG.normal(size=(2, 9, 32)), jnp.float32)
    boxed = jax.eval_shape(layer.init, jax.random.key(0), u)["params"]
    params = jax.tree.map(
        lambda x: jnp.asarray(RNG.normal(size=x.shape) * 0.2, jnp.float32), nn.meta.unbox(boxed)
    )
    how = dict.fromkeys((f"text/layers/moe/{p}" for p in flatten_dict(params, sep="/")), "frozen")
    names = [f"text/layers/moe/experts/{name}/kernel" for name in ("gate", "up", "down")]
    how |= dict.fromkeys(names, "lora")
    specs = lora_specs(describe({"text": {"layers": {"moe": boxed}}}), how, 3)
    assert specs["text/layers/moe/experts/down/a"].shape == (4, 3, 24)
    made = flatten_dict(init_lora(specs, jax.random.key(1))["text"]["layers"]["moe"], sep="/")
    assert 0.9 * 24**-0.5 < np.abs(made["experts/down/a"]).max() <= 24**-0.5
    low = {
        path: leaf if path.endswith("a") else jnp.asarray(RNG.normal(size=leaf.shape), jnp.float32)
        for path, leaf in made.items()
    }
    merged = flatten_dict(params, sep="/")
    for name in ("gate", "up", "down"):
        a, b = (np.asarray(low[f"experts/{name}/{half}"]) for half in "ab")
        merged[f"experts/{name}/kernel"] = merged[f"experts/{name}/kernel"] + 0.5 * np.stack(
            [b[e] @ a[e] for e in range(4)]
        )
    update = scaled(unflatten_dict(low, sep="/"), 0.5)
    run = jax.jit(lambda variables: layer.apply(variables, u)[0])
    wanted = run({"params": unflatten_dict(merged, sep="/")})
    size = float(jnp.abs(wanted).max())
    made = run({"params": params, "lora": update})
    np.testing.assert_allclose(made, wanted, atol=1e-5 * size)
    assert float(jnp.abs(run({"params": params}) - wanted).max()) > 0.1 * size


# --- The whole step -------------------------------------------------------------------------------


def two_losses(devices: int, **changes) -> list[float]:
    made = program(devices, stage="instruction", moe_dispatch="dense", **changes)
    with jax.set_mesh(made.mesh):
        state = init_state(made, jax.random.key(0))
        # Random ones: equal updates make equal features, whose norms' gradients are rounding.
        keys = iter(jax.random.split(jax.random.key(1), 100))
        low = jax.tree.map(
            lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), state.trainable["lora"]
        )
        state = state._replace(trainable={**state.trainable, "lora": low})
        found = []
        for seed in range(2):
            state, metrics = made.step(state, place(made, random_batch(seed, MODEL, 8, LENGTH, 32)))
            found += [float(metrics["loss"]), float(metrics["grad_norm"])]
    return found


@pytest.mark.slow
def test_a_step_with_dropout_is_the_same_on_every_mesh_and_however_it_is_stored():
    one = two_losses(1, **{"lora.dropout": 0.5, "remat": "none"})
    np.testing.assert_allclose(two_losses(8, **{"lora.dropout": 0.5}), one, rtol=1e-4)
    np.testing.assert_allclose(
        two_losses(1, **{"lora.dropout": 0.5, "remat": "full"}), one, rtol=1e-5
    )
    without = two_losses(1, **{"lora.dropout": 0.0, "remat": "none"})
    assert abs(without[0] - one[0]) > 1e-3
