"""A program for several processes: restores the newest checkpoint and saves the next.

checkpoints.py FOLDER save STEP | FOLDER restore STEP | FOLDER damage
"""

import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echovlm_jax.checkpoint import open_checkpoints
from echovlm_jax.storage.files import as_path, below, write_bytes


def state(step: int, *spec: str | None) -> dict[str, jax.Array]:
    """Each device holds a part, or all of them the same."""
    mesh = Mesh(np.array(jax.devices()), ("x",))
    out = {}
    for name, parts in (("split", spec), ("whole", ())):
        values = np.random.default_rng([step, len(name)]).normal(size=(64, 64)).astype("float32")
        where = NamedSharding(mesh, PartitionSpec(*parts))
        out[name] = jax.make_array_from_callback(
            values.shape, where, lambda index, values=values: values[index]
        )
    return out


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def check(checkpoints, step: int) -> None:
    wanted = state(step, None, "x")
    found, extra = checkpoints.restore(step, like(wanted))
    assert extra == {"step": step}
    for name in wanted:
        for a, b in zip(
            found[name].addressable_shards, wanted[name].addressable_shards, strict=True
        ):
            np.testing.assert_array_equal(a.data, b.data)


if __name__ == "__main__":
    folder, mode = as_path(sys.argv[1]), sys.argv[2]
    with open_checkpoints(folder, keep=2) as checkpoints:
        if mode == "save":
            step = int(sys.argv[3])
            newest = checkpoints.latest()
            assert newest == (step - 1 or None), newest
            if newest:
                check(checkpoints, newest)
            checkpoints.save(step, state(step, "x"), {"step": step})
            checkpoints.wait()
            check(checkpoints, step)
            parts = {name.split("/")[0] for name in below(folder / str(step) / "state")}
            assert sum(p.startswith("ocdbt.process_") for p in parts) == jax.process_count()
        elif mode == "restore":
            assert checkpoints.latest() == int(sys.argv[3])
            check(checkpoints, int(sys.argv[3]))
        else:
            if jax.process_index() == 0:
                stored = folder / "3/state"
                names = [name for name in below(stored) if name.startswith("ocdbt.process_1/d/")]
                path = max((stored / name for name in names), key=lambda p: len(p.read_bytes()))
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 4
                write_bytes(path, data)
            multihost_utils.sync_global_devices("damaged")
            step, *_ = checkpoints.restore_latest(like(state(3, None, "x")))
            assert step == 2
            check(checkpoints, 2)
