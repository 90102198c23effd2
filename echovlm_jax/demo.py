"""The whole way on this machine: a tiny checkpoint, converted, compared with PyTorch, answering.

The checkpoint is random, so its answer is noise: what the demo shows is that every step works and
that the numbers are PyTorch's, which recorded them in `demo_golden.npz` from the same weights.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from echovlm_jax.config import ModelConfig, preset, to_hf
from echovlm_jax.convert import safetensors
from echovlm_jax.convert.from_torch import convert
from echovlm_jax.convert.parity import parity
from echovlm_jax.convert.table import slots
from echovlm_jax.data.tokenizer import SPECIAL, byte_tokenizer
from echovlm_jax.errors import InputError
from echovlm_jax.load import load_model

GOLDEN = Path(__file__).with_name("demo_golden.npz")
QUESTION = "Describe what this ultrasound exam shows."
CONFIG: ModelConfig = preset("tiny").replace(text={"vocab_size": len(SPECIAL) + 256})  # bytes
# What tells a folder of ours, that may be replaced.
_MARK, _MADE = "demo.json", {"made_by": "echovlm demo"}


def demo(out: str | Path, *, image: str | Path | None = None) -> dict[str, Any]:
    """Makes a tiny random checkpoint in `out`, converts it, checks parity, and answers on an exam.

    Args:
      out: a new folder, or one that an earlier demo made, which is replaced.
      image: a picture or DICOM file; by default a cine loop that ships with pydicom.

    Returns:
      seconds, out, model (the converted folder), parity (ok, logits, router_agreement,
      generated_match, grad_norm_max_rel_err), question, text, new_tokens.
    """
    began = time.perf_counter()
    out = Path(out)
    if out.is_symlink() or (out.exists() and not _made_by_us(out / _MARK)):
        raise InputError(f"{out}: exists and no demo made it; name a new folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).write_text(json.dumps(_MADE))
    _say("1/4  a tiny random checkpoint in Hugging Face form")
    make_checkpoint(out / "torch")
    _say("2/4  converting it")
    converted = convert(out / "torch", out / "model")
    _say(f"     {converted['tensors']} tensors, {converted['bytes'] / 2**20:.1f} MiB")
    _say("3/4  comparing it with what PyTorch recorded from the same weights")
    compared = parity(out / "model", GOLDEN)
    _say(
        f"     {'equal' if compared['ok'] else 'DIFFERENT at ' + str(compared['first_divergence'])}"
        f": logits to {compared['logits']['max_abs_err']:.1e}, routing"
        f" {compared['router_agreement']:.0%}, gradients to"
        f" {compared['grad_norm_max_rel_err']:.1e}"
    )
    exam = Path(image) if image is not None else example_exam()
    _say(f"4/4  answering on {exam.name} (the weights are random: expect noise)")
    answer = load_model(out / "model").generate([exam], QUESTION, max_new_tokens=32)
    keys = (
        "ok", "logits", "router_agreement", "generated_match", "loss_err", "aux_loss_err",
        "grad_norm_max_rel_err",
    )  # fmt: skip
    result = {
        "seconds": time.perf_counter() - began,
        "out": str(out),
        "model": str(out / "model"),
        "parity": {key: compared[key] for key in keys},
        "question": QUESTION,
        "text": answer["text"],
        "prompt_tokens": answer["prompt_tokens"],
        "new_tokens": answer["new_tokens"],
    }
    (out / _MARK).write_text(json.dumps(_MADE | result, indent=2))
    return result


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
    (folder / "config.json").write_text(json.dumps(to_hf(config, "float32"), indent=2))
    byte_tokenizer(config).save(str(folder / "tokenizer.json"))
    return folder


def example_exam() -> Path:
    """A real ultrasound cine loop, 30 frames, from pydicom's own test files."""
    from pydicom.data import get_testdata_file

    found = get_testdata_file("examples_ybr_color.dcm", download=False)
    if found is None:
        raise InputError("examples_ybr_color.dcm: missing from pydicom; give --image FILE")
    return Path(str(found))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
