"""Records what a PyTorch model computes, stage by stage, for `echovlm parity` to compare with.

`record` works on any PyTorch model shaped like Qwen2-VL or EchoVLM: stages are found by the ends of
their module names, and recorded by hooks. Positions are computed here, from the rule and not from
the package's code, and handed to the model.

    python -m tests.golden.make_golden FOLDER F.npz

records one for a checkpoint folder (safetensors), with random inputs: an image, text, and labels.
The demo's golden file, echovlm_jax/demo_golden.npz, is this, with `--demo` in place of the folder.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Inputs = dict[str, np.ndarray]


def record(
    model: nn.Module,
    inputs: Inputs,
    *,
    tokens: dict[str, int],
    merge: int = 2,
    new_tokens: int = 24,
    top_k: int | None = None,
    gradients: Any = None,
    tokens_per_second: float | None = None,
) -> Inputs:
    """Runs `model` on `inputs` and returns inputs and records, keyed as the golden format says.

    Args:
      model: the PyTorch model, float32.
      inputs: input_ids, attention_mask, and optionally pixel values with their grids, and labels.
      tokens: `image` and `video`: the ids of the two placeholder tokens.
      merge: the merger's side in patches.
      new_tokens: greedy steps to record; 0 for none.
      top_k: experts a token goes to; None for a dense model.
      gradients: with labels: a function from the model, after backward, to named gradients.
      tokens_per_second: of a model whose videos' positions count time, and text goes on behind the
        largest, as it was trained; transformers 5.3 to 5.24 goes on elsewhere when not told.
    """
    torch_inputs = {k: torch.from_numpy(v) for k, v in inputs.items() if k != "labels"}
    positions = torch.from_numpy(rope_positions(inputs, tokens, merge, tokens_per_second))
    seen, handles = _hook(model)
    logits = model(**torch_inputs, position_ids=positions, use_cache=False).logits
    for handle in handles:
        handle.remove()
    out: Inputs = dict(inputs) | {"position_ids": positions.numpy(), "logits": _np(logits)}
    for name in ("image_embeds", "video_embeds"):
        if name in seen:
            out[name] = _np(seen[name])
    out["hidden_states"] = np.stack([_np(h) for h in seen["hidden"]])
    if seen["router"]:
        batch, length = inputs["input_ids"].shape
        out["router_logits"] = np.stack(
            [_np(r).reshape(batch * length, -1) for r in seen["router"]]
        )
        coefficient = [torch.softmax(c, dim=-1) for c in seen["coefficient"]]
        out["coefficient"] = np.stack([_np(c) for c in coefficient])
    if "labels" in inputs:
        loss = _loss(logits, torch.from_numpy(inputs["labels"]))
        out["loss"] = _np(loss)
        if seen["router"]:
            mask = torch_inputs["attention_mask"].reshape(-1)
            out["aux_loss"] = _np(_balance(seen["router"], mask, top_k or 1))
        if gradients is not None:
            model.zero_grad()
            loss.backward()
            for name, grad in gradients(model).items():
                out[f"grad_norm/{name}"] = _np(grad.double().norm())
    if new_tokens:
        out["generated_ids"] = _greedy(model, torch_inputs, positions, new_tokens)
    return out


def rope_positions(
    inputs: Inputs, tokens: dict[str, int], merge: int, tokens_per_second: float | None = None
) -> np.ndarray:
    """M-RoPE ids [3, B, S], written token by token from the rule."""
    rate = 0.0 if tokens_per_second is None else tokens_per_second
    seconds = iter(inputs.get("second_per_grid_ts", ()))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    grids = {
        tokens["image"]: iter(inputs.get("image_grid_thw", ())),
        tokens["video"]: iter(inputs.get("video_grid_thw", ())),
    }
    out = np.ones((3, *ids.shape), np.int64)
    for b in range(len(ids)):
        columns = np.flatnonzero(mask[b])
        at, start = 0, 0
        while at < len(columns):
            token = int(ids[b, columns[at]])
            if token not in grids:
                out[:, b, columns[at]] = start
                at, start = at + 1, start + 1
                continue
            t, h, w = (int(n) for n in next(grids[token]))
            timed = rate and token == tokens["video"]
            step = torch.tensor(float(next(seconds, 1.0)) if timed else 1.0, dtype=torch.float32)
            times = (torch.arange(t) * step * (rate if timed else 1)).long().tolist()
            highest = start
            for i in times:
                for j in range(h // merge):
                    for k in range(w // merge):
                        out[:, b, columns[at]] = np.array([i, j, k]) + start
                        highest = max(highest, start + max(i, j, k))
                        at += 1
            start = highest + 1
    return out


def _hook(model: nn.Module) -> tuple[dict[str, Any], list[Any]]:
    """Hooks on the stages; what they saw lands in the returned dict as the model runs."""
    seen: dict[str, Any] = {"hidden": [], "router": [], "coefficient": []}
    handles = []

    def keep(name: str):
        def hook(module, args, output):
            seen[name].append(output[0] if isinstance(output, tuple) else output)

        return hook

    def enter(module, args, kwargs):
        seen["hidden"].append(args[0] if args else kwargs["hidden_states"])

    merged: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if re.search(r"(^|\.)visual$", name):  # whose merger may work in another order
            hook = module.register_forward_hook(
                lambda m, a, o: merged.append(getattr(o, "pooler_output", o))
            )
            handles.append(hook)
        elif re.search(r"(?<!visual)\.layers\.\d+$", name):
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        elif re.search(r"(^model|language_model)\.norm$", name):
            handles.append(module.register_forward_hook(keep("hidden")))
        elif name.endswith(".moe.gate"):
            handles.append(module.register_forward_hook(keep("router")))
        elif name.endswith(".coefficient"):
            handles.append(module.register_forward_hook(keep("coefficient")))

    # The tower runs once for images and once for videos; its arguments tell which.
    def name_merged(module, args, kwargs):
        for key, pixels in (
            ("image_embeds", "pixel_values"),
            ("video_embeds", "pixel_values_videos"),
        ):
            if kwargs.get(pixels) is not None:
                seen["_order"] = [*seen.get("_order", []), key]

    def collect(module, args, kwargs, output):
        for key, value in zip(seen.pop("_order", []), merged, strict=True):
            seen[key] = value

    handles.append(model.register_forward_pre_hook(name_merged, with_kwargs=True))
    handles.append(model.register_forward_hook(collect, with_kwargs=True))
    return seen, handles


def _greedy(
    model: nn.Module, inputs: dict[str, torch.Tensor], positions: torch.Tensor, steps: int
) -> np.ndarray:
    """Greedy tokens without a cache and without a stop token: each step runs the whole row anew."""
    inputs = dict(inputs)
    start = inputs["input_ids"].shape[1]
    # Padding's position counts only where the whole batch is text, as in the released code.
    counted = inputs["attention_mask"] == 1
    if not any(name.endswith("_grid_thw") for name in inputs):
        counted = torch.ones_like(counted)
    following = torch.where(counted, positions, 0).amax(dim=(0, 2)) + 1
    with torch.no_grad():
        for step in range(steps):
            logits = model(**inputs, position_ids=positions, use_cache=False).logits[:, -1]
            token = logits.argmax(-1, keepdim=True)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
            one = torch.ones_like(token)
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], one], dim=1)
            new = (following + step)[None, :, None].expand(3, -1, 1)
            positions = torch.cat([positions, new], dim=2)
    return inputs["input_ids"][:, start:].numpy()


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]).float(), labels[:, 1:].reshape(-1)
    )


def _balance(router: list[torch.Tensor], mask: torch.Tensor, top_k: int) -> torch.Tensor:
    """Hugging Face's own balancing loss over the recorded router logits."""
    from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

    flat = tuple(r.reshape(mask.shape[0], -1) for r in router)
    experts = flat[0].shape[-1]
    return load_balancing_loss_func(flat, experts, top_k, mask[None])


def _np(x: torch.Tensor) -> np.ndarray:
    return x.detach().float().numpy()


def main() -> None:
    """Records a golden file for a checkpoint folder; see the head of this file."""
    from safetensors.torch import load_file

    from echovlm_jax import config as configs
    from echovlm_jax.bench.torch_model import build, load_released
    from echovlm_jax.demo import make_checkpoint
    from tests.parity import torch_echovlm
    from tests.parity.cases import inputs

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="checkpoint folder")
    parser.add_argument("out", type=Path, help="the .npz file to write")
    parser.add_argument("--demo", action="store_true", help="the demo's own checkpoint")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_checkpoint(Path(scratch) / "demo") if args.demo else args.folder
        config = configs.from_hf(json.loads((folder / "config.json").read_text()))
        model = build(config)
        tensors: dict[str, torch.Tensor] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            tensors |= {name: t.float() for name, t in load_file(shard).items()}
        load_released(model, tensors)
    golden = record(
        model,
        inputs("image", config),
        tokens={"image": config.image_token_id, "video": config.video_token_id},
        tokens_per_second=config.tokens_per_second,
        top_k=config.moe and config.moe.top_k,
        gradients=torch_echovlm.released_gradients,
    )
    np.savez_compressed(args.out, **golden)


if __name__ == "__main__":
    main()
