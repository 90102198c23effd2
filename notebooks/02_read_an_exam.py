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
PICTURE = ""  # @param {type:"string"}
LOOP = ""  # @param {type:"string"}
MODEL = ""  # @param {type:"string"}
QUANTIZE = ""  # @param ["", "int8", "int4"]
EXAMS = 800  # @param {type:"integer"}
DIAGNOSIS_STEPS = 400  # @param {type:"integer"}
REPORT_STEPS = 300  # @param {type:"integer"}
NEW_TOKENS = 128  # @param {type:"integer"}
MAX_PIXELS = 0  # @param {type:"integer"}
WORK = "read_an_exam"  # @param {type:"string"}
if SHORT := os.environ.get("ECHOVLM_NOTEBOOK") == "short":  # as the tests run it: random weights
    NEW_TOKENS, MAX_PIXELS = 8, 112 * 112

# %%
from echovlm_jax.cli.frame import look_for_no_tpu

look_for_no_tpu()  # before anything imports jax

# %%
import json
import math
import time
from collections import Counter
from pathlib import Path

from echovlm_jax import load_model
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
keep_freed_memory()
work = Path(WORK)

# %% [markdown]
# ## The exam
#
# A synthetic exam of a liver, with the report that belongs to it. Your own file does as well: put its
# path into `PICTURE` (relative paths begin in this notebook's folder). PNG, JPEG, DICOM, TIFF, video
# and NIfTI are read; the content of a file decides, not its name.
#
# No picture leaves the computer that runs this notebook. In Colab that computer is Google's. A saved
# notebook keeps the pictures that it has shown, with a name that is written in them.

# %%
organs = ("heart", "liver", "thyroid")
if not (work / "exams").exists():
    write_exams(work / "exams", 12, 7, balanced=organs, cine=1.0, views=1, language="en")
exams = json.loads((work / "exams" / "phantom.json").read_text("utf-8"))
exam = next(e for e in exams if e["organ"] == "liver")
picture = Path(PICTURE) if PICTURE else work / "exams" / exam["image"][0]
sheet = exam_sheet([picture], height=360)
if not PICTURE:
    print(exam["conversations"][-1]["value"])
sheet

# %% [markdown]
# ## The model
#
# `MODEL` is a folder in Hugging Face's form, one that `echovlm convert` made, or a training run. Where
# it is empty, a model of 1.4 M parameters is trained here, from `EXAMS` synthetic exams, some of them
# held out: first `DIAGNOSIS_STEPS` (called alignment below), then `REPORT_STEPS` (instruction). That takes
# most of this notebook's minutes, more on a busy computer, and is kept: the next time it is found. Other
# sizes need another `WORK`. What is printed is the record of the training: you can go on without it.
#
# `QUANTIZE` rounds the weights to 8 or 4 bits, for a large model on a small accelerator; the small one
# needs none. `NEW_TOKENS` is the longest report, in tokens; a word is one or more.
#
# `crop=True` cuts DICOM frames to their ultrasound regions; of a PNG it says that it can't. A model reads
# pictures at the size that it was trained with: `MAX_PIXELS` 0. For the small one that is about 10,000
# pixels, a thumbnail.

# %%
if SHORT:
    MODEL = str(make_checkpoint(work / "random"))
folder = MODEL or small_model(
    work / "model", exams=EXAMS, steps=(DIAGNOSIS_STEPS, REPORT_STEPS), organs=organs
)
model = load_model(folder, quantize=QUANTIZE or None, crop=True, max_pixels=MAX_PIXELS or None)

# %% [markdown]
# ## A report, as it is written
#
# The first answer compiles the model, which takes longer than the answer. **The small model is often
# wrong**: of 42 exams that were held out it named the diagnosis of 28 (67 %, interval 52 to 79; hearts
# 67 %, livers 73 %, thyroids 56 %), once, with the sizes above. `echovlm eval
# read_an_exam/model/instruction --data read_an_exam/model/data --tasks diagnosis --out DIR` measures
# yours. Compare the answer with the report above.
#
# `asked` is the prompt, `question` below another: change them as you like. The small model knows English
# alone, and two tasks, the report and the diagnosis. To anything else it answers with a report, a
# diagnosis or nonsense.

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
# Always taking the likeliest word gives the likeliest name. Drawing words by their probabilities, eight
# times, shows what else the model holds possible. That all agree does not make them right: of a picture
# of nothing they may agree as well.

# %%
question = "What is the diagnosis in this ultrasound image? The name alone."
diagnosis = model.generate([picture], question, max_new_tokens=32)["text"]
others = Counter(
    model.generate([picture], question, max_new_tokens=32, temperature=1.0, seed=seed)["text"]
    for seed in range(8)
)
print(f"the likeliest: {diagnosis!r}\nof eight draws:")
for name, count in others.most_common():
    print(f"  {count} × {name!r}")

# %% [markdown]
# ## A conversation about the same exam
#
# `Chat` keeps what was said. The images stand before the first question. The small model has seen one
# question per exam in training: its later answers show that the conversation is kept, and nothing else.

# %%
chat = Chat(model, [picture])
for question_of_turn in (question, "Where is it?", "Write the report of this ultrasound image."):
    print(f"you:   {question_of_turn}\nmodel: {chat.ask(question_of_turn, max_new_tokens=48)}\n")

# %% [markdown]
# ## Where it looked
#
# One part of the picture after the other is made grey, at most 8 × 8, each an image token or more. Where
# the answer becomes less likely without a part, it is red. Full red is the part that counts most. Where
# even that one takes less than half of the probability, there is no full red: the answer depends on no
# part alone. This is what the answer depends on; it is no proof of a reason, and grey where all was
# black is something new as well. Of a DICOM file the region is shown, as the model sees it.

# %%
inputs = model.prepare([picture], question, max_new_tokens=32)
heat = where_looked(model, inputs, diagnosis or "normal", cells=8)[0]
print(f"{heat.shape[1]} × {heat.shape[0]} parts, of the answer {diagnosis!r}")
print(f"without the one that counts most it is {1 - math.exp(-max(0, heat.max())):.0%} less likely")
overlay(load_media(picture, crop=True), heat)

# %% [markdown]
# ## Which experts answered
#
# Every token, of the picture, of the question with its chat template, and of the answer, goes to two
# experts in each layer. A column is an expert: white is an even share, red more, blue less, and the
# darkest blue none at all; an answer of few tokens can't use all experts. The coefficient is the
# mixture's share of a layer: of 0.67, a third is the dense path's.

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
# header is shown, logged or kept. Frames are read in pairs: all of a loop up to 16, else 16, evenly
# spaced. Four are shown. The small model has seen hearts in stills alone: of a loop expect nonsense.
# `LOOP` is a file of your own.

# %%
cines = [work / "exams" / name for e in exams for name in e["image"] if name.endswith(".dcm")]
loop = Path(LOOP) if LOOP else cines[0]
print(model.generate([loop], asked, max_new_tokens=NEW_TOKENS)["text"])
exam_sheet([loop])

# %% [markdown]
# ## DICOM: real files
#
# A still and a loop that come with pydicom. They were made smaller, and their headers state regions of
# the old size. Such a region can't be used: all of the picture is read, with what is written in it
# ([how to find and blacken that](https://github.com/{REPOSITORY}/blob/main/docs/data.md#names-in-the-pixels)),
# and a line says so. `crop="require"` refuses
# such a file. For the small model these exams are OUTSIDE what it was trained on: expect nonsense, in
# fluent sentences too, about an organ that is not there.

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
