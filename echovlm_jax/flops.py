"""FLOPs by formula, from a model's sizes and the description of its parameters.

Two counts, in floating-point operations of matrix products (a multiply-add is two):

`model_flops` is the useful work, the numerator of model FLOPs utilisation as PaLM (arXiv
2204.02311, appendix B) counts it: every weight product and the attention scores; causal attention
half of its square; the experts that a token goes to, not those that run; nothing that is computed
twice. A patch that attends in a window counts a whole one. Padding counts like a full row's work;
`Flops.used` is what is left without it. The backward pass costs what the trained parameters need:
where all train, twice the forward.

`executed_flops` is what a program does with a given dispatch and attention: unused experts, the
masked half of the scores, products that rematerialisation repeats. It is the one to compare with a
compiled program's count.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from echovlm_jax.config import ModelConfig
from echovlm_jax.errors import InputError
from echovlm_jax.model import ParamSpec, param_specs
from echovlm_jax.ops.attention.kernels import near_block
from echovlm_jax.ops.attention.near import AROUND

STEPS = ("train", "prefill", "decode")


@dataclass(frozen=True)
class Work:
    """What one step is about.

    Attributes:
      rows: rows of the batch, over all devices.
      seq_len: tokens a row; for "decode" the slots that the one new token of a row looks at.
      max_patches: patches a row; 0 for no images.
      frame_patches: patches that attend to each other. None: a row is one frame, the worst case.
      segment_len: tokens that attend to each other in a packed row. None: a row is one segment.
      step: train, prefill (logits of a row's last token) or decode (no images).
      trains: path of each parameter → "full", "lora" or "frozen", for "train". None: all in full.
      lora_rank: of the updates.
    """

    rows: int
    seq_len: int
    max_patches: int = 0
    frame_patches: int | None = None
    segment_len: int | None = None
    step: str = "train"
    trains: Mapping[str, str] | None = None
    lora_rank: int = 0

    def __post_init__(self) -> None:
        if self.step not in STEPS:
            raise InputError(f"step {self.step!r} is unknown; choose one of {', '.join(STEPS)}")

    @property
    def tokens(self) -> int:
        return self.rows * (1 if self.step == "decode" else self.seq_len)

    @property
    def patches(self) -> int:
        return 0 if self.step == "decode" else self.rows * self.max_patches

    def any_trains(self, *prefixes: str) -> bool:
        """Whether a parameter under one of these paths trains."""
        if self.step != "train":
            return False
        return self.trains is None or any(
            how != "frozen" and path.startswith(prefixes) for path, how in self.trains.items()
        )

    def how(self, path: str) -> str:
        return "full" if self.trains is None else self.trains[path]


@dataclass(frozen=True)
class Execution:
    """How a program does it, as far as FLOPs are concerned.

    Attributes:
      dispatch: experts run on all tokens ("dense"), on those that chose them ("ragged"), or on
        `capacity_factor` places in each group of tokens ("einsum").
      capacity_factor, group_size: of "einsum"; None is as many places as tokens.
      attention: "blocks" (all scores, and again in the backward pass), "whole" (all scores, once:
        XLA merges a single block's where it sees both passes side by side, in a model of one layer
        or under `remat`), or "splash" (half of the scores where causal; its two backward kernels
        make them again). Layers with windows: of the keys around a query alone, unless the row has
        no more.
      remat: whether a layer's forward pass runs again in the backward pass.
      head_again: whether the logits are computed again in the backward pass.
    """

    dispatch: str = "dense"
    capacity_factor: float | None = None
    group_size: int = 256
    attention: str = "blocks"
    remat: bool = False
    head_again: bool = False


class Term(NamedTuple):
    """FLOPs of one part of the model in one step."""

    name: str
    forward: float
    backward: float  # 0 but for "train"


class Flops(NamedTuple):
    """FLOPs of one step, part by part."""

    terms: tuple[Term, ...]

    @property
    def forward(self) -> float:
        return sum(term.forward for term in self.terms)

    @property
    def backward(self) -> float:
        return sum(term.backward for term in self.terms)

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def used(self, tokens: float, patches: float) -> float:
        """The part of the total that is no padding, where rows are packed.

        Args:
          tokens, patches: the shares of the rows' places that hold something.
        """
        vision = sum(t.forward + t.backward for t in self.terms if t.name.startswith("vision "))
        return (self.total - vision) * tokens + vision * patches

    def __str__(self) -> str:
        """A table: part, forward, backward and share."""
        rows = [*self.terms, Term("total", self.forward, self.backward)]
        wide = max(len(row.name) for row in rows)
        return "\n".join(
            f"{name:{wide}}  {forward:10.4g}  {backward:10.4g}"
            f"  {(forward + backward) / (self.total or 1):6.1%}"
            for name, forward, backward in rows
        )


def model_flops(config: ModelConfig, work: Work) -> Flops:
    """The useful FLOPs of one step over all devices. Example: Work(rows=16, seq_len=2048)."""
    return Flops(tuple(_terms(config, work, None)))


def executed_flops(config: ModelConfig, work: Work, execution: Execution) -> Flops:
    """The matmul FLOPs that a program executes in one step, over all devices."""
    return Flops(tuple(_terms(config, work, execution)))


def layer_flops(config: ModelConfig, work: Work, execution: Execution | None = None) -> Flops:
    """One decoder layer's part of a step: the useful one, or the executed one."""
    terms = _decoder(config, work, execution)
    layers = config.text.num_layers
    return Flops(tuple(Term(t.name, t.forward / layers, t.backward / layers) for t in terms))


def score_flops(
    *,
    rows: int,
    heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    causal: bool,
    products: int = 2,
) -> float:
    """FLOPs of attention's products between queries and keys, weights not included.

    Args:
      rows, heads, queries, keys, head_dim: sizes.
      causal: half of the square.
      products: q·k and weights·v make two. A kernel's backward pass has its own number: splash
        attention's for q's gradient 3, the one for k's and v's 4, both in one kernel 5.
    """
    return products * 2.0 * rows * heads * queries * keys * head_dim / (2 if causal else 1)


_Weights = Mapping[str, ParamSpec]


def _products(config: ModelConfig, *prefixes: str) -> _Weights:
    """The weights of products under these paths."""
    return {
        path: spec
        for path, spec in param_specs(config).items()
        if spec.inputs and path.startswith(prefixes)
    }


def _terms(config: ModelConfig, work: Work, execution: Execution | None) -> Iterator[Term]:
    if work.patches:
        yield from _vision(config, work, execution)
    yield from _decoder(config, work, execution)
    head = _products(config, "text/embed/" if config.text.tie_word_embeddings else "text/lm_head/")
    tokens = work.tokens if work.step == "train" else work.rows
    before = work.any_trains(*_before_decoder(work), "text/layers", "text/final_norm")
    again = execution is not None and execution.head_again and work.step == "train"
    yield _weights("lm_head", head, tokens, work, before, again=again)


def _before_decoder(work: Work) -> tuple[str, ...]:
    return ("text/embed", "vision") if work.patches else ("text/embed",)


def _vision(config: ModelConfig, work: Work, execution: Execution | None) -> Iterator[Term]:
    v, merger = config.vision, "vision/merger"
    embed = _products(config, "vision/patch_embed/")
    yield _weights("vision patch embedding", embed, work.patches, work, before=False)
    # A scan's backward pass is the same for every layer: if a layer's input needs a gradient
    # anywhere, it gets one everywhere.
    trains = work.any_trains("vision/patch_embed", "vision/blocks")
    remat = execution is not None and execution.remat and trains
    # Nothing in the backward pass reads the last product's result: it is never repeated.
    ends = ("vision/blocks/mlp/fc2/", "vision/blocks/mlp/down/")
    last = _products(config, *ends)
    rest = _products(config, "vision/blocks/attn/", "vision/blocks/mlp/")
    rest = {path: spec for path, spec in rest.items() if path not in last}
    yield _sum(
        "vision blocks",
        _weights("", rest, work.patches, work, trains, again=remat),
        _weights("", last, work.patches, work, trains),
    )
    yield from _vision_scores(config, work, execution, trains)
    before = trains or work.any_trains("vision/merger/ln_q")
    merged = work.patches / v.merge_unit
    between = before or work.any_trains(f"{merger}/fc1")
    yield _sum(
        "vision merger",
        _weights("", _products(config, f"{merger}/fc1/"), merged, work, before),
        _weights("", _products(config, f"{merger}/fc2/"), merged, work, between),
    )


def _vision_scores(
    config: ModelConfig, work: Work, execution: Execution | None, trains: bool
) -> Iterator[Term]:
    """Of the layers that look at whole frames, and of those that look at windows."""
    v, patches = config.vision, work.max_patches
    # Programs mask what lies in other segments; they don't know beforehand that they may skip it.
    frame = (work.frame_patches if execution is None else None) or patches
    windows = sum(v.windowed)
    reach = v.window_patches or patches
    window = min(reach, frame)
    if execution is not None:  # the blocks of keys around a query's own, and not the whole row
        splash = execution.attention == "splash"
        window = min(AROUND * (near_block(reach) if splash else reach), patches)
        if 0 < windows < v.depth and not splash:
            # Each pass has a condition of its own, which XLA merges with nothing.
            execution = replace(execution, attention="blocks")
    for name, layers, keys in (
        ("vision attention scores", v.depth - windows, frame),
        ("vision window scores", windows, window),
    ):
        square = score_flops(
            rows=work.rows * layers,
            heads=v.num_heads,
            queries=patches,
            keys=keys,
            head_dim=v.head_dim,
            causal=False,
        )
        if layers:
            yield _scores(name, square, trains, execution)


def _decoder(config: ModelConfig, work: Work, execution: Execution | None) -> Iterator[Term]:
    text, moe, layers = config.text, config.moe, "text/layers"
    width, copies = text.hidden_size, text.num_layers
    trains = work.any_trains(*_before_decoder(work), layers)
    remat = execution is not None and execution.remat and trains

    def weights(name: str, *parts: str, again: bool = remat, share: float = 1.0) -> Term:
        products = _products(config, *(f"{layers}/{part}/" for part in parts))
        return _weights(name, products, work.tokens, work, trains, again=again, share=share)

    yield weights("attention weights", "attn")
    whole = execution is not None and execution.attention != "splash"
    segment = work.segment_len if execution is None else None
    one = work.step == "decode"
    square = score_flops(
        rows=work.rows * copies,
        heads=text.num_heads,
        queries=1 if one else work.seq_len,
        keys=work.seq_len if one else segment or work.seq_len,
        head_dim=text.head_dim,
        causal=not whole and not one,
    )
    yield _scores("attention scores", square, trains, execution)
    if moe is None:  # nothing in the backward pass reads what the last product makes
        first, last = weights("", "mlp/gate", "mlp/up"), weights("", "mlp/down", again=False)
        yield _sum("MLP", first, last)
        return
    yield weights("MLP", "mlp")
    yield weights("shared expert", "moe/shared", "moe/shared_gate")
    run, moved = _dispatched(config, work, execution)
    yield weights("experts", "moe/experts", share=run / moe.num_experts)
    yield weights("router and coefficient", "moe/router", "coefficient")
    if moved:
        # Two einsums of one-hot places with activations, each with the gradients that flow on: the
        # dispatch's is for the tokens alone, the combination's for the places' weights too.
        one = 2.0 * work.tokens * width * moved * copies
        again = 2 * one if remat else 0.0
        yield Term("dispatch and combine", 2 * one, 3 * one + again if trains else 0.0)


def _dispatched(
    config: ModelConfig, work: Work, execution: Execution | None
) -> tuple[float, float]:
    """(experts that a token costs, expert places that each token's dispatch is multiplied with)."""
    moe = config.moe
    assert moe is not None
    if execution is None or execution.dispatch == "ragged":
        return moe.top_k, 0.0
    if execution.dispatch == "dense":
        return moe.num_experts, 0.0
    if execution.dispatch != "einsum":
        raise InputError(
            f"moe_dispatch {execution.dispatch!r} is unknown; choose dense, ragged or einsum"
        )
    group = min(execution.group_size, work.tokens)
    places = group
    if execution.capacity_factor is not None:
        even = moe.top_k * group / moe.num_experts
        places = min(group, math.ceil(execution.capacity_factor * even))
    return moe.num_experts * places / group, moe.num_experts * places


def _weights(
    name: str,
    products: _Weights,
    tokens: float,
    work: Work,
    before: bool,
    *,
    again: bool = False,
    share: float = 1.0,
) -> Term:
    """Weight products: their gradients for the weights that train and, where something before them
    trains, for their inputs; `again` adds a second forward pass. A token meets this share of the
    stacked weights."""
    forward = backward = 0.0
    for path, spec in products.items():
        lead, outputs, inputs = map(math.prod, spec.cut(spec.shape))
        once = 2.0 * tokens * spec.multiply_adds * share
        how = work.how(path) if work.step == "train" else "frozen"
        low_in, low_out = (
            2.0 * tokens * work.lora_rank * n * lead * share for n in (inputs, outputs)
        )
        forward += once
        backward += once * ((how == "full") + before + again)
        if how == "lora":  # x → low → y: both train, so low always needs its gradient
            forward += low_in + low_out
            backward += low_in * (1 + before + again) + low_out * (2 + again)
    return Term(name, forward, backward)


def _sum(name: str, *terms: Term) -> Term:
    return Term(name, sum(t.forward for t in terms), sum(t.backward for t in terms))


def _scores(name: str, square: float, trains: bool, execution: Execution | None) -> Term:
    """Scores and weighted sums, `square` FLOPs forward; four products in the backward pass."""
    if not trains:
        return Term(name, square, 0.0)
    attention = None if execution is None else execution.attention
    products = {"blocks": 5, "splash": 7}.get(attention or "", 4)
    products += 2 if execution is not None and execution.remat else 0
    return Term(name, square, square / 2 * products)
