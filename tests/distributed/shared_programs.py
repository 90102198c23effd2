"""A process that compiles as `train` does on a TPU slice, and tells what it found compiled."""

import json
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import cache_key
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echovlm_jax.train import compile_cache

# As on TPUs: a program's name in the cache is the same in all processes.
cache_key._hash_accelerator_config = lambda *_: None
compile_cache.PLATFORMS.add("cpu")
seen: Counter[str] = Counter()
compile_cache.use_compile_cache()
mesh = Mesh(np.array(jax.devices()), ("x",))
x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x")))
lowered = jax.jit(lambda x: jnp.tanh(x @ x.T).sum()).lower(x)
fails = sys.argv[2:] == [str(jax.process_index())]
jax.monitoring.register_event_listener(lambda name, **_: seen.update([name.rpartition("/")[2]]))


def compile_():
    if fails:
        raise ValueError("can't")
    return lowered.compile()


try:
    compile_cache.in_turn(compile_)
    made = "found" if seen["cache_hits"] else "compiled"
except ValueError:
    made = "failed"
with open(f"{sys.argv[1]}.{jax.process_index()}", "w") as file:
    json.dump(made, file)
