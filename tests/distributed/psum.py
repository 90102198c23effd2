"""A program for several processes: adds over all devices, or misbehaves.

psum.py add OUT.npz | fail PROCESS CODE | raise PROCESS | sleep FOLDER
"""

import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from echovlm_jax.mesh import make_mesh


def add(out: str) -> None:
    """Every device holds one row of random numbers; psum gives all of them the sum of the rows."""
    rows = np.random.default_rng(0).integers(-1000, 1000, (jax.device_count(), 5)).astype("float32")
    # The processes are what a slower network joins.
    mesh = make_mesh({"fsdp": -1}, dcn={"data": jax.process_count()})
    spec = PartitionSpec(("data", "fsdp"))
    x = jax.make_array_from_callback(
        rows.shape, NamedSharding(mesh, spec), lambda index: rows[index]
    )
    total = jax.jit(
        jax.shard_map(
            lambda row: jax.lax.psum(row, ("data", "fsdp")),
            mesh=mesh,
            in_specs=spec,
            out_specs=PartitionSpec(),
        )
    )(x)
    if jax.process_index() == 0:
        held = [np.shape(shard.data) for shard in x.addressable_shards]
        shape = [jax.process_count(), jax.local_device_count(), jax.device_count()]
        owners = [[d.process_index for d in row.flat] for row in mesh.devices]
        np.savez(out, total=total, rows=rows, held=held, shape=shape, owners=owners)


if __name__ == "__main__":
    mode, *words = sys.argv[1:]
    me = jax.process_index()
    if mode == "add":
        add(*words)
    elif mode in ("fail", "raise") and me == int(words[0]):
        print("process", me, "gives up")
        if mode == "raise":
            raise ValueError("wrong on purpose")
        sys.exit(int(words[1]))
    else:  # the others wait for what will not come
        if mode == "sleep":
            (Path(words[0]) / f"{me}.tmp").write_text(str(os.getpid()))
            (Path(words[0]) / f"{me}.tmp").rename(Path(words[0]) / f"{me}.pid")
        time.sleep(600)
