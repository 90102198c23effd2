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
# # 2. Read an exam
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/02_read_an_exam.ipynb)
#
# A picture goes in. A report, a diagnosis and a conversation come out. Then we look at what the answer
# depends on, and at which experts gave it.
#
# **You need** a CPU and five minutes: a small model is trained here on synthetic exams first. It knows
# nothing of real ones. A checkpoint of 11.7 B parameters, made by notebook 1, takes 12.4 GB in int8, so
# an accelerator of 16 GB; it was not run there yet.
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
QUANTIZE = ""  # @param ["", "int8", "int4"]
EXAMS = 800  # @param {type:"integer"}
DIAGNOSIS_STEPS = 400  # @param {type:"integer"}
REPORT_STEPS = 300  # @param {type:"integer"}
NEW_TOKENS = 128  # @param {type:"integer"}
MAX_PIXELS = 0  # @param {type:"integer"}
WORK = "read_an_exam"
if SHORT := os.environ.get("ECHOVLM_NOTEBOOK") == "short":  # as the tests run it: random weights
    NEW_TOKENS, MAX_PIXELS = 8, 112 * 112

# %%
import json
import time
from pathlib import Path

from echovlm_jax import load_model
from echovlm_jax.cli.frame import look_for_no_tpu
from echovlm_jax.demo import example_exam, make_checkpoint, small_model
from echovlm_jax.evaluate.looked import overlay, where_looked
from echovlm_jax.evaluate.mixture import KINDS, mixture_of, read_answer
from echovlm_jax.generate.chat import Chat
from echovlm_jax.memory import keep_freed_memory, spent
from echovlm_jax.phantom import write_exams
from echovlm_jax.processing.images import load_media
from echovlm_jax.processing.sheet import exam_sheet
from echovlm_jax.train.heatmap import heatmap

began = time.monotonic()
look_for_no_tpu()
keep_freed_memory()
work = Path(WORK)

# %% [markdown]
# ## The exam
#
# A synthetic exam of a liver, with the report that belongs to it. Your own file does as well: put its
# path into `picture`. PNG, JPEG, DICOM, TIFF, video and NIfTI are read; the content of a file
# decides, not its name.

# %%
organs = ("heart", "liver", "thyroid")
if not (work / "exams").exists():
    write_exams(work / "exams", 12, 7, balanced=organs, cine=1.0, views=1, language="en")
exams = json.loads((work / "exams" / "phantom.json").read_text("utf-8"))
exam = next(e for e in exams if e["organ"] == "liver")
picture = work / "exams" / exam["image"][0]
print(exam["conversations"][-1]["value"])
exam_sheet([picture])

# %% [markdown]
# ## The model
#
# `MODEL` is a folder in Hugging Face's form, one that `echovlm convert` made, or a training run. Where
# it is empty, a model of 1.4 M parameters is trained here. `crop=True` cuts DICOM frames to their
# ultrasound regions; of a PNG it says that it can't.

# %%
if SHORT:
    MODEL = str(make_checkpoint(work / "random"))
folder = MODEL or small_model(
    work / "model", exams=EXAMS, steps=(DIAGNOSIS_STEPS, REPORT_STEPS), organs=organs
)
model = load_model(folder, quantize=QUANTIZE or None, crop=True, max_pixels=MAX_PIXELS or None)

# %% [markdown]
# ## A report, as it is written

# %%
asked = "Read this ultrasound image and write the report: findings first, then the impression."
report = model.generate(
    [picture],
    asked,
    max_new_tokens=NEW_TOKENS,
    stream=lambda piece: print(piece, end="", flush=True),
)
print(f"\n\n{report['new_tokens']} tokens, {report['decode_tokens_per_second']:.0f} a second")

# %% [markdown]
# ## A diagnosis
#
# Greedy decoding gives the likeliest name. Sampling shows what else the model holds possible.

# %%
question = "What is the diagnosis in this ultrasound image? The name alone."
diagnosis = model.generate([picture], question, max_new_tokens=32)["text"]
others = {
    model.generate([picture], question, max_new_tokens=32, temperature=1.0, seed=seed)["text"]
    for seed in range(8)
}
print(f"{diagnosis}\nof eight samples: {', '.join(sorted(others))}")

# %% [markdown]
# ## A conversation about the same exam
#
# `Chat` keeps what was said. The images stand before the first question. The small model has seen one
# question an exam in training, so its later answers mean little.

# %%
chat = Chat(model, [picture])
for question_of_turn in (question, "Where is it?", "Write the report of this ultrasound image."):
    print(f"you:   {question_of_turn}\nmodel: {chat.ask(question_of_turn, max_new_tokens=48)}\n")

# %% [markdown]
# ## Where it looked
#
# One part of the picture after the other is made grey. Where the answer becomes less likely without a
# part, it is red. This is what the answer depends on; it is no proof of a reason.

# %%
inputs = model.prepare([picture], question, max_new_tokens=32)
heat = where_looked(model, inputs, diagnosis or "normal", cells=8)[0]
print(f"the largest loss of a part: {heat.max():.2f} nats, of the answer {diagnosis!r}")
overlay(load_media(picture), heat)

# %% [markdown]
# ## Which experts answered
#
# Every token goes to two experts in each layer. Red: more than an even share; blue: less. The
# coefficient says how much the mixture counts beside the dense path.

# %%
read = read_answer(model, inputs, diagnosis or "normal")
mixture = mixture_of([read], model.config.moe.num_experts)
for number, kind in enumerate(KINDS):
    print(
        f"{kind:9} {mixture.tokens[number]:4} tokens, coefficient of the mixture by layer:",
        " ".join(f"{value:.2f}" for value in mixture.coefficient[:, number]),
    )
heatmap(mixture.shares, KINDS)

# %% [markdown]
# ## DICOM: a cine loop
#
# A synthetic loop of a heart. The yellow outline is the ultrasound region that the header states: what
# lies outside, on a real machine often a name, is cut away before the model sees it. Nothing else of a
# header is shown, logged or kept. The small model has seen hearts in stills alone.

# %%
loop = next(work / "exams" / name for e in exams for name in e["image"] if name.endswith(".dcm"))
print(model.generate([loop], asked, max_new_tokens=NEW_TOKENS)["text"])
exam_sheet([loop])

# %% [markdown]
# ## DICOM: real files
#
# A still and a loop that come with pydicom. They were scaled down, and their headers state regions of
# the old size: such a region can't be used, and a line says so. `crop="require"` refuses such a file.
# For the small model these exams are OUTSIDE what it was trained on: expect nonsense.

# %%
still, cine = example_exam().with_name("examples_palette.dcm"), example_exam()
exam_sheet([still, cine])

# %%
for name, images in (("still", [still]), ("cine", [cine]), ("both, as one exam", [still, cine])):
    answer = model.generate(images, asked, max_new_tokens=NEW_TOKENS)
    print(f"{name}: {answer['prompt_tokens']} tokens of prompt\n  {answer['text']}\n")

# %% [markdown]
# ## What it took

# %%
print(spent(began))
