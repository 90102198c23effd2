"""Statistics of a dataset as a run sees it: counts, lengths, packing, organs."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echovlm_jax.data import folder
from echovlm_jax.data.dataset import PHANTOM
from echovlm_jax.data.epoch import Epoch, make_epoch
from echovlm_jax.data.examples import Source, open_source
from echovlm_jax.data.fit import NO_LIMIT, fit
from echovlm_jax.data.packing import WINDOW, pack
from echovlm_jax.data.record import LANGUAGES
from echovlm_jax.data.review import counted, filled, rows_of
from echovlm_jax.data.settings import Settings

# Patches a row has room for, over what the tokens of a full row would bring on average. Rows differ
# in how much of them is images: with little room patches run out before tokens do, a lot of room
# is padding that the vision model computes. Four patches are about a quarter of the decoder's work
# on a token (0.29 in the 11 B model where all of it trains, by `flops.py`); unused ones count so.
_SPARE = (1.04, 1.08, 1.12, 1.2, 1.3, 1.5)
_PATCHES_COUNT = 0.25
_SAMPLES = 2 * WINDOW  # that suggestions are tried on
_STEP = 128  # what a suggested number of patches is a multiple of: attention's blocks are
_GROUPING = ("groups", "ungrouped", "unnamed", "largest_group", "near_duplicates")


def stats(
    data: str | Path, split: str = "train", settings: Settings | None = None
) -> dict[str, Any]:
    """What one epoch of a dataset holds.

    Args:
      data: a folder made by `data build`, or "phantom".
      settings: those of the run; `data` and `split` are ignored. None: the shipped
        configurations' rows, organs as they are, and a byte for a token, about twice as many as
        the model's own tokenizer makes.

    Returns:
      plain data for JSON. `tasks`, `by_organ`, `images_shrunk`, `dropped`, `useful_patches` and
      `packing_efficiency`: as `review.counted`; of each organ also its exams, its share, how often
      one comes up in an epoch, its lengths, and how full rows of it alone would be. `samples` and
      `languages`: what is trained on. `suggested`: patches a row for these tokens a row, and what
      they would give. groups, ungrouped, unnamed, largest_group and near_duplicates: as `build`
      counted them.

    Raises:
      InputError: the dataset is damaged, the mixture doesn't fit it, or no sample fits a row.
    """
    settings = settings or Settings(
        data=str(data),
        model="echovlm_11b",
        stage="instruction",
        seq_len=2048,
        max_patches=3456,
        max_image_patches=784,
        global_batch_size=8,
        mix_temperature=1.0,
    )
    found = stats_of(open_source(dataclasses.replace(settings, data=str(data), split=split)))
    # Of all splits together; older datasets don't say.
    counts = {} if str(data) == PHANTOM else folder.read_manifest(Path(data))["counts"]
    return found | {key: counts[key] for key in _GROUPING if key in counts}


def stats_of(source: Source) -> dict[str, Any]:
    """`stats` of a dataset that is open."""
    settings, epoch = source.settings, make_epoch(source, 0)
    rows, seen = len(epoch.offsets) - 1, counted(source, epoch)
    return seen | {
        "records": len(source.dataset),
        "samples": len(epoch.record),
        "rows": rows,
        "steps_per_epoch": rows // settings.global_batch_size,
        "samples_per_row": len(epoch.record) / rows,
        "seq_len": settings.seq_len,
        "max_patches": settings.max_patches,
        "tokens": _spread(epoch.tokens),
        "patches": _spread(epoch.patches),
        "same_exam_in_a_batch": int(epoch.clashes),
        "by_organ": _by_organ(source, epoch, seen["by_organ"]),
        "languages": _shares(epoch.language, LANGUAGES),
        "suggested": _suggested(source, epoch),
    }


def _by_organ(source: Source, epoch: Epoch, seen: Mapping[str, Any]) -> dict[str, Any]:
    settings, out = source.settings, {}
    organs = source.dataset.organs[epoch.record]
    for i, name in enumerate(source.dataset.organ_names):
        at = np.flatnonzero(organs == i)
        tokens, patches = epoch.tokens[at], epoch.patches[at]
        out[name] = seen[name] | {
            "records": len(source.peers[i]),
            "samples": len(at),
            "share": len(at) / len(organs),
            "repeats": seen[name]["drawn"] / max(1, len(source.peers[i])),
        }
        if len(at):
            budgets = settings.seq_len, settings.max_patches
            rows = len(pack(tokens, patches, *budgets, key=0).offsets) - 1
            out[name] |= {
                "tokens": _spread(tokens),
                "patches": _spread(patches),
                "packing_efficiency": filled(tokens, patches, rows, settings),
            }
    return out


def _spread(values: np.ndarray) -> dict[str, Any]:
    """Mean, percentiles and a histogram of twelve equal bins."""
    counts, edges = np.histogram(values, 12, (0, max(12, int(values.max()) + 1)))
    low, middle, high = (int(v) for v in np.percentile(values, (5, 50, 95), method="lower"))
    return {
        "mean": float(values.mean()),
        "p5": low,
        "p50": middle,
        "p95": high,
        "max": int(values.max()),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _shares(values: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    counts = np.bincount(values, minlength=len(names))
    return {name: int(n) / len(values) for name, n in zip(names, counts, strict=True) if n}


def _suggested(source: Source, epoch: Epoch) -> dict[str, Any]:
    """The patches a row that suit its tokens, where no exam has to shrink for them."""
    settings, images = source.settings, source.images
    unit = images.merge_size**2
    text = (epoch.tokens - epoch.patches // unit)[:_SAMPLES]
    natural = np.empty(len(text), np.int64)
    limits = (settings.seq_len, NO_LIMIT, settings.max_image_patches)
    for i, tokens in enumerate(text.tolist()):
        media = source.dataset.record(int(epoch.record[i])).media
        natural[i] = sum(grid.patches for grid in fit(media, tokens, *limits, images) or ())
    tokens = text + natural // unit
    mean, most = settings.seq_len * natural.sum() / tokens.sum(), int(natural.max())
    tried = []
    for spare in _SPARE:
        budget = -(-max(int(np.ceil(mean * spare)), most) // _STEP) * _STEP
        rows = len(pack(tokens, natural, settings.seq_len, budget, key=0).offsets) - 1
        wider = dataclasses.replace(settings, max_patches=budget)
        tried.append((budget, filled(tokens, natural, rows, wider)))
    budget, used = max(tried, key=lambda one: one[1]["tokens"] + _PATCHES_COUNT * one[1]["patches"])
    return {"max_patches": budget, "packing_efficiency": used}


def describe(found: Mapping[str, Any]) -> str:
    """What `stats` returns, as a text for people."""
    used, better = found["packing_efficiency"], found["suggested"]
    dropped = ", ".join(f"{n} {reason}" for reason, n in found["dropped"].items())
    lines = [
        f"{found['records']:,} exams; an epoch shows {found['samples']:,} samples in"
        f" {found['rows']:,} rows, {found['steps_per_epoch']:,} steps",
        f"left out: {dropped or 'none'}; images made smaller to fit a row:"
        f" {found['images_shrunk']:,}; in a batch that has the exam already:"
        f" {found['same_exam_in_a_batch']:,}",
        "",
        *rows_of("task", found["tasks"]),
        "",
        f"{'organ':<16}{'exams':>10}{'samples':>10}{'dropped':>9}{'shrunk':>8}{'share':>8}"
        f"{'times':>7}"
        f"{'tokens':>8}{'patches':>9}  alone, full to",
    ]
    for name, organ in found["by_organ"].items():
        line = f"{name:<16}{organ['records']:>10,}{organ['samples']:>10,}"
        line += f"{organ['dropped']:>9,}{organ['shrunk']:>8,}{organ['share']:>8.1%}"
        line += f"{organ['repeats']:>7.2f}"
        if organ["samples"]:
            alone = organ["packing_efficiency"]
            line += f"{organ['tokens']['mean']:>8.0f}{organ['patches']['mean']:>9.0f}"
            line += f"  {alone['tokens']:.1%} of tokens, {alone['patches']:.1%} of patches"
        lines.append(line)
    shares = sorted(found["languages"].items(), key=lambda item: -item[1])
    lines += ["languages: " + ", ".join(f"{name} {share:.1%}" for name, share in shares)]
    for what in ("tokens", "patches"):
        lines += ["", *_bars(f"{what} a sample", found[what])]
    lines += [
        "",
        f"rows of {found['seq_len']} tokens and {found['max_patches']} patches are full to"
        f" {used['tokens']:.1%} and {used['patches']:.1%}",
        f"with max_patches {better['max_patches']}: to {better['packing_efficiency']['tokens']:.1%}"
        f" and {better['packing_efficiency']['patches']:.1%}",
    ]
    if "groups" in found:
        ties = ", ".join(f"{n:,} by {kind}" for kind, n in found["groups"].items())
        lines += [
            f"groups in one split each: {ties or 'none'}; of {found['unnamed']:,} exams no patient"
            f" is named; near-duplicates across splits: {found['near_duplicates']:,}"
        ]
    return "\n".join(lines)


def _bars(title: str, spread: Mapping[str, Any]) -> list[str]:
    edges, counts = spread["histogram"]["edges"], spread["histogram"]["counts"]
    lines = [
        f"{title}: mean {spread['mean']:.0f}, 5 % below {spread['p5']}, half below"
        f" {spread['p50']}, 95 % below {spread['p95']}, at most {spread['max']}"
    ]
    for start, end, n in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * -(-40 * n // max(counts))
        lines.append(f"  {start:>7.0f} to {end:>7.0f} {n:>9,} {bar}".rstrip())
    return lines
