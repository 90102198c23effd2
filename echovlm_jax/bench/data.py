"""Batches from `make_batches` against a PyTorch DataLoader with Hugging Face's processor."""

import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from echovlm_jax.data.build import build
from echovlm_jax.data.epoch import Epochs
from echovlm_jax.data.examples import example, open_source
from echovlm_jax.data.settings import Settings
from echovlm_jax.data.tokenizer import byte_tokenizer
from echovlm_jax.errors import InputError
from echovlm_jax.phantom import write_exams
from echovlm_jax.processing.chat import qwen2_vl_prompt
from echovlm_jax.progress import progress

MODEL = "echovlm_11b"
_SIDE = "import json, sys; from echovlm_jax.bench.data import {side}; {side}(json.load(sys.stdin))"
_JPEG_QUALITY = 92
_JSON = "phantom.json"  # of write_exams


class Speed(NamedTuple):
    """What one run made after its first batch, by the clock."""

    images: float  # a second
    tokens: float


def bench_data(
    workdir: str | os.PathLike[str] | None = None,
    *,
    exams: int = 480,
    rounds: int = 3,
    workers: int = 2,
) -> dict[str, Any]:
    """Feeds the same exams, from image files to arrays, through both pipelines.

    Phantom exams are written as images, every second exam as JPEG, the others as PNG, and both
    sides read those bytes: ours through a dataset that `data build` made of them, in packed rows;
    theirs from the files, with Pillow, Hugging Face's Qwen2-VL image processor and a tokenizer, in
    padded batches of as many exams. Both make the same patches and tokens of an exam, with as many
    worker processes. Runs alternate, each in a process of its own, and go once over all exams; the
    clock starts with the first batch, when the workers run. What comes is dropped.

    Args:
      workdir: a folder, made if it is not there; by default a temporary one. What is written there
        is deleted again.
      exams: phantom exams of 1 to 4 images.
      rounds: runs of each side.
      workers: processes of each side.

    Returns:
      ratio (ours / theirs), ours and theirs (images a second, medians), what,
      ours_tokens_per_second, theirs_tokens_per_second, tokens_ratio, exams, images, tokens.

    Raises:
      InputError: PyTorch or transformers is not installed, or a number is below 1.
    """
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"`bench data` compares with PyTorch's loader, and {name} is not installed;"
                " install it: pip install 'echovlm-jax[bench]'"
            )
    for name, value in (("exams", exams), ("rounds", rounds), ("workers", workers)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, found {value}")
    if workdir is not None:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="echovlm-bench-", dir=workdir) as made:
        folder = Path(made)
        _write_images(folder / "exams", exams)
        build([folder / "exams" / _JSON], folder / "exams", folder / "dataset")
        job = _write_job(folder, workers)
        runs: dict[str, list[Speed]] = {"ours": [], "theirs": []}
        with progress(2 * rounds, "run", "bench") as tick:
            for _, side in itertools.product(range(rounds), runs):
                runs[side].append(_run(side, job))
                tick(1)
    (ours, ours_tokens), (theirs, theirs_tokens) = (
        [statistics.median(column) for column in zip(*runs[side], strict=True)] for side in runs
    )
    return {
        "ratio": ours / theirs,
        "ours": ours,
        "theirs": theirs,
        "what": f"images a second, {workers} workers: make_batches / PyTorch DataLoader with the"
        " Hugging Face processor",
        "tokens_ratio": ours_tokens / theirs_tokens,
        "ours_tokens_per_second": ours_tokens,
        "theirs_tokens_per_second": theirs_tokens,
        "exams": len(job["exams"]),
        "images": sum(len(exam["images"]) for exam in job["exams"]),
        "tokens": sum(exam["tokens"] for exam in job["exams"]),
    }


def _write_images(folder: Path, exams: int) -> None:
    """Phantom exams as files, with the official JSON beside them. No loops: their side would need
    another processor for them."""
    write_exams(folder, exams, 0, cine=0.0)
    records = json.loads((folder / _JSON).read_text(encoding="utf-8"))
    for record in records[::2]:
        for n, name in enumerate(record["image"]):
            jpeg = Path(name).with_suffix(".jpg")
            with Image.open(folder / name) as image:
                image.save(folder / jpeg, quality=_JPEG_QUALITY)
            (folder / name).unlink()
            record["image"][n] = jpeg.as_posix()
    (folder / _JSON).write_text(json.dumps(records), encoding="utf-8")


def _write_job(folder: Path, workers: int) -> dict[str, Any]:
    """What both sides are told: a configuration, and each exam's files, text and length."""
    config = {
        "seed": 0,
        "data": str(folder / "dataset"),
        "model": MODEL,
        "stage": "full",
        "seq_len": 4096,  # room for all images at their full size, beside texts in bytes
        "max_patches": 6144,
        "max_image_patches": 784,
        "global_batch_size": 2,
        "mix_temperature": 1.0,
        "data_workers": workers,
    }
    files = {
        record["id"]: [str(folder / "exams" / name) for name in record["image"]]
        for record in json.loads((folder / "exams" / _JSON).read_text(encoding="utf-8"))
    }
    source = open_source(Settings.from_config(config))
    epochs = Epochs(source)
    epoch = epochs.epoch(0)
    exams = []
    for record, key in zip(epoch.record.tolist(), epoch.key.tolist(), strict=True):
        made = example(source, record, key)
        text = qwen2_vl_prompt(
            [
                {"role": turn.role, "content": [{"type": "text", "text": turn.text}]}
                for turn in made.turns
            ],
            add_generation_prompt=False,
        )
        name = made.record.id.removeprefix(
            f"{Path(_JSON).stem}/"
        )  # the build puts the file's name in front
        exams.append({"images": files[name], "text": text, "tokens": made.tokens})
    byte_tokenizer(source.model).save(str(folder / "tokenizer.json"))
    pixels = source.images.patch_size**2
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": source.images.min_pixels,
        "max_pixels": config["max_image_patches"] * pixels,
        "patch_size": source.images.patch_size,
        "temporal_patch_size": source.images.temporal_patch_size,
        "merge_size": source.images.merge_size,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    steps = (len(epoch.offsets) - 1) // config["global_batch_size"]
    return {"config": config, "steps": steps, "folder": str(folder), "exams": exams}


def _run(side: str, job: dict[str, Any]) -> Speed:
    """One side's run, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _SIDE.format(side=side)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the run of {side} failed:\n{done.stderr}")
    return Speed(**json.loads(done.stdout.splitlines()[-1]))


def ours(job: dict[str, Any]) -> None:
    """Prints the speed of `make_batches`."""
    from echovlm_jax.data.pipeline import make_batches

    def counts() -> Iterator[tuple[int, int]]:
        for batch in itertools.islice(batches, job["steps"]):
            images = batch["patch_segment_ids"].max(axis=1).sum()
            yield int(images), int((batch["segment_ids"] > 0).sum())

    batches = make_batches(job["config"])
    _print_speed(counts())


def theirs(job: dict[str, Any]) -> None:
    """Prints the speed of a DataLoader."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    folder, workers = job["folder"], job["config"]["data_workers"]
    processor: Any = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_file=os.path.join(folder, "tokenizer.json")
    )
    unit = processor.merge_size**2

    class Exams(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(job["exams"])

        def __getitem__(self, i: int) -> dict[str, Any]:
            exam = job["exams"][i]
            out, marks = {}, ""
            if exam["images"]:
                images = [Image.open(path).convert("RGB") for path in exam["images"]]
                out = dict(processor(images=images, return_tensors="pt"))
                marks = "".join(
                    f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>"
                    for n in (out["image_grid_thw"].prod(1) // unit).tolist()
                )
            opening = "<|im_start|>user\n"
            text = exam["text"].replace(opening, opening + marks, 1)
            return out | {"input_ids": torch.tensor(tokenizer(text)["input_ids"])}

    def collate(exams: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [exam["input_ids"] for exam in exams]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        lengths = torch.tensor([len(one) for one in ids])
        mask = torch.arange(padded.shape[1])[None] < lengths[:, None]
        with_images = [exam for exam in exams if "pixel_values" in exam]
        return {
            "input_ids": padded,
            "attention_mask": mask,
            **{
                key: torch.cat([exam[key] for exam in with_images])
                for key in ("pixel_values", "image_grid_thw")
                if with_images
            },
        }

    loader = torch.utils.data.DataLoader(
        Exams(),
        batch_size=max(1, round(len(job["exams"]) / job["steps"])),
        num_workers=workers,
        collate_fn=collate,
    )
    _print_speed(
        (len(batch.get("image_grid_thw", ())), int(batch["attention_mask"].sum()))
        for batch in loader
    )


def _print_speed(counts: Iterator[tuple[int, int]]) -> None:
    """Prints a Speed as JSON from each batch's numbers of images and tokens."""
    next(counts)
    start = time.perf_counter()
    images, tokens = np.sum(list(counts), axis=0)
    seconds = time.perf_counter() - start
    print(json.dumps(Speed(images / seconds, tokens / seconds)._asdict()))
