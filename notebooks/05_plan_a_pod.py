# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5. Plan a pod
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/05_plan_a_pod.ipynb)
#
# `plan` compiles the very training step for a TPU slice that is not here, with the real compiler. It says
# whether the step fits, what fills the memory, and what limits the speed. Nothing is rented before that.
#
# **You need** a CPU on Linux (x86_64), 8 GiB of memory and a few minutes: each slice compiles the step of
# 11.7 B parameters once. No TPU is used; where there is one, it is left alone.

# %%
# @title Install: skipped where the package is there
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("echovlm_jax") is None:
    source = os.environ.get("ECHOVLM_SOURCE", "git+https://github.com/{REPOSITORY}.git")
    tpu = os.path.exists("/dev/vfio/0") or os.path.exists("/dev/accel0")
    chip = "[cuda12]" if os.path.exists("/dev/nvidia0") else "[tpu]" if tpu else ""
    # Together: jax and flax only work in pairs.
    wanted = [f"jax{chip}", "flax", "numpy", "orbax-checkpoint", source]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-U", *wanted], check=True)
    importlib.invalidate_caches()
    if {"jax", "numpy"} & set(sys.modules):
        print("Now restart: Runtime → Restart session. Then run all cells from the top.")

# %%
# @title Sizes
MODEL = "echovlm_11b"  # @param {type:"string"}
LARGE = "v5e:4x4"  # @param {type:"string"}
HALF = "v5e:2x4"  # @param {type:"string"}
SINGLE = "v5e:1x1"  # @param {type:"string"}
SMALL = {}  # changes of every configuration
if os.environ.get("ECHOVLM_NOTEBOOK") == "short":  # as the tests run it
    MODEL, LARGE, HALF, SINGLE, SMALL = "tiny", "v5e:1x1", "", "", {"data": "none"}
    SMALL |= {"global_batch_size": 1, "seq_len": 256, "max_patches": 256, "max_image_patches": 64}

# %% [markdown]
# The compiler has to be told, before JAX is loaded, that no TPU is to be looked for.

# %%
import importlib.util

from echovlm_jax.cli.measure import COMPILER_ONLY

os.environ.update(COMPILER_ONLY)
if importlib.util.find_spec("libtpu") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "libtpu"], check=True)

import time

from echovlm_jax.memory import spent
from echovlm_jax.plan import plan
from echovlm_jax.plan.picture import memory_picture
from echovlm_jax.train.config_file import load_config, own_config

began = time.monotonic()

# %% [markdown]
# ## All parameters on the larger slice
#
# `configs/full_finetune.py` trains everything, in float32 with Adam: 16 bytes a parameter, split over
# the chips. Below is what a plan looks like.

# %%
full = load_config(own_config("full_finetune"), {"model": MODEL, **SMALL})
plans = {f"full, {LARGE}": plan(full, LARGE)}
print(plans[f"full, {LARGE}"]["report"])

# %% [markdown]
# ## The same on half of it
#
# With half the chips, each holds twice as much of the parameters and of the optimizer's state.

# %%
if HALF:
    rows = {"global_batch_size": full.global_batch_size // 2}
    smaller = load_config(own_config("full_finetune"), {"model": MODEL, **SMALL, **rows})
    plans[f"full, {HALF}"] = plan(smaller, HALF)
    print(plans[f"full, {HALF}"]["report"])

# %% [markdown]
# ## What to change when it does not fit
#
# The report names the largest buffers, and what to change, the cheapest first. Train less: with QLoRA
# (`configs/colab_qlora.py`) the base lies there in int8, and low-rank updates train. One chip will do.

# %%
if SINGLE:
    qlora = load_config(own_config("colab_qlora"), {"model": MODEL, **SMALL})
    plans[f"QLoRA, {SINGLE}"] = plan(qlora, SINGLE)
    print(plans[f"QLoRA, {SINGLE}"]["report"])

# %% [markdown]
# ## What fills a chip
#
# A colour is a kind of array, a shade of it a group of parameters, the largest first; grey is what the
# step needs beside them. The red line is the chip's memory. Where a step does not fit, its temporaries
# are what the compiler asked for.

# %%
memory_picture(list(plans.values()), list(plans))

# %%
for name, result in plans.items():
    print(f"{name}: {'fits' if result['fits'] else 'does not fit'}")
    for kind, groups in result["parameter_bytes_per_chip"].items():
        print(f"  {kind:14}" + ", ".join(f"{g} {size / 2**30:.2f}" for g, size in groups.items()))
    if result["fits"]:
        print(f"  MFU at most {result['mfu_upper_bound']:.0%}, limited by {result['limit']}")

# %% [markdown]
# These are estimates of the compiler, not measurements. `echovlm plan --help` has the same on the
# command line, also for several slices, for generation (`--step decode --quantize int4`), and with any
# key of a configuration changed.
#
# ## What it took

# %%
print(spent(began))
