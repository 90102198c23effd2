"""What trains in which stage: ordered lists of (regular expression, how)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from echovlm_jax.errors import InputError

Rules = Sequence[tuple[str, str]]

# The first expression that matches the whole of a parameter's path decides: "full" trains it,
# "lora" leaves it as it is and trains a low-rank update beside it, "frozen" leaves it.
_NEW_PATH = r"text/layers/(moe|coefficient)/.*"  # what EchoVLM adds to Qwen2-VL
STAGES: Mapping[str, Rules] = {
    # The two stages of the paper (arXiv 2509.14977) as the released scripts have them, and the
    # scripts' variant of the first that trains the whole vision tower.
    "alignment": ((_NEW_PATH, "full"), (r"vision/merger/fc\d/.*", "full"), (r".*", "frozen")),
    "alignment_with_vision": (
        (_NEW_PATH, "full"),
        (r"vision/.*", "full"),
        (r".*", "frozen"),
    ),
    "instruction": (
        (_NEW_PATH, "full"),
        (r"text/layers/(attn|mlp)/\w+/kernel", "lora"),
        (r"vision/(blocks/(attn|mlp)|merger)/\w+/kernel", "lora"),
        (r".*", "frozen"),
    ),
    "full": ((r".*", "full"),),
}


def how_it_trains(params: Any, stage: str) -> dict[str, str]:
    """Each parameter's path → "full", "lora" or "frozen".

    Args:
      params: nested dict of parameters, or of their shapes.
      stage: a key of STAGES.

    Raises:
      InputError: an unknown stage, or an expression that no parameter is left for.
    """
    if stage not in STAGES:
        raise InputError(f"stage {stage!r} is unknown; choose one of {', '.join(STAGES)}")
    rules, used, found = STAGES[stage], set(), {}
    for path in flatten_dict(params, sep="/"):
        rule = next((rule for rule in rules if re.fullmatch(rule[0], path)), None)
        if rule is None:
            raise InputError(f"stage {stage}: no rule says how {path} trains")
        used.add(rule)
        found[path] = rule[1]
    for rule in rules:
        if rule not in used:
            raise InputError(f"stage {stage}: this model has no parameter for its rule {rule[0]}")
    return found


def training_table(state: Any, how: Mapping[str, str]) -> str:
    """What trains how, a line a parameter, with counts: for people, before anything is compiled.

    Args:
      state: a TrainState of arrays or shapes.
      how: of `how_it_trains`.
    """
    flat: dict[str, Any] = flatten_dict(merge(state.trainable["params"], state.frozen), sep="/")
    updates: dict[str, Any] = flatten_dict(state.trainable.get("lora", {}), sep="/")
    rows = []
    for path in sorted(flat, key=lambda path: (("full", "lora", "frozen").index(how[path]), path)):
        leaf, module = flat[path], path.removesuffix("/kernel")
        added = sum(
            updates[name].size for name in (f"{module}/a", f"{module}/b") if name in updates
        )
        shape = "×".join(map(str, leaf.shape))
        trains = leaf.size if how[path] == "full" else added
        rows.append((path, shape, str(leaf.dtype), how[path], f"{trains:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    whole, trained = count(flat), count(state.trainable)
    lines.append(f"{whole:,} parameters; {trained:,} values train ({trained / whole:.1%} of that)")
    return "\n".join(lines) + "\n"


def split(params: Any, how: Mapping[str, str]) -> tuple[Any, Any]:
    """(trained in full, the rest): two nested dicts that `merge` joins again."""
    flat = flatten_dict(params, sep="/")
    parts = [
        {path: leaf for path, leaf in flat.items() if (how[path] == "full") == trained}
        for trained in (True, False)
    ]
    return unflatten_dict(parts[0], sep="/"), unflatten_dict(parts[1], sep="/")


def merge(a: Any, b: Any) -> Any:
    """One nested dict from two that have no leaf in common."""
    return unflatten_dict({**flatten_dict(a), **flatten_dict(b)})


def count(tree: Any) -> int:
    """How many values the arrays of a tree hold, or would."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
