"""The whole way on this machine: synthetic exams, two stages of training, evaluation, a report.

Nothing is downloaded, so the model begins with random weights, and both stages train all of them.
It learns synthetic exams and knows nothing of real ones. That the numbers are PyTorch's is shown
too: PyTorch recorded its own in `demo_golden.npz`, from weights that `make_checkpoint` makes again.
"""

import contextlib
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from echovlm_jax.config import ModelConfig, preset, to_hf
from echovlm_jax.convert import export, safetensors
from echovlm_jax.convert.from_torch import convert
from echovlm_jax.convert.parity import parity
from echovlm_jax.convert.table import slots
from echovlm_jax.data.build import Options, build
from echovlm_jax.data.dataset import open_dataset
from echovlm_jax.data.examples import texts_of
from echovlm_jax.data.record import ORGANS
from echovlm_jax.data.tasks import TASKS
from echovlm_jax.data.tokenizer import SPECIAL, byte_tokenizer, train_sentencepiece
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.cases import Case
from echovlm_jax.evaluate.folder import REPORT
from echovlm_jax.evaluate.harness import EvalOptions, evaluate
from echovlm_jax.evaluate.report import write_report
from echovlm_jax.load import load_model
from echovlm_jax.phantom import write_exams
from echovlm_jax.processing.images import load_media
from echovlm_jax.storage import layout
from echovlm_jax.train.config_file import load_config, own_config
from echovlm_jax.train.loop import train

GOLDEN = Path(__file__).with_name("demo_golden.npz")
QUESTION = "Write the ultrasound report of these images."
CONFIG: ModelConfig = preset("tiny").replace(text={"vocab_size": len(SPECIAL) + 256})  # bytes
# What tells a folder of ours, that may be replaced.
_MARK, _MADE = "demo.json", {"made_by": "echovlm demo"}

EXAMS, HELD_OUT = 3500, 250  # about 210 are in the test split
# What it learns in these minutes; questions, with a share of the steps, stayed at chance.
_ASKED = ("report", "diagnosis")
EVALUATION = EvalOptions(tasks=_ASKED, batch_size=35, max_new_tokens=128)
_SPLITS = Options(validation=0.02, test=0.06)
_CONTROLS = {"evaluation": "given", "blind": "blind", "shuffled": "shuffled"}
_NO_TASK = {f"task_weights.{task}": 0.0 for task in TASKS}
# An English report takes 150 tokens of the demo's tokenizer: small rows, so short steps.
ROWS: Mapping[str, int] = {"global_batch_size": 4, "seq_len": 256, "max_patches": 256}
# What differs from configs/phantom.py in each stage.
STAGES: Mapping[str, Mapping[str, Any]] = {
    # Which picture goes with which word. Nothing is pretrained, so nothing is left as it is. An
    # exam a row, and nothing but its diagnosis: 1,000 steps that mixed in reports left held-out
    # diagnoses at chance.
    "alignment": {
        "stage_rules": ((".*", "full"),),
        "steps": 1100,
        "global_batch_size": 14,
        "seq_len": 80,
        "max_patches": 64,
        **_NO_TASK,
        "task_weights.diagnosis": 1.0,
    },
    # Reports beside diagnoses, at half the rate. All of it trains here too: low-rank updates of the
    # text over a tower left as it is did not learn what reports state. Where every label weighs the
    # same, diagnoses are unlearned: 69 % of the held-out ones were right, so 79 % (seed 0).
    "instruction": {
        "stage_rules": ((".*", "full"),),
        "steps": 680,
        "learning_rate": 1e-3,
        "loss_weighting": "square_root",
        **ROWS,
        **_NO_TASK,
        "task_weights.report": 1.0,
        "task_weights.diagnosis": 1.0,
    },
}


def demo(
    out: str | Path,
    *,
    image: str | Path | None = None,
    seed: int = 0,
    exams: int = EXAMS,
    held_out: int = HELD_OUT,
    stages: Mapping[str, Mapping[str, Any]] = STAGES,
) -> dict[str, Any]:
    """Trains a small EchoVLM on synthetic exams, evaluates it and lets it answer.

    `out` gets exams/ (the images and official JSON), data/ (the dataset), tokenizer/, a folder for
    each stage's run, model/ (a MODEL folder), evaluation/, blind/, shuffled/, and report.html.

    Args:
      out: a new folder, or one that an earlier demo made, which is replaced.
      image: a picture or DICOM file to answer on at the end; by default a real cine loop that
        ships with pydicom.
      seed: of the exams and of all that is random.
      exams: how many are made.
      held_out: of how many of the test split, at most, it is asked.
      stages: keys of the configuration that each stage changes, in order.

    Returns:
      seconds, out, model, report; eval, blind and shuffled (`evaluate`'s results, with the exams'
      images, without any, and with those of other exams of the same organ); parity (ok, logits,
      router_agreement, …); answers (name, text, note).

    Raises:
      InputError: `out` is not a demo's, or `image` can't be read.
    """
    began = time.perf_counter()
    out = Path(out)
    _fresh(out)
    exam = Path(image) if image is not None else example_exam()
    pictures = load_media(exam)  # now: what can't be read is said before minutes of training
    with _step("PyTorch's numbers, from a random checkpoint"):
        compared = _parity(out / "parity")
    with _step(f"{exams} synthetic exams, and a tokenizer from their texts"):
        make_data(out, exams, seed)
    runs = []
    for name, changes in stages.items():
        with _step(f"training: {name}"):
            start = {"tokenizer": str(out / "tokenizer")} if not runs else {"model": str(runs[-1])}
            own = {"seed": seed, "stage": name, "data": str(out / "data"), **start, **changes}
            runs.append(out / name)
            train_whole(demo_config("phantom", own), runs[-1])
    with _step("the model, in Hugging Face form"):
        export(runs[-1], out / "model")
    model, data, options = out / "model", out / "data", replace(EVALUATION, limit=held_out)
    asked = min(held_out, len(open_dataset(data, "test")))
    with _step(f"{asked} held-out exams, with their images, without, and with others'"):
        results = {
            name: evaluate(model, data, out / name, replace(options, images=mode), report=False)
            for name, mode in _CONTROLS.items()
        }
    with _step("answers, and the report"):
        cases = _answers(out, exam.name, pictures)
        page = write_report(
            out / "evaluation",
            title="EchoVLM, trained on synthetic exams",
            runs=runs,
            compared={"no image": out / "blind", "another exam's image": out / "shuffled"},
            extra_cases=cases,
        )
        shutil.copyfile(page, out / REPORT)
    result = {
        "seconds": time.perf_counter() - began,
        "out": str(out),
        "model": str(out / "model"),
        "report": str(out / REPORT),
        "eval": results["evaluation"],
        "blind": results["blind"],
        "shuffled": results["shuffled"],
        "parity": compared,
        "answers": [{"name": c.name, "text": c.prediction, "note": c.note} for c in cases],
    }
    (out / _MARK).write_text(json.dumps(_MADE | result, indent=2, ensure_ascii=False), "utf-8")
    return result


def _fresh(out: Path) -> None:
    """An empty folder, marked as ours."""
    if out.is_symlink() or (out.exists() and not _made_by_us(out / _MARK)):
        raise InputError(f"{out}: exists and no demo made it; name a new folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).write_text(json.dumps(_MADE))


def _parity(folder: Path) -> dict[str, Any]:
    """A tiny random checkpoint, converted and compared with what PyTorch recorded."""
    make_checkpoint(folder / "torch")
    convert(folder / "torch", folder / "model")
    found = parity(folder / "model", GOLDEN)
    _say(
        f"     {'equal' if found['ok'] else 'DIFFERENT at ' + str(found['first_divergence'])}"
        f": logits to {found['logits']['max_abs_err']:.1e}, routing"
        f" {found['router_agreement']:.0%}, gradients to {found['grad_norm_max_rel_err']:.1e}"
    )
    keys = (
        "ok", "logits", "router_agreement", "generated_match", "loss_err", "aux_loss_err",
        "grad_norm_max_rel_err",
    )  # fmt: skip
    return {key: found[key] for key in keys}


def make_data(out: Path, exams: int, seed: int, *, balanced: bool | Sequence[str] = True) -> None:
    """Synthetic exams with one image each in out/exams, the dataset of them in out/data, and a
    tokenizer from its texts in out/tokenizer.

    Args:
      balanced: organs equally often, or these organs alone; else as in the paper's data.
    """
    workers = os.cpu_count() or 1
    # One language: with two, half of the steps would go into the other's words.
    made = {"balanced": balanced, "cine": 0.0, "views": 1, "language": "en", "workers": workers}
    write_exams(out / "exams", exams, seed, **made)
    sources = [out / "exams" / "phantom.json"]
    build(sources, out / "exams", out / "data", _SPLITS, workers=workers)
    train_sentencepiece(texts_of(out / "data"), out / "tokenizer")


def small_model(
    out: str | Path,
    *,
    exams: int = 2100,
    steps: Sequence[int] = (700, 100),
    organs: Sequence[str] = ORGANS,
    seed: int = 0,
) -> Path:
    """A model that has learned a little of synthetic exams, for a first hour without a checkpoint.

    `out` gets exams/ (images and official JSON), data/ (the dataset), tokenizer/, and a run for
    each stage of STAGES. A second call finds the model there.

    Args:
      out: a new folder, or one that the same call has begun.
      exams: how many are made, organs equally often.
      steps: of each stage; 0 leaves it out.
      organs: those that there are exams of.
      seed: of the exams and the training.

    Returns:
      The last stage's folder, a MODEL folder.

    Raises:
      InputError: `out` is of another call, or a number is out of its range.
    """
    if len(steps) != len(STAGES) or min(steps) < 0 or not any(steps):
        raise InputError(f"steps must be {len(STAGES)} numbers from 0, not all 0: {list(steps)}")
    out = Path(out)
    asked = {"exams": exams, "steps": list(steps), "organs": list(organs), "seed": seed}
    begun = _begun(out)
    if out.exists() and begun != asked:
        raise InputError(
            f"{out}: holds a model of other sizes, or something else; name a new folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).write_text(json.dumps(asked))
    if not (out / "tokenizer").is_dir():
        for name in ("exams", "data"):
            shutil.rmtree(out / name, ignore_errors=True)
        make_data(out, exams, seed, balanced=organs)
    run = out
    for (name, changes), count in zip(STAGES.items(), steps, strict=True):
        if not count:
            continue
        start = {"model": str(run)} if run != out else {"tokenizer": str(out / "tokenizer")}
        own = {"seed": seed, "stage": name, "data": str(out / "data"), "steps": count}
        run = out / name
        if layout.steps(run / layout.CHECKPOINTS)[-1:] != [count]:
            train_whole(demo_config("phantom", {**start, **changes, **own}), run)
    return run


def _begun(out: Path) -> Any:
    try:
        return json.loads((out / _MARK).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def demo_config(name: str, changes: Mapping[str, Any]) -> Any:
    """configs/NAME.py with some keys changed, saved and evaluated rarely; its rows are rounded up
    to a multiple of this machine's devices."""
    rarely = {"eval_every": 300, "checkpoint_every": 300, "checkpoint_keep": 1}
    config: Any = load_config(own_config(name), {**rarely, **changes})
    devices = jax.device_count()
    config.global_batch_size = devices * -(-config.global_batch_size // devices)
    return config


def train_whole(config: Any, run: Path) -> None:
    """`train`, to its end. Raises KeyboardInterrupt where it was told to stop before that."""
    if train(config, run)["stopped"]:
        raise KeyboardInterrupt


def _answers(out: Path, name: str, pictures: np.ndarray) -> list[Case]:
    """What the model says of a held-out exam and of a picture that is like none it has seen."""
    model = load_model(out / "model")
    test = open_dataset(out / "data", "test")
    shown = (
        ("a held-out synthetic exam", test.media(0), "Synthetic, not in the training data."),
        (name, [pictures], "A real exam: OUTSIDE what the model was trained on, expect nonsense."),
    )
    cases = []
    for title, images, note in shown:
        text = model.generate(images, QUESTION, max_new_tokens=128)["text"]
        reference = test.record(0).reports[-1] if images is not shown[1][1] else None
        right = f"{reference.findings} {reference.impression}" if reference else ""
        cases.append(Case(title, images, QUESTION, text, note, right))
        _say(f"     {title}: {text}\n     ({note})")
    return cases


def _made_by_us(mark: Path) -> bool:
    try:
        return json.loads(mark.read_text("utf-8")).items() >= _MADE.items()
    except (OSError, ValueError, AttributeError):
        return False


def make_checkpoint(folder: Path, config: ModelConfig = CONFIG) -> Path:
    """Writes a random checkpoint as a released one looks: safetensors, config.json, tokenizer.json.

    Each tensor's numbers depend on its name alone, so that every machine makes the same bytes.
    """
    folder.mkdir(parents=True)
    wanted = slots(config)

    def values(name: str):
        scale = name.endswith("norm.weight") or "norm1.weight" in name or "norm2.weight" in name
        scale = scale or "layernorm.weight" in name or "ln_q.weight" in name
        numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(
            wanted[name].shape, np.float32
        )
        yield np.float32(0.1) * numbers + np.float32(scale)

    float32 = np.dtype(np.float32)
    safetensors.write_file(
        folder / "model.safetensors",
        {name: (slot.shape, float32) for name, slot in wanted.items()},
        values,
    )
    (folder / layout.CONFIG).write_text(json.dumps(to_hf(config, "float32"), indent=2))
    byte_tokenizer(config).save(str(folder / "tokenizer.json"))
    return folder


def example_exam() -> Path:
    """A real ultrasound cine loop, 30 frames, from pydicom's own test files."""
    from pydicom.data import get_testdata_file

    found = get_testdata_file("examples_ybr_color.dcm", download=False)
    if found is None:
        raise InputError("examples_ybr_color.dcm: missing from pydicom; give --image FILE")
    return Path(str(found))


@contextlib.contextmanager
def _step(what: str) -> Iterator[None]:
    """Says what begins, and how long it took."""
    began = time.perf_counter()
    _say(f"▸ {what}")
    yield
    _say(f"  {time.perf_counter() - began:.0f} s")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
