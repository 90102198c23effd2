"""A program for several processes: a few training steps of a small model on random packed rows.

train_steps.py OUT.npz [KEY=VALUE …]   keys of the training configuration, values in JSON

Whatever the processes, the batches and the first parameters are the same. OUT holds every step's
metrics, the first step's gradients (as Adam's first moments hold them) and the last parameters.
"""

import json
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from echovlm_jax.config import ModelConfig, preset
from echovlm_jax.train.loss import IGNORE
from echovlm_jax.train.program import Program, init_state, make_program

STEPS = 3
CONFIG = Path(__file__).parents[2] / "configs" / "full_finetune.py"
SMALL = {
    "model": "tiny",
    "steps": 20,
    "learning_rate": 1e-3,
    "global_batch_size": 8,
    "seq_len": 48,
    "max_patches": 32,
    "dtype": "float32",
    "param_dtype": "float32",
}
# More layers would tell no more, and compile for longer.
LAYERS = {"text": {"num_layers": 2}, "vision": {"depth": 2}}
FRAMES = ((4, 4), (2, 4))  # patches of a row's two images: height, width


def random_batch(seed: int, model: ModelConfig, rows: int, length: int, patches: int) -> dict:
    """Rows of two exams and padding; the first exam has two images."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(8, model.text.vocab_size, (rows, length))
    segments = np.zeros((rows, length), np.int64)
    starts = np.zeros_like(segments)
    ends = np.stack([rng.integers(14, 20, rows), rng.integers(24, length + 1, rows)], axis=1)
    columns = np.arange(length)
    for r, (first, second) in enumerate(ends):
        segments[r] = np.where(columns < first, 1, np.where(columns < second, 2, 0))
        starts[r] = np.where(columns < first, 0, first)
    labels = np.where((rng.random((rows, length)) < 0.6) & (segments > 0), tokens, IGNORE)
    grids = [
        # Patches come in blocks that the merger joins.
        np.array([(2 * y + j, 2 * x + i) for y in range(h // 2) for x in range(w // 2)
                  for j in range(2) for i in range(2)])
        for h, w in FRAMES
    ]  # fmt: skip
    frames = np.concatenate([np.full(len(grid), i + 1) for i, grid in enumerate(grids)])
    used = len(frames)
    index = np.full((rows, length), -1)
    index[:, 2 : 2 + used // 4] = np.arange(used // 4)
    pad = (0, max(patches - used, 0))
    return {
        "tokens": tokens,
        "labels": labels,
        "segment_ids": segments,
        "positions": np.repeat((columns - starts)[:, None], 3, axis=1),
        "organs": np.minimum(segments, 1) * (np.arange(rows) % 7)[:, None],
        "patch_index": index,
        "patches": rng.normal(size=(rows, patches, model.vision.patch_dim)),
        "patch_segment_ids": np.tile(np.pad(frames, pad), (rows, 1)),
        "patch_positions": np.tile(np.pad(np.concatenate(grids), (pad, (0, 0))), (rows, 1, 1)),
    }


def place(program: Program, whole: dict) -> dict:
    """Each process gives its own devices their part."""
    return {
        name: jax.make_array_from_callback(
            struct.shape, struct.sharding, lambda i, x=whole[name], s=struct: x[i].astype(s.dtype)
        )
        for name, struct in program.batch.items()
    }


def named(prefix: str, tree: object, program: Program) -> dict[str, np.ndarray]:
    """Every leaf, whole, by its path."""
    everywhere = NamedSharding(program.mesh, PartitionSpec())
    tree = jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {prefix + jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def main(out: str, *changes: str) -> None:
    config = runpy.run_path(str(CONFIG))["get_config"]()
    given = {key: json.loads(value) for key, value in (one.split("=", 1) for one in changes)}
    config.update_from_flattened_dict({**SMALL, **given})
    program = make_program(config, model=preset(config.model).replace(**LAYERS))
    found: dict[str, np.ndarray] = {}
    with jax.set_mesh(program.mesh):
        state = init_state(program, jax.random.key(config.seed))
        for step in range(STEPS):
            rows, length = program.batch["tokens"].shape
            whole = random_batch(step, program.model, rows, length, config.max_patches)
            state, metrics = program.step(state, place(program, whole))
            found |= named(f"metrics/{step}/", metrics, program)
            if step == 0:
                found |= named("moments/", state.opt_state, program)
        found |= named("params/", state.trainable, program)
    found["layout"] = np.array([jax.process_count(), jax.local_device_count()])
    if jax.process_index() == 0:
        np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
