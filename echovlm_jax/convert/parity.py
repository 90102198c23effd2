"""Stage-by-stage comparison with what a PyTorch model recorded.

A golden file (.npz) holds the inputs of a PyTorch run and what its stages gave. The same inputs go
through the converted model in float32, and each stage is compared in the order in which data flows,
so that the first stage that differs says where to look.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.convert import layerwise
from echovlm_jax.convert.folder import StoredModel, open_model
from echovlm_jax.convert.golden import IGNORED, INPUTS, Golden, check_golden, read_golden
from echovlm_jax.convert.load import load_params
from echovlm_jax.convert.table import flatten, leaf_shapes, slots
from echovlm_jax.errors import InputError
from echovlm_jax.generate import generate
from echovlm_jax.model import EchoVLM
from echovlm_jax.model.echovlm import Output, Params
from echovlm_jax.ops import Array
from echovlm_jax.ops.moe.dispatch import load_balancing_loss
from echovlm_jax.processing.batch import make_batch, merged_order

# A token whose last chosen and first rejected expert are closer than this in PyTorch's router
# probabilities may be routed either way by rounding alone.
NEAR_TIE = 1e-5
# A norm that was summed in float32 is itself off, the more the more values it has: torch's own by
# 2e-3 over 26 M. `ok` allows for that; grad_norm_max_rel_err is the plain figure.
GRADIENT_RTOL, GRADIENT_RTOL_PER_VALUE = 1e-3, 1e-10


@dataclass
class Report:
    """Collects stages; a stage holds where max|a − b| ≤ atol · max(1, max|b|)."""

    atol: float
    stages: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, ours: np.ndarray, theirs: np.ndarray) -> float | None:
        """Compares one stage; returns max|a − b|, or None where it is not a finite number."""
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        if ours.shape != theirs.shape:
            raise InputError(
                f"golden key {name} has shape {theirs.shape}, this model gives {ours.shape};"
                " was it recorded from this checkpoint?"
            )
        with np.errstate(invalid="ignore"):  # ∞ − ∞ is a NaN, which doesn't hold
            error = float(np.max(np.abs(ours - theirs), initial=0.0))
        finite = bool(np.isfinite(error))
        limit = self.atol * max(1.0, float(np.max(np.abs(theirs), initial=0.0)))
        self.stages.append(
            {
                "name": name,
                "max_abs_err": error if finite else None,
                "limit": limit if np.isfinite(limit) else None,
                "ok": finite and error <= limit,
            }
        )
        return error if finite else None


def parity(
    model: str | Path, golden: str | Path, *, atol: float = 1e-4, stream: bool | None = None
) -> dict[str, Any]:
    """Compares a checkpoint with a golden file, in float32.

    Args:
      model: a MODEL folder.
      golden: a .npz file with `input_ids`, `attention_mask` and whatever else was recorded
        (`position_ids`, `image_embeds`, `video_embeds`, `hidden_states`, `router_logits`,
        `coefficient`, `logits`, `generated_ids`, `loss`, `aux_loss`, `grad_norm/NAME`). Only what
        is there is compared, and only where attention_mask is 1.
      atol: see `Report`.
      stream: hold one decoder layer at a time; by default where the model in float32 exceeds half
        of this machine's memory. The tokens are then checked by their logits in one pass over
        prompt and answer, which is equal by induction, and gradients are not compared.

    Returns:
      ok, stages (name, max_abs_err, limit, ok), first_divergence, logits (max_abs_err, kl,
      top1_agreement), router_agreement, near_ties, generated_match, loss_err, loss_kind,
      aux_loss_err, grad_norm_max_rel_err. A figure that the file gives no cause for is None.

    Raises:
      InputError: the golden file is not one, does not fit the model, or records nothing that is
        compared.
    """
    if not 0 <= atol < math.inf:
        raise InputError(f"atol must be a number of at least 0, found {atol}")
    recorded = read_golden(Path(golden))
    opened = open_model(model)
    check_golden(recorded, opened.config, str(golden))
    if stream is None:
        needed = 4 * sum(math.prod(shape) for shape in leaf_shapes(opened.config).values())
        stream = needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with jax.default_matmul_precision("highest"):
        if stream:
            return compare(opened.config, None, recorded, atol, opened)
        config, params = load_params(model, dtype=jnp.float32)
        return compare(config, params, recorded, atol, opened)


def compare(
    config: ModelConfig, params: Params | None, golden: Golden, atol: float, opened: StoredModel
) -> dict[str, Any]:
    """`parity` on an opened model; without parameters in memory it is streamed."""
    inputs = {key: golden[key] for key in INPUTS if key in golden}
    batch = make_batch(config, inputs)
    mask = np.asarray(golden["attention_mask"]) == 1
    answer = golden.get("generated_ids")
    result: dict[str, Any] = {"logits": None, "router_agreement": None, "near_ties": []}
    result["generated_match"] = None
    if params is not None:
        output, logits = _forward(config, params, batch)
        if answer is not None:
            result["generated_match"] = _generated(config, params, inputs, answer)
    else:
        output, logits = layerwise.forward(opened, _followed_by(batch, answer))
        if answer is not None:
            likeliest = logits[:, mask.shape[1] - 1 : -1].argmax(-1)
            result["generated_match"] = bool(np.array_equal(likeliest, answer))
        output, logits = _first_columns(output, logits, mask.shape[1])
    report = Report(atol)
    for name, ours, theirs in _stages(config, inputs, batch, output, golden, mask):
        report.add(name, ours, theirs)
    agrees = True
    if "logits" in golden:
        result["logits"] = _logits(report, logits[mask], golden["logits"][mask])
    if "router_logits" in golden and config.moe is not None:
        result |= _routing(config, output, golden, mask)
        agrees = result.pop("routing_ok")
    result |= _losses(config, params, batch, output, logits, golden, report)
    if not report.stages and result["generated_match"] is None:
        raise InputError(
            "the golden file records gradients alone, and a model that is streamed has none; give"
            " it more memory, or record logits too"
        )
    broken = [stage["name"] for stage in report.stages if not stage["ok"]]
    return {
        "ok": not broken and agrees and result["generated_match"] is not False,
        "stages": report.stages,
        "first_divergence": broken[0] if broken else None,
        **result,
    }


def _forward(
    config: ModelConfig, params: Params, batch: dict[str, np.ndarray]
) -> tuple[Output, np.ndarray]:
    model = EchoVLM(config, keep_hidden=True)

    @jax.jit
    def run(params: Params, batch: dict[str, Array]) -> Any:
        out: Any = model.apply({"params": params}, batch)
        return out, model.apply({"params": params}, out.hidden, method="logits")

    return jax.tree.map(np.asarray, run(params, batch))


def _followed_by(batch: dict[str, np.ndarray], answer: np.ndarray | None) -> dict[str, np.ndarray]:
    """The batch with an answer's tokens [B, T] behind its last column."""
    if answer is None:
        return batch
    start = np.where(batch["segment_ids"] != 0, batch["positions"].max(1), -1).max(1) + 1
    positions = start[:, None, None] + np.arange(answer.shape[1])
    more = {
        "tokens": answer,
        "positions": np.repeat(positions, 3, axis=1),
        "segment_ids": np.ones_like(answer),
        "patch_index": np.full_like(answer, -1),
    }
    return {
        key: np.concatenate([value, more[key].astype(value.dtype)], -1) if key in more else value
        for key, value in batch.items()
    }


def _first_columns(output: Output, logits: np.ndarray, count: int) -> tuple[Output, np.ndarray]:
    """Of an output, what belongs to the first `count` columns."""
    cut = {
        key: value[:, :, :count]
        for key in ("router_logits", "coefficient", "layer_inputs")
        if (value := getattr(output, key)) is not None
    }
    return output._replace(hidden=output.hidden[:, :count], **cut), logits[:, :count]


def _stages(
    config: ModelConfig,
    inputs: Golden,
    batch: dict[str, np.ndarray],
    output: Any,
    golden: Golden,
    mask: np.ndarray,
) -> Iterator[tuple[str, Any, Any]]:
    """(name, ours, theirs) of every recorded stage before the logits, in the order of data flow."""
    if "position_ids" in golden:
        ours = np.moveaxis(np.asarray(batch["positions"]), 1, 0)
        yield "position_ids", ours[:, mask], golden["position_ids"][:, mask]
    if output.image_tokens is not None:
        orders = merged_order(config, inputs)
        for name, order in zip(("image_embeds", "video_embeds"), orders, strict=True):
            if name in golden:
                yield name, output.image_tokens[order[:, 0], order[:, 1]], golden[name]
    layers = config.text.num_layers
    for layer in range(layers + 1):
        if "hidden_states" in golden:
            ours = output.hidden if layer == layers else output.layer_inputs[layer]
            yield f"hidden_states/{layer}", ours[mask], golden["hidden_states"][layer][mask]
        if layer == layers or config.moe is None:
            continue
        if "router_logits" in golden:
            ours = output.router_logits[layer]
            theirs = golden["router_logits"][layer].reshape(*mask.shape, -1)
            yield f"router_logits/{layer}", ours[mask], theirs[mask]
        if "coefficient" in golden:
            ours = output.coefficient[layer]
            yield f"coefficient/{layer}", ours[mask], golden["coefficient"][layer][mask]


def _logits(report: Report, ours: np.ndarray, theirs: np.ndarray) -> dict[str, float | None]:
    """Largest error, mean KL(PyTorch ‖ ours) in nats, and how often the best token is the same."""
    error = report.add("logits", ours, theirs)
    p, q = (x - x.max(-1, keepdims=True) for x in (np.float64(theirs), np.float64(ours)))
    p, q = (x - np.log(np.sum(np.exp(x), -1, keepdims=True)) for x in (p, q))
    kl = float(np.mean(np.sum(np.exp(p) * (p - q), -1)))
    return {
        "max_abs_err": error,
        "kl": kl if np.isfinite(kl) else None,
        "top1_agreement": float(np.mean(ours.argmax(-1) == theirs.argmax(-1))),
    }


def _routing(
    config: ModelConfig, output: Output, golden: Golden, mask: np.ndarray
) -> dict[str, Any]:
    """How often a token reaches the same set of experts, and which differences are near-ties."""
    assert config.moe is not None and output.router_logits is not None
    k = config.moe.top_k
    theirs = golden["router_logits"].reshape(output.router_logits.shape)
    ours, theirs = output.router_logits[:, mask], theirs[:, mask]
    chosen, expected = (
        np.sort(np.argsort(-x, -1, kind="stable")[..., :k], -1) for x in (ours, theirs)
    )
    same = (chosen == expected).all(-1)
    exp = np.exp(theirs - theirs.max(-1, keepdims=True))
    ranked = -np.sort(-exp / exp.sum(-1, keepdims=True), -1)
    places = np.argwhere(~same)
    gaps = [float(ranked[layer, t, k - 1] - ranked[layer, t, k]) for layer, t in places]
    rows, columns = np.nonzero(mask)
    ties = [
        {"layer": int(layer), "row": int(rows[t]), "column": int(columns[t]), "gap": gap}
        for (layer, t), gap in zip(places, gaps, strict=True)
        if gap <= NEAR_TIE
    ]
    return {
        "router_agreement": float(same.mean()),
        "near_ties": ties,
        "routing_ok": len(ties) == len(places),
    }


def _losses(
    config: ModelConfig,
    params: Params | None,
    batch: dict[str, np.ndarray],
    output: Output,
    logits: np.ndarray,
    golden: Golden,
    report: Report,
) -> dict[str, Any]:
    """Loss, balancing loss and gradient norms.

    Programs differ in whether the recorded loss includes the weighted balancing loss. The closer of
    the two is compared and named in loss_kind, and the gradients are of that one.
    """
    result: dict[str, Any] = dict.fromkeys(
        ("loss_err", "loss_kind", "aux_loss_err", "grad_norm_max_rel_err")
    )
    norms = {
        k.removeprefix("grad_norm/"): v for k, v in golden.items() if k.startswith("grad_norm/")
    }
    if "loss" not in golden and "aux_loss" not in golden and not norms:
        return result
    if "labels" not in golden and ("loss" in golden or norms):
        raise InputError("golden key labels is missing; loss and grad_norm need it")
    labels = golden.get("labels", np.full(logits.shape[:2], IGNORED))
    weight = 0.0 if config.moe is None else config.moe.router_aux_loss_coef

    def losses(logits: Array, router: Array | None) -> tuple[Any, Any]:
        aux = jnp.zeros(())
        if config.moe is not None and router is not None:
            aux = load_balancing_loss(router, batch["segment_ids"] != 0, top_k=config.moe.top_k)
        return cross_entropy(logits, jnp.asarray(labels)), aux

    ce, aux = (float(x) for x in losses(jnp.asarray(logits), output.router_logits))
    kinds = {"cross_entropy": ce, "cross_entropy + weighted aux_loss": ce + weight * aux}
    kind = "cross_entropy"
    if "loss" in golden:
        theirs = golden["loss"]
        kind = min(kinds, key=lambda name: abs(kinds[name] - float(theirs)))
        error = report.add("loss", np.reshape(kinds[kind], theirs.shape), theirs)
        result |= {"loss_kind": kind, "loss_err": error}
    if "aux_loss" in golden and config.moe is not None:
        theirs = golden["aux_loss"]
        result["aux_loss_err"] = report.add("aux_loss", np.reshape(aux, theirs.shape), theirs)
    if norms and params is not None:
        added = 0.0 if kind == "cross_entropy" else weight
        model = EchoVLM(config)

        @jax.jit
        @jax.grad
        def gradient(params: Params) -> jax.Array:
            out: Any = model.apply({"params": params}, batch)
            logits: Any = model.apply({"params": params}, out.hidden, method="logits")
            ce, aux = losses(logits, out.router_logits)
            return ce + added * aux

        result["grad_norm_max_rel_err"] = _gradients(config, gradient(params), norms, report)
    return result


def cross_entropy(logits: Array, labels: Array) -> jax.Array:
    """Mean next-token cross-entropy over labels that are not −100, in float32."""
    labels = labels[:, 1:]
    counted = labels != IGNORED
    log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_p, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * counted) / jnp.maximum(jnp.sum(counted), 1)


def _gradients(
    config: ModelConfig, gradient: Params, norms: Golden, report: Report
) -> float | None:
    """Largest |a − b| / max(b, 1e-4 · the largest norm) over the recorded parameters.

    The floor keeps a gradient that is zero but for rounding from being a division by nothing.
    """
    wanted = slots(config)
    flat = {path: np.asarray(leaf) for path, leaf in flatten(gradient).items()}
    ours = {
        # In float64: a float32 sum over millions of squares is off by a thousandth.
        name: float(np.sqrt(np.sum(np.square(flat[slot.path][slot.index], dtype=np.float64))))
        for name, slot in wanted.items()
    }
    unknown = sorted(set(norms) - set(ours))
    if unknown:
        raise InputError(f"golden key grad_norm/{unknown[0]} names no parameter of this model")
    floor = 1e-4 * max(float(n) for n in norms.values())
    scale = {name: max(float(norm), floor, 1e-30) for name, norm in norms.items()}
    error = {name: abs(ours[name] - float(norm)) / scale[name] for name, norm in norms.items()}
    limit = {name: GRADIENT_RTOL + GRADIENT_RTOL_PER_VALUE * wanted[name].size for name in norms}
    # A NaN is no number and worse than any.
    worst = max(norms, key=lambda name: np.nan_to_num(error[name] / limit[name], nan=np.inf))
    finite = bool(np.isfinite(error[worst]))
    report.stages.append(
        {
            "name": f"grad_norm/{worst}",
            "max_abs_err": error[worst] * scale[worst] if finite else None,
            "limit": limit[worst] * scale[worst] if finite else None,
            "ok": finite and error[worst] <= limit[worst],
        }
    )
    return max(error.values()) if finite else None


def _generated(config: ModelConfig, params: Params, inputs: Golden, expected: np.ndarray) -> bool:
    """Whether greedy decoding, with no stop token, gives the same tokens."""
    made = generate(config, params, inputs, max_new_tokens=expected.shape[1], eos_token_ids=())
    return bool(np.array_equal(made.tokens, expected))
