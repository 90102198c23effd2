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
# # 4. Inside the mixture
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/04_inside_the_mixture.ipynb)
#
# In every decoder layer a mixture of experts works beside the dense path. Each token goes to two experts;
# a coefficient says how much the mixture counts. Here: where the tokens of each organ go, whether image
# and text go to different experts, how the coefficient changes with the layer, and what becomes of right
# answers when one expert is switched off.
#
# **You need** a CPU and four minutes: a small model is trained here on synthetic exams first. A
# checkpoint of 11.7 B parameters, made by notebook 1, takes 12.4 GB in int8, so an
# accelerator of 16 GB; it was not run there yet.
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
MODEL = ""  # @param {type:"string"}
DATA = ""  # @param {type:"string"}
QUANTIZE = ""  # @param ["", "int8", "int4"]
EXAMS = 1000  # @param {type:"integer"}
STEPS = 550  # @param {type:"integer"}
READ = 60  # @param {type:"integer"}
WORK = "inside_the_mixture"
if SHORT := os.environ.get("ECHOVLM_NOTEBOOK") == "short":  # as the tests run it: random weights
    READ = 3

# %%
from echovlm_jax.cli.frame import look_for_no_tpu

look_for_no_tpu()  # before anything imports jax

# %%
import time
from pathlib import Path

from echovlm_jax import load_model
from echovlm_jax.data.dataset import open_dataset
from echovlm_jax.demo import make_checkpoint, small_model
from echovlm_jax.evaluate.mixture import (
    KINDS,
    effect_of_experts,
    mixture_of,
    read_exams,
    shares_by_organ,
)
from echovlm_jax.memory import keep_freed_memory, spent
from echovlm_jax.processing.sheet import exam_sheet
from echovlm_jax.train.heatmap import heatmap

began = time.monotonic()
keep_freed_memory()
work = Path(WORK)

# %% [markdown]
# ## The model, and exams that it has not seen
#
# `MODEL` and `DATA` are folders of your own. Where they are empty, a model of 1.4 M parameters learns
# the diagnoses of three organs here.

# %%
if SHORT:
    MODEL = str(make_checkpoint(work / "random"))
folder = MODEL or small_model(
    work / "model", exams=EXAMS, steps=(STEPS, 0), organs=("breast", "heart", "liver")
)
model = load_model(folder, quantize=QUANTIZE or None)
test = open_dataset(DATA or ("phantom" if MODEL else work / "model" / "data"), "test")
experts = model.config.moe.num_experts
for number in range(3):
    print(test.record(number).organ, "·", test.record(number).reports[-1].diagnosis)
exam_sheet([test.media(number)[0] for number in range(3)])

# %% [markdown]
# ## Where tokens go, by organ
#
# Each exam is read with its own right diagnosis. A row is an organ, a column an expert: white is an even
# share, red more, blue less. First the image's tokens, then those of the question.

# %%
read = read_exams(model, test, limit=READ)
print({organ: len(exams) for organ, exams in sorted(read.items())})
heatmap(shares_by_organ(read, experts, "image"), sorted(read))

# %%
heatmap(shares_by_organ(read, experts, "question"), sorted(read))

# %% [markdown]
# ## Image, question, answer
#
# All organs together: do the experts share the work by kind of token?

# %%
everything = mixture_of([one for exams in read.values() for one in exams], experts)
heatmap(everything.shares, KINDS)

# %% [markdown]
# ## How much the mixture counts, by layer
#
# A coefficient of 1 is the mixture alone, 0 the dense path alone.

# %%
print("layer " + " ".join(f"{kind:>9}" for kind in KINDS))
for layer, row in enumerate(everything.coefficient):
    print(f"{layer:5} " + " ".join(f"{value:9.3f}" for value in row))

# %% [markdown]
# ## An expert switched off
#
# One expert of a layer gives zero; tokens still go to it. The table has the change of the mean
# logarithmic probability of a right answer's token, in nats. Below 0: without this expert right answers
# become less likely. A rare expert may show nothing because few tokens go to it.

# %%
for layer in sorted({0, model.config.text.num_layers - 1}):
    print(f"layer {layer}   " + " ".join(f"expert {expert:<3}" for expert in range(experts)))
    for organ, changes in effect_of_experts(model, test, layer, limit=READ).items():
        print(f"{organ:10}" + " ".join(f"{change:+10.3f}" for change in changes))

# %% [markdown]
# ## What it took

# %%
print(spent(began))
