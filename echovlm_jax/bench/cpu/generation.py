"""An answer on the CPU against that of Hugging Face's generate with the same weights."""

import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from echovlm_jax.bench.cpu import sides
from echovlm_jax.config import from_hf, to_hf
from echovlm_jax.demo import make_checkpoint
from echovlm_jax.errors import InputError
from echovlm_jax.progress import progress

# transformers' implementations, but for batched_mm: of 258 tokens that one takes ten times longer.
_EXPERTS = ("eager", "grouped_mm")
_PHASES = ("prefill", "decode")
_TRIALS = 2  # answers of each form; one more warms up
_TRIAL_TOKENS = 9
_BYTES_A_PARAMETER = 3 * 4  # as stored, as loaded, and what a prompt's activations take

Asked = dict[str, Any]  # "ours" and "theirs" → what asks that side


def bench_generate(
    *,
    size: str | None = None,
    prompt: int = 258,
    new_tokens: int = 33,
    batches: tuple[int, ...] = (1, 4),
    rounds: int = 5,
    threads: int = 2,
) -> dict[str, Any]:
    """Times greedy answers in float32: the prompt until its first token, and the tokens after it.

    A row is an image of 784 patches, 196 tokens, then text. Both sides read the same random
    checkpoint and answer the same prompts; no token ends an answer. Ours is `generate.generate`,
    its programs compiled before. Theirs is Hugging Face's `generate` in eager mode with its
    key/value cache, the first token told by a streamer. Each of its implementations of attention
    and experts is tried before, in answers that do not count, and the fastest in each phase at each
    batch size is what ours is timed against in that phase. Each side is a process of its own on the
    same processor cores, and they take turns answer by answer.

    Args:
      size: the preset whose sizes to use; by default `sides.scaled_model`.
      prompt: tokens of a row's prompt, the image's 196 among them.
      new_tokens: tokens of an answer; the first is the prefill's, the others the decoding's.
      batches: numbers of rows.
      rounds: timed answers of each side at each batch size; one more isn't timed.
      threads: number on each side; the machine may have fewer cores.

    Returns:
      prefill and decode: batch size → ratio (above 1, ours is faster), ours and theirs (medians:
      seconds to the first token; tokens a second after it, of all rows), theirs_form and
      theirs_by_form. ratio: the smallest of decoding, with its ours and theirs. same_tokens: the
      share of tokens that both sides chose alike. what, parameters, prompt, new_tokens, rounds and
      threads.

    Raises:
      InputError: PyTorch or transformers is not installed, an unknown preset, one that is too large
        for this machine's memory twice, or a number that is too small.
    """
    model = sides.chosen_model(size)
    least = sides.PATCHES // model.vision.merge_unit + 4
    for name, value, bound in (
        ("prompt", prompt, least), ("new_tokens", new_tokens, 2), ("rounds", rounds, 1),
        ("threads", threads, 1), ("batches", min(batches, default=0), 1),
    ):  # fmt: skip
        if value < bound:
            raise InputError(f"{name} must be at least {bound}, found {value}")
    sides.check_memory(model, size, _BYTES_A_PARAMETER, "answer")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        make_checkpoint(folder, model)
        job = {
            "model": to_hf(model, dtype="float32"), "folder": str(folder), "prompt": prompt,
            "rows": max(batches), "threads": threads,
        }  # fmt: skip
        asked = {side: sides.start("generation", side, job, stack) for side in ("ours", "theirs")}
        facts = {side: ask(None) for side, ask in asked.items()}
        if facts["ours"]["parameters"] != facts["theirs"]["parameters"]:
            raise RuntimeError(f"the two models differ: {facts}")
        forms = facts["theirs"]["forms"]
        answers = len(batches) * ((_TRIALS + 1) * len(forms) + 2 * (rounds + 1))
        with progress(answers, "answer", "bench") as tick:
            found = {
                rows: _compare(asked, rows, forms, new_tokens, rounds, tick) for rows in batches
            }
    return {
        **min((result["decode"] for result in found.values()), key=lambda one: one["ratio"]),
        "what": f"decoded tokens a second of {size or 'a scaled model'} in float32 after"
        f" {prompt} prompt tokens, {threads} threads: ours against Hugging Face's generate, above 1"
        " ours is faster; the smallest of the batch sizes",
        **{
            phase: {str(rows): result[phase] for rows, result in found.items()} for phase in _PHASES
        },
        "same_tokens": statistics.mean(result["same_tokens"] for result in found.values()),
        "parameters": facts["ours"]["parameters"],
        **{"prompt": prompt, "new_tokens": new_tokens, "rounds": rounds, "threads": threads},
    }


def _compare(
    asked: Asked, rows: int, forms: list[str], new_tokens: int, rounds: int, tick: Any
) -> dict[str, Any]:
    """One batch size: the figures of each phase, and how many tokens are alike."""
    tried: dict[str, list[Any]] = {form: [] for form in forms}
    for _ in range(_TRIALS + 1):
        for form in forms:
            question = {"rows": rows, "form": form, "new_tokens": _TRIAL_TOKENS}
            tried[form].append(asked["theirs"](question))
            tick(1)
    fastest = {
        phase: {form: min(t[phase] for t in times[1:]) for form, times in tried.items()}
        for phase in _PHASES
    }
    best = {phase: min(forms, key=fastest[phase].__getitem__) for phase in _PHASES}
    timed: dict[str, list[Any]] = {"ours": [], **{form: [] for form in best.values()}}
    for _ in range(rounds + 1):
        for side, times in timed.items():
            question = {"rows": rows, "form": side, "new_tokens": new_tokens}
            times.append(asked["ours" if side == "ours" else "theirs"](question))
        tick(2)
    result: dict[str, Any] = {}
    for phase in _PHASES:
        ours, theirs = (
            statistics.median(t[phase] for t in timed[side][1:]) for side in ("ours", best[phase])
        )
        # Seconds of a prompt, and tokens a second of an answer: what each is known by.
        later = rows * (new_tokens - 1)
        figures = (ours, theirs) if phase == "prefill" else (later / ours, later / theirs)
        result[phase] = {
            "ratio": theirs / ours,
            "ours": figures[0],
            "theirs": figures[1],
            "theirs_form": best[phase],
            "theirs_by_form": {
                form: seconds if phase == "prefill" else rows * (_TRIAL_TOKENS - 1) / seconds
                for form, seconds in fastest[phase].items()
            },
        }
    tokens = [np.array(timed[side][-1]["tokens"]) for side in ("ours", best["decode"])]
    return result | {"same_tokens": float((tokens[0] == tokens[1]).mean())}


def _inputs(job: dict[str, Any], rows: int) -> dict[str, np.ndarray]:
    """The first rows of the job's prompts."""
    inputs = sides.inputs(from_hf(job["model"]), job["prompt"], job["rows"])
    return {
        "input_ids": inputs["input_ids"][:rows],
        "attention_mask": np.ones_like(inputs["input_ids"][:rows]),
        "pixel_values": inputs["pixel_values"][: rows * sides.PATCHES],
        "image_grid_thw": inputs["image_grid_thw"][:rows],
    }


def ours(job: dict[str, Any]) -> None:
    """Serves answers of `generate`."""
    sides.take_cores(job["threads"])
    import jax

    from echovlm_jax.convert.load import load_params
    from echovlm_jax.generate import generate

    jax.config.update("jax_platforms", "cpu")
    config, params = load_params(job["folder"])

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        inputs = _inputs(job, question["rows"])
        started = time.perf_counter()
        made = generate(config, params, inputs, max_new_tokens=question["new_tokens"])
        whole = time.perf_counter() - started
        return {
            "prefill": whole - made.decode_seconds,
            "decode": made.decode_seconds,
            "tokens": made.tokens.tolist(),
        }

    sides.serve({"parameters": sum(x.size for x in jax.tree.leaves(params))}, answer)


def theirs(job: dict[str, Any]) -> None:
    """Serves answers of Hugging Face's generate, in each of its forms."""
    sides.take_cores(job["threads"])
    import torch  # pyright: ignore[reportMissingImports]

    from echovlm_jax.bench.torch_model import build, load_released, set_forms
    from echovlm_jax.convert import safetensors

    torch.set_num_threads(job["threads"])
    config = from_hf(job["model"])
    model = build(config)
    stored = Path(job["folder"]) / "model.safetensors"
    tensors = {
        name: torch.from_numpy(np.memmap(stored, entry.dtype, "c", entry.offset, entry.shape))
        for name, entry in safetensors.read_header(stored).items()
    }
    load_released(model, tensors)
    model.generation_config.eos_token_id = None  # no token ends an answer
    forms = {
        f"{attention} attention, {experts} experts": (attention, experts)
        for attention in sides.ATTENTION
        for experts in (_EXPERTS if config.moe else _EXPERTS[:1])
    }

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        set_forms(model, *forms[question["form"]])
        given = _inputs(job, question["rows"])
        given["mm_token_type_ids"] = (given["input_ids"] == config.image_token_id).astype(np.int64)
        inputs = {name: torch.from_numpy(x) for name, x in given.items()}
        clock = _Clock()
        started = time.perf_counter()
        with torch.no_grad():
            ids = model.generate(
                **inputs, max_new_tokens=question["new_tokens"], do_sample=False, streamer=clock
            )
        ended = time.perf_counter()
        first = clock.times[1]  # after the prompt
        return {
            "prefill": first - started,
            "decode": ended - first,
            "tokens": ids[:, job["prompt"] :].tolist(),
        }

    parameters = sum(p.numel() for p in model.parameters())
    sides.serve({"parameters": parameters, "forms": list(forms)}, answer)


class _Clock:
    """A streamer, in transformers' sense, that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
