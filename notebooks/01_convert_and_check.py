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
# # 1. Convert and check
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/01_convert_and_check.ipynb)
#
# A checkpoint as it was released becomes one of ours. First its numbers are compared with PyTorch's,
# stage by stage. Then it is quantized tensor by tensor, and each shard is deleted once what was made of
# it is on the disk: 23.4 GB pass through a disk that has room for them and little more.
#
# **You need** a CPU and a minute: a small checkpoint with random weights is made here. For the released
# one, of 11.7 B parameters in bfloat16, you need the disk space of its files and one shard more, and 4 GiB
# of memory. No accelerator is used.
#
# Not a medical device.

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
SOURCE = ""  # @param {type:"string"}
GOLDEN = ""  # @param {type:"string"}
QUANTIZE = "int8"  # @param ["int8", "int4"]
DELETE_SHARDS = False  # @param {type:"boolean"}
SHARD = "2MB"  # @param {type:"string"}
STREAM = False  # @param {type:"boolean"}
ANSWER = False  # @param {type:"boolean"}
NEW_TOKENS = 16  # @param {type:"integer"}
WORK = "convert_and_check"
if os.environ.get("ECHOVLM_NOTEBOOK") == "short":  # as the tests run it
    STREAM, NEW_TOKENS = True, 1

# %%
from echovlm_jax.cli.frame import look_for_no_tpu

look_for_no_tpu()  # before anything imports jax

# %%
import time
from pathlib import Path

import numpy as np

from echovlm_jax import demo, load_model
from echovlm_jax.convert import convert, export
from echovlm_jax.convert.inspect import inspect
from echovlm_jax.convert.parity import parity
from echovlm_jax.memory import spent
from echovlm_jax.storage.verify import verify

began = time.monotonic()
work = Path(WORK)
work.mkdir(exist_ok=True)

# %% [markdown]
# ## The checkpoint
#
# `SOURCE` is a folder with `config.json`, tokenizer files and safetensors. Where it is empty, one of the
# same form is made, with random weights that are the same on every machine.

# %%
source = Path(SOURCE or work / "released")
if not SOURCE and not (source / "config.json").exists():
    one = demo.make_checkpoint(work / "one")
    export(one, source, max_shard_size=SHARD)
for path in sorted(source.iterdir()):
    print(f"{path.stat().st_size:>14,}  {path.name}")

# %%
found = inspect(source)
print(f"{found['params']:,} parameters, {found['bytes']:,} bytes, {found['dtype']}")
for module, count in sorted(found["by_module"].items(), key=lambda item: -item[1])[:8]:
    print(f"{count:>14,}  {module}")

# %% [markdown]
# ## The numbers, stage by stage
#
# PyTorch recorded what every stage gave for one input, on the same weights: positions, image embeddings,
# hidden states, the router's logits, coefficients, logits, losses and the tokens of an answer. The first
# stage that differs says where to look. For a released checkpoint record your own file with
# `tests/golden/make_golden.py`, and give it as `GOLDEN`. With `STREAM`, and where
# the model is too large for the memory, one decoder layer at a time is there.

# %%
golden = GOLDEN or ("" if SOURCE else demo.GOLDEN)
if golden:
    compared = parity(source, golden, stream=STREAM or None)
    for stage in compared["stages"]:
        print(f"{'ok  ' if stage['ok'] else 'DIFF'} {stage['max_abs_err']:.1e}  {stage['name']}")
    print(f"routing equal: {compared['router_agreement']:.0%};", end=" ")
    print(f"the same tokens: {compared['generated_match']}; all: {compared['ok']}")

# %% [markdown]
# What the wide model gives for a question, to compare with later (the small one alone).

# %%
asked = {"input_ids": np.arange(32, 96)[None], "attention_mask": np.ones((1, 64), np.int64)}
wide = None if SOURCE else np.asarray(load_model(source).forward(asked))

# %% [markdown]
# ## Convert and quantize, and let the shards go
#
# Every tensor is read once, rounded and written. `delete_source_shards` deletes a shard once its
# tensors were read back and equal their digests. **It uses the source up**: of a checkpoint of your own
# it is used only where `DELETE_SHARDS` says so. Links are refused, as in a cache of downloads. After a
# kill, the same cell goes on where it stopped.

# %%
target = work / QUANTIZE
made = convert(source, target, quantize=QUANTIZE, delete_source_shards=DELETE_SHARDS or not SOURCE)
print(f"{made['tensors']} tensors, {made['bytes']:,} bytes, {made['seconds']:.0f} s,", end=" ")
print(
    f"{made['peak_rss_bytes'] / 2**30:.1f} GiB of memory; deleted: {len(made.get('deleted', []))}"
)
for folder in (source, target):
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{size:>14,}  {folder}")

# %% [markdown]
# ## Check what was made
#
# `verify` compares every stored byte with its digest. It fails, by name, if one bit is another.

# %%
checked = verify(target)
print({key: checked[key] for key in ("ok", "arrays", "bytes", "corrupt")})

# %% [markdown]
# ## It answers
#
# The quantized folder is a model for `generate`, `eval` and fine-tuning (notebooks 2 and 3). With random
# weights the words mean nothing; what counts is how near the numbers are. A checkpoint of your own answers
# here where `ANSWER` says so: all of it is then in memory (of 11.7 B parameters 12 GB in int8).

# %%
if ANSWER or not SOURCE:
    model = load_model(target)
    answer = model.generate(None, "Write the report.", max_new_tokens=NEW_TOKENS)
    print(repr(answer["text"]))
if wide is not None:
    few = np.asarray(model.forward(asked))
    same = (wide.argmax(-1) == few.argmax(-1)).mean()
    print(f"logits differ by {np.abs(wide - few).max():.3f} at most, of {np.abs(wide).max():.2f}")
    print(f"the likeliest token is the same at {same:.0%} of places")

# %% [markdown]
# ## What it took

# %%
print(spent(began))
