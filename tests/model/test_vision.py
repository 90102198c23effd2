"""The vision tower with windows: what lies beside a frame, or a window, changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echovlm_jax.config import preset
from echovlm_jax.model import Compute, EchoVLM, init_params
from echovlm_jax.model.vision import VisionEncoder
from echovlm_jax.processing.batch import make_batch
from tests.parity.cases import inputs_of

CONFIG = preset("tiny_v2").replace(
    text={"vocab_size": 64, "num_layers": 1, "hidden_size": 32, "head_dim": 8, "mlp_dim": 16}
    | {"mrope_section": (1, 1, 2)},
    vision={"width": 32, "out_width": 32, "mlp_dim": 24, "num_heads": 2, "patch_size": 4}
    | {"window_size": 16, "depth": 3, "full_attention_layers": (1,)},
)
# Windows of 2 × 2 cells, whole and cut; 276 and 104 patches, more than the keys around a query.
EXAMS = [
    [2, ("image", 1, 10, 18), 3, ("video", 3, 8, 4, 0.3), 4],
    [1, ("video", 2, 6, 6, 1.7), ("image", 1, 2, 2), ("image", 1, 14, 2), 6],
]


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def packed(batches):
    """One row of several exams, as training has them."""
    out: dict[str, list[np.ndarray]] = {key: [] for key in batches[0]}
    patches = frames = 0
    for n, batch in enumerate(batches):
        moved = dict(batch)
        moved["segment_ids"] = batch["segment_ids"] * (n + 1)
        moved["patch_segment_ids"] = batch["patch_segment_ids"] + frames
        index = batch["patch_index"]
        moved["patch_index"] = np.where(index >= 0, index + patches // 4, -1).astype(np.int32)
        patches += batch["patches"].shape[1]
        frames += batch["patch_segment_ids"].max()
        for key, value in moved.items():
            out[key].append(value)
    axes = {"positions": 2}
    return {key: np.concatenate(values, axis=axes.get(key, 1)) for key, values in out.items()}


@pytest.mark.parametrize(
    "attention", ["xla", pytest.param("splash_interpret", marks=pytest.mark.slow)]
)
def test_packed_rows_are_unpacked_rows(params, attention):
    singles = [make_batch(CONFIG, inputs_of([exam], CONFIG, n)) for n, exam in enumerate(EXAMS)]
    row = packed(singles)
    for key in ("patches", "patch_segment_ids", "patch_positions"):  # and padding behind
        row[key] = np.pad(row[key], [(0, 0), (0, 36)] + [(0, 0)] * (row[key].ndim - 2))
    model = EchoVLM(CONFIG, compute=Compute(attention=attention))
    forward = jax.jit(lambda p, b: model.apply({"params": p}, b, method="forward"))
    together = forward(params, row)[0]
    at = 0
    for single in singles:
        alone = forward(params, single)[0]
        np.testing.assert_allclose(together[at : at + len(alone)], alone, atol=2e-5)
        at += len(alone)
    assert at == together.shape[0]


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_of_packed_rows(params, remat):
    """The sum of the single ones', whatever the backward pass finds stored."""
    singles = [make_batch(CONFIG, inputs_of([exam], CONFIG, n)) for n, exam in enumerate(EXAMS)]
    model = EchoVLM(CONFIG, compute=Compute(remat=remat))

    @jax.jit
    @jax.grad
    def gradient(params, batch):
        return jnp.sum(jnp.sin(model.apply({"params": params}, batch, method="forward")))

    together = gradient(params, packed(singles))
    alone = jax.tree.map(jnp.add, *(gradient(params, single) for single in singles))
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max()))


@pytest.mark.parametrize(("full", "seen"), [((), 16), ((2,), 10 * 18)])
def test_a_patch_reaches_its_window_and_by_full_layers_its_frame(full, seen):
    """By the gradient of one token of the second frame for all pixels."""
    vision = CONFIG.replace(vision={"full_attention_layers": full}).vision
    batch = make_batch(CONFIG, inputs_of([[1, ("video", 2, 10, 18, 1.0), 2]], CONFIG))
    args = [batch[key] for key in ("patches", "patch_segment_ids", "patch_positions")]
    encoder = VisionEncoder(vision)
    params = encoder.init(jax.random.key(1), *args)["params"]

    @jax.jit
    @jax.grad
    def pull(patches):
        return jnp.sum(encoder.apply({"params": params}, patches, *args[1:])[0, 45])

    reached = np.asarray(jnp.any(pull(args[0])[0] != 0, axis=-1))
    assert reached.sum() == seen
    inside = np.zeros((10, 18), bool)
    inside[tuple(args[2][0, 180:][reached[180:]].T)] = True
    assert inside[:4, :4].all() and not reached[:180].any()
