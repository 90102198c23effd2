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
# # 3. Fine-tune on your own exams
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/03_fine_tune.ipynb)
#
# Your exams in the official JSON form become a dataset. A frozen base in int8 with low-rank updates
# beside it (QLoRA) learns them. Answers before and after are compared on patients that were held out,
# organ by organ, with 95 % intervals. What was learned is written as an adapter that PEFT reads.
#
# **You need** a CPU and five minutes: a small base is trained here first, on synthetic exams of other
# organs. For a checkpoint of 11.7 B parameters the compiler says that a TPU v5e chip of 16 GB will do
# (notebook 5); it was not run there yet. Take hours for it.
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
EXAMS_JSON = ""  # @param {type:"string"}
IMAGES = ""  # @param {type:"string"}
ORGAN = "thyroid"  # @param {type:"string"}
KNOWN = "breast"  # @param {type:"string"}
OWN_EXAMS = 700  # @param {type:"integer"}
STEPS = 250  # @param {type:"integer"}
RANK = 16  # @param {type:"integer"}
LEARNING_RATE = 0.003  # @param {type:"number"}
SEQ_LEN = 80  # @param {type:"integer"}
BASE_EXAMS, BASE_STEPS = 1200, 600
WORK = "fine_tune"
if SHORT := os.environ.get("ECHOVLM_NOTEBOOK") == "short":  # as the tests run it: random weights
    OWN_EXAMS, STEPS, SEQ_LEN = 24, 1, 256  # of which a token is a byte

# %%
from echovlm_jax.cli.frame import look_for_no_tpu

look_for_no_tpu()  # before anything imports jax

# %%
import json
import time
from pathlib import Path

from echovlm_jax.convert.peft import export_adapter
from echovlm_jax.data.build import Options, build, validate
from echovlm_jax.data.dataset import open_dataset
from echovlm_jax.data.tasks import TASKS
from echovlm_jax.demo import make_checkpoint, small_model
from echovlm_jax.evaluate.compare import compare, read_lines
from echovlm_jax.evaluate.harness import EvalOptions, evaluate
from echovlm_jax.memory import keep_freed_memory, spent
from echovlm_jax.phantom import write_exams
from echovlm_jax.processing.sheet import exam_sheet
from echovlm_jax.storage.verify import verify
from echovlm_jax.train.config_file import load_config, own_config
from echovlm_jax.train.loop import train

began = time.monotonic()
keep_freed_memory()
work = Path(WORK)

# %% [markdown]
# ## Your exams
#
# A list of records: an id, paths of images, a conversation. `organ`, `patient_id` and `reports` may be
# there. Records of LLaVA, LLaMA-Factory, ms-swift, OpenAI and Qwen are read as well. `EXAMS_JSON` is such
# a file, and `IMAGES` the folder that its paths begin in. Where they are empty, exams are made: of an
# organ that the base will know, and of one that it has never seen.

# %%
images = Path(IMAGES or work / "own")
source = Path(EXAMS_JSON or images / "phantom.json")
if not EXAMS_JSON and not images.exists():
    write_exams(images, OWN_EXAMS, 1, balanced=(ORGAN, KNOWN), cine=0.0, views=1, language="en")
print(json.dumps(json.loads(source.read_text("utf-8"))[0], indent=1, ensure_ascii=False))

# %% [markdown]
# ## A dataset
#
# `validate` says what could not be used, and why. `build` keeps a patient in one split: an exam that is
# tested on has no relative among those that are learned.

# %%
checked = validate([source], images)
print({key: checked[key] for key in ("records", "kept", "quarantined", "unnamed")})
data = work / "data"
if not data.exists():
    build([source], images, data, Options(validation=0.02, test=0.25))
learned, test = open_dataset(data), open_dataset(data, "test")
print(f"{len(learned)} exams to learn from, {len(test)} held out")
exam_sheet([learned.media(number)[0] for number in range(4)])

# %% [markdown]
# ## The base
#
# `MODEL` is a checkpoint. Where it is empty, a model of 1.4 M parameters learns the diagnoses of
# breast, liver and kidney here. It has never seen the organ of the other exams, nor its words.

# %%
if SHORT:
    MODEL = str(make_checkpoint(work / "random"))
base = MODEL or small_model(
    work / "base", exams=BASE_EXAMS, steps=(BASE_STEPS, 0), organs=("breast", "liver", "kidney")
)

# %% [markdown]
# ## Before

# %%
options = EvalOptions(tasks=("diagnosis",), batch_size=32, max_new_tokens=32, quantize="int8")
before = evaluate(base, data, work / "before", options)
shown = [line for line in read_lines(work / "before") if line["organ"] == ORGAN][:4]
for line in shown:
    print(f"right: {line['reference']:34} said: {line['prediction']}")

# %% [markdown]
# ## QLoRA
#
# `configs/colab_qlora.py` with the sizes of the small model. The base lies there in int8 and does not
# change. Low-rank updates beside every product are learned; the router, the gates and the mixture's
# coefficients learn in full. With a checkpoint of your own leave out what is under `small`.

# %%
small = {
    "global_batch_size": 14,
    "grad_accum": 1,
    "seq_len": SEQ_LEN,
    "max_patches": 64,
    "max_image_patches": 64,
    "dtype": "float32",
    "remat": "none",
    "moe_dispatch": "dense",
    "data_workers": 0 if SHORT else 1,
    "eval_every": STEPS,
    "checkpoint_every": STEPS,
}
changes = {
    "model": str(base),
    "data": str(data),
    "steps": STEPS,
    "learning_rate": LEARNING_RATE,
    "lora.rank": RANK,
    "lora.alpha": 2 * RANK,
    **{f"task_weights.{task}": float(task == "diagnosis") for task in TASKS},
}
config = load_config(own_config("colab_qlora"), changes | (small if SHORT or not MODEL else {}))
result = train(config, work / "run")
print(f"loss {result['final_loss']:.3f}, whole: {verify(work / 'run')['ok']}")

# %% [markdown]
# ## After
#
# The same questions about the same held-out exams.

# %%
after = evaluate(work / "run", data, work / "after", options)
names = {line["id"] for line in shown}
for line in read_lines(work / "after"):
    if line["id"] in names:
        print(f"right: {line['reference']:34} said: {line['prediction']}")

# %%
found = compare(work / "before", work / "after")
for organ, metrics in found["by_organ"].items():
    row, n = metrics["diagnosis_accuracy"], after["by_organ"][organ]["n"]
    low, high = after["by_organ"][organ]["intervals"]["diagnosis_accuracy"]
    print(f"{organ}: {row['a']:.0f} % → {row['b']:.0f} % ({low:.0f} to {high:.0f}) of {n} exams")
    low, high = row["interval"]
    print(f"  difference {row['difference']:+.0f} ({low:+.0f} to {high:+.0f}), p = {row['p']:.3f}")

# %% [markdown]
# Chance is 20 %. `after/report.html` has all tables and cases with their images. A difference whose
# interval holds 0 says nothing. Answers before were short of the new organ's words: part of what is
# learned is what its diagnoses are called.
#
# ## An adapter for PEFT
#
# The updates alone, and in full what was trained in full: for use on top of the same base.
# `echovlm convert BASE/ TUNED/ --adapter adapter/` merges it into a model of its own.

# %%
adapter = work / "adapter"
if not adapter.exists():
    export_adapter(work / "run", adapter)
for path in sorted(adapter.iterdir()):
    print(f"{path.stat().st_size:>10,}  {path.name}")

# %% [markdown]
# ## What it took

# %%
print(spent(began))
