"""How exact a sum of gradients over many devices is, by the dtype that it is added up in.

The gradients are real ones: those of the rows of phantom's batches, one a device, in bfloat16, on
a model that has trained a little. The sums are simulated, add by add.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from echovlm_jax.data import make_batches
from echovlm_jax.train.config_file import load_config, own_config
from echovlm_jax.train.program import init_state, make_program
from echovlm_jax.train.step import loss_and_metrics, totals_of

ROWS, KEPT = 256, 2048  # devices with a gradient of their own; numbers looked at of each array
Add = Callable[[np.ndarray, np.ndarray], np.ndarray]


def in_bfloat16(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a + b).astype(ml_dtypes.bfloat16).astype(np.float32)


def ring(pieces: np.ndarray, add: Add) -> np.ndarray:
    """[N, …] → […]: one after the other, as a piece travels round."""
    total = pieces[0]
    for piece in pieces[1:]:
        total = add(total, piece)
    return total


def tree(pieces: np.ndarray, add: Add) -> np.ndarray:
    while len(pieces) > 1:
        pieces = add(pieces[::2], pieces[1::2])
    return pieces[0]


def steps(pieces: np.ndarray, add: Add, sizes: tuple[int, ...]) -> np.ndarray:
    """Rings inside rings, as over the axes of a torus; `ops.collectives` goes 8 × 8 over 64."""
    for size in sizes:
        pieces = np.stack([ring(pieces[i::len(pieces) // size], add)
                           for i in range(len(pieces) // size)])  # fmt: skip
    return pieces[0]


def row_gradients(trained: int = 64) -> dict[str, np.ndarray]:
    """Of each array some numbers of each row's gradient: bfloat16 values, [ROWS, KEPT]."""
    changes = {"data_workers": 0, "global_batch_size": 8, "dtype": "bfloat16"}
    config = load_config(own_config("phantom"), changes)
    program = make_program(config, jax.devices()[:1])
    batches = make_batches(config)

    def rows(count: int) -> Iterator[dict[str, np.ndarray]]:
        for _ in range(count // config.global_batch_size):
            batch = next(batches)
            for r in range(config.global_batch_size):
                yield {name: batch[name][r : r + 1] for name in program.batch}

    @jax.jit
    def gradient(params, row):
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)  # as a product sees it

        def loss(narrow):
            return loss_and_metrics(
                {"params": narrow}, row, totals_of(row), config=program.model,
                compute=program.compute, dtype=jnp.bfloat16,
            )[0]  # fmt: skip

        return jax.grad(loss)(narrow)

    with jax.set_mesh(program.mesh):
        params = init_state(program, jax.random.key(0)).trainable["params"]
        for row in rows(trained):  # plain descent, so that they are no longer those of a beginning
            params = jax.tree.map(lambda p, g: p - 0.02 * g, params, gradient(params, row))
        rng = np.random.default_rng(0)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        at = [rng.choice(leaf.size, min(KEPT, leaf.size), replace=False) for _, leaf in leaves]
        found: list[list[np.ndarray]] = [[] for _ in leaves]
        for row in rows(ROWS):
            for kept, i, leaf in zip(
                found, at, jax.tree.leaves(gradient(params, row)), strict=True
            ):
                kept.append(np.asarray(leaf, np.float32).ravel()[i])
    batches.close()  # type: ignore[attr-defined]
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    return {name: np.stack(kept) for name, kept in zip(names, found, strict=True)}


def errors(gradients: dict[str, np.ndarray], devices: int) -> dict[str, np.ndarray]:
    """Way of adding → the relative error (L2) of each array's sum."""
    rng = np.random.default_rng(devices)
    sizes = (8, 8) if devices == 64 else (8, 8, 32)  # 2,048: copies of 64
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "ring, bfloat16": lambda x: ring(x, in_bfloat16),
        "steps, bfloat16": lambda x: steps(x, in_bfloat16, sizes),
        "tree, bfloat16": lambda x: tree(x, in_bfloat16),
        "ring, float32": lambda x: ring(x, np.add),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    found["noise of the batch"] = []
    for rows in gradients.values():
        # More devices than rows: drawn again.
        pieces = rows[rng.choice(ROWS, devices, replace=devices > ROWS)]
        exact = pieces.astype(np.float64).sum(0)
        size = np.linalg.norm(exact)
        if not size:
            continue
        for name, way in ways.items():
            found[name].append(float(np.linalg.norm(way(pieces) - exact) / size))
        spread = rows.std(0, ddof=1) * np.sqrt(devices)
        found["noise of the batch"].append(float(np.linalg.norm(spread) / size))
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.slow
def test_bfloat16_loses_what_float32_keeps():
    gradients = row_gradients()
    for devices in (64, 2048):
        found = errors(gradients, devices)
        for name, values in found.items():
            print(f"{devices:5} devices, {name:20}: median {np.median(values):.1e},"
                  f" worst {values.max():.1e}", file=sys.stderr)  # fmt: skip
        assert found["ring, float32"].max() < 1e-4
        assert np.median(found["steps, bfloat16"]) > 100 * np.median(found["ring, float32"])
