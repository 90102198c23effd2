"""A training step on the CPU against the same model's in PyTorch."""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from echovlm_jax.bench.cpu import sides
from echovlm_jax.config import from_hf, to_hf
from echovlm_jax.errors import InputError
from echovlm_jax.memory import keep_freed_memory
from echovlm_jax.progress import progress
from echovlm_jax.train.config_file import load_config, own_config

_EXPERTS = ("eager", "grouped_mm")  # transformers' implementations
_TRIALS = 3  # steps of each form; one more warms up
_RATE = 1e-5
# Parameters, gradients, Adam's two moments, and as much again for what a step makes meanwhile.
_BYTES_A_PARAMETER = 4 * 4 * 2


def bench_train(
    *, size: str | None = None, tokens: int = 512, rounds: int = 12, threads: int = 2
) -> dict[str, Any]:
    """Times one optimisation step of all parameters in float32: forward, backward, clipping by the
    global norm, AdamW.

    The batch is one row: an image of 784 patches, then text, whose every token has a label. Ours is
    the step that `train` compiles (experts dense, nothing rematerialised), its balancing loss and
    telemetry included. Theirs is Hugging Face's modules in eager mode with torch's fused AdamW,
    without those; each of its implementations of attention and experts is tried, and the fastest is
    what ours is timed against. It is chosen before, by steps that do not count: the best of several
    medians would be the luckiest one too. Memory is as each has it: ours as `train` sets it
    (`memory.keep_freed_memory`), theirs as the C library does. Weights are random and not the same;
    shapes are. Each side is a process of its own, on the same processor cores, and they take turns
    step by step: what else the machine does meets both, and every step of either comes after one of
    the other, and not warmed up by one of its own.

    Args:
      size: the preset whose sizes to use; by default `sides.scaled_model`.
      tokens: length of the row, the image's 196 among them.
      rounds: timed steps of each side; one more isn't timed.
      threads: number on each side; the machine may have fewer cores.

    Returns:
      ratio (theirs / ours: above 1, ours is faster), ours and theirs (seconds a step, medians),
      what, parameters, tokens, patches, rounds, threads, ours_fastest and theirs_fastest (seconds
      of the fastest timed step), theirs_form (which of PyTorch's forms was timed), and
      theirs_by_form: the fastest of each form's trials.

    Raises:
      InputError: PyTorch or transformers is not installed, an unknown preset, one that is too large
        for this machine's memory twice, or a number that is too small.
    """
    model = sides.chosen_model(size)
    least = sides.PATCHES // model.vision.merge_unit + 4
    for name, value, bound in (
        ("tokens", tokens, least), ("rounds", rounds, 1), ("threads", threads, 1)
    ):  # fmt: skip
        if value < bound:
            raise InputError(f"{name} must be at least {bound}, found {value}")
    sides.check_memory(model, size, _BYTES_A_PARAMETER, "train")
    job = {"model": to_hf(model, dtype="float32"), "tokens": tokens, "threads": threads}
    with ExitStack() as stack:
        asked = {side: sides.start("train", side, job, stack) for side in ("ours", "theirs")}
        counts = {side: ask(None) for side, ask in asked.items()}
        if len({count["parameters"] for count in counts.values()}) > 1:
            raise RuntimeError(f"the two models differ: {counts}")
        forms = counts["theirs"]["forms"]
        tried: dict[str, list[float]] = {form: [] for form in forms}
        seconds: dict[str, list[float]] = {side: [] for side in asked}
        with progress((_TRIALS + 1) * len(forms) + 2 * (rounds + 1), "step", "bench") as tick:
            for _ in range(_TRIALS + 1):
                for form in forms:
                    tried[form].append(asked["theirs"](form))
                    tick(1)
            fastest = {form: min(times[1:]) for form, times in tried.items()}
            best = min(forms, key=fastest.__getitem__)
            for _ in range(rounds + 1):
                for side, form in (("ours", "step"), ("theirs", best)):
                    seconds[side].append(asked[side](form))
                    tick(1)
    timed = {side: times[1:] for side, times in seconds.items()}
    ours, theirs = (statistics.median(timed[side]) for side in ("ours", "theirs"))
    return {
        "ratio": theirs / ours,
        "ours": ours,
        "theirs": theirs,
        "what": f"seconds a training step of {size or 'a scaled model'} in float32, one image in"
        f" {tokens} tokens, {threads} threads: PyTorch's against ours, above 1 ours is faster",
        "parameters": counts["ours"]["parameters"],
        "tokens": tokens,
        "patches": sides.PATCHES,
        "rounds": rounds,
        "threads": threads,
        "ours_fastest": min(timed["ours"]),
        "theirs_fastest": min(timed["theirs"]),
        "theirs_form": best,
        "theirs_by_form": fastest,
    }


def _serve(parameters: int, forms: dict[str, Callable[[], float]]) -> None:
    """Answers each question, a form's name, with the seconds of a step of it."""

    def seconds(form: str) -> float:
        started = time.perf_counter()
        loss = forms[form]()
        taken = time.perf_counter() - started
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss is {loss}")
        return taken

    sides.serve({"parameters": parameters, "forms": list(forms)}, seconds)


def ours(job: dict[str, Any]) -> None:
    """Serves steps of the program that a training run compiles."""
    sides.take_cores(job["threads"])
    keep_freed_memory()  # as `train` does
    import jax

    from echovlm_jax.processing.batch import make_batch
    from echovlm_jax.train.program import init_state, make_program

    jax.config.update("jax_platforms", "cpu")
    model = from_hf(job["model"])
    inputs = sides.inputs(model, job["tokens"])
    program = make_program(_training(job["tokens"]), jax.devices()[:1], model)
    step = program.compile()
    state = init_state(program, jax.random.key(0))
    arrays = make_batch(model, inputs)
    arrays |= {"labels": inputs["labels"], "organs": np.zeros_like(arrays["tokens"])}
    batch = {
        name: jax.device_put(arrays[name].astype(s.dtype), s.sharding)
        for name, s in program.batch.items()
    }
    parameters = sum(leaf.size for leaf in jax.tree.leaves(program.state.trainable))

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    _serve(parameters, {"step": run})


def theirs(job: dict[str, Any]) -> None:
    """Serves steps of Hugging Face's modules, in each of their forms."""
    sides.take_cores(job["threads"])
    import torch  # pyright: ignore[reportMissingImports]

    from echovlm_jax.bench.torch_model import build, set_forms
    from echovlm_jax.processing.batch import make_batch

    torch.set_num_threads(job["threads"])
    config = from_hf(job["model"])
    inputs = sides.inputs(config, job["tokens"])
    # As ours, they are made before the step.
    positions = make_batch(config, inputs)["positions"].transpose(1, 0, 2).astype(np.int64)
    batch = {
        name: torch.from_numpy(x) for name, x in (inputs | {"position_ids": positions}).items()
    }
    model = build(config, std=config.text.hidden_size**-0.5).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.0, fused=True)

    def step(attention: str, experts: str) -> float:
        set_forms(model, attention, experts)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    forms = {
        f"{attention} attention, {experts} experts": lambda a=attention, e=experts: step(a, e)
        for attention in sides.ATTENTION
        for experts in (_EXPERTS if config.moe else _EXPERTS[:1])
    }
    _serve(sum(p.numel() for p in parameters), forms)


def _training(tokens: int) -> Any:
    """configs/full_finetune.py for one row on one device, in float32; sizes are given beside."""
    patches = sides.PATCHES
    changes = {
        **{"seq_len": tokens, "max_patches": patches, "max_image_patches": patches},
        **{"global_batch_size": 1, "mesh.data": 1, "mesh.fsdp": 1},
        **{"steps": 1000, "learning_rate": _RATE, "warmup_fraction": 0.0},
        **{"dtype": "float32", "optimization_level": None},
        "moe_dispatch": "dense",  # the fastest on a CPU of those that drop nothing
    }
    config = load_config(own_config("full_finetune"), changes)
    config.remat = "none"
    return config
