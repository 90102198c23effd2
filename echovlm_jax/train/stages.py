"""What trains in which stage: ordered lists of (regular expression, how)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from echovlm_jax.errors import InputError
from echovlm_jax.ops.product.weight import Quantized
from echovlm_jax.patterns import Pattern
from echovlm_jax.train.lora import takes_update

HOW = ("full", "lora", "frozen")


class Rule(NamedTuple):
    """How the parameters train whose whole path an expression matches.

    Attributes:
      pattern: the expression.
      how: "full" trains a parameter, "lora" leaves it as it is and trains a low-rank update beside
        it, "frozen" leaves it.
      rate: times the learning rate.
      weight_decay: decoupled, of what trains; None: the configuration's.
    """

    pattern: str
    how: str
    rate: float = 1.0
    weight_decay: float | None = None


Rules = Sequence[Rule]

_NEW_PATH = r"text/layers/(moe|coefficient)/.*"  # what EchoVLM adds to Qwen2-VL
# The first rule that matches decides.
STAGES: Mapping[str, Rules] = {
    # The two stages of the paper (arXiv 2509.14977) as the released scripts have them, and the
    # scripts' variant of the first that trains the whole vision tower.
    "alignment": (
        Rule(_NEW_PATH, "full"),
        Rule(r"vision/merger/fc\d/.*", "full"),
        Rule(r".*", "frozen"),
    ),
    "alignment_with_vision": (
        Rule(_NEW_PATH, "full"),
        Rule(r"vision/.*", "full"),
        Rule(r".*", "frozen"),
    ),
    "instruction": (
        Rule(_NEW_PATH, "full"),
        Rule(r"text/layers/(attn|mlp)/\w+/kernel", "lora"),
        Rule(r"vision/(blocks/(attn|mlp)|merger)/\w+/kernel", "lora"),
        Rule(r".*", "frozen"),
    ),
    "full": (Rule(r".*", "full"),),
}


def read_rules(stage: str, listed: Any = None) -> Rules:
    """The rules of a stage, or those of a configuration's key `stage_rules` in their place.

    Args:
      stage: a key of STAGES.
      listed: a list or tuple of (pattern, how), (pattern, how, rate) or (pattern, how, rate,
        weight decay); None: the stage's own.

    Raises:
      InputError: an unknown stage, or an entry that is no rule.
    """
    if stage not in STAGES:
        raise InputError(f"stage {stage!r} is unknown; choose one of {', '.join(STAGES)}")
    if listed is None:
        return STAGES[stage]
    if not isinstance(listed, list | tuple) or not listed:
        raise InputError(
            "config key stage_rules must be a tuple of (pattern, how), such as"
            f' (("text/.*", "lora"), (".*", "frozen")), or none; found {listed!r}'
        )
    return tuple(_rule(number, one) for number, one in enumerate(listed, 1))


def _rule(number: int, given: Any) -> Rule:
    """One entry, checked."""

    def refuse(what: str) -> InputError:
        return InputError(f"config key stage_rules: rule {number}, {given!r}: {what}")

    if not isinstance(given, list | tuple) or not 2 <= len(given) <= 4:
        raise refuse("write (pattern, how), (pattern, how, rate) or (pattern, how, rate, decay)")
    rule = Rule(*given)
    Pattern(rule.pattern, str(refuse("the pattern")))
    if rule.how not in HOW:
        raise refuse(f"how must be one of {', '.join(HOW)}")
    if rule.how == "frozen" and len(given) > 2:
        raise refuse("what is frozen has neither rate nor weight decay")
    if not _number(rule.rate) or rule.rate <= 0:
        raise refuse("the rate must be a number above 0; what shall not train is frozen")
    if rule.weight_decay is not None and (not _number(rule.weight_decay) or rule.weight_decay < 0):
        raise refuse("the weight decay must be a number of at least 0, or none")
    return rule


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def match_rules(params: Any, rules: Rules, name: str) -> dict[str, Rule]:
    """Each parameter's path → the first rule that matches it.

    Args:
      params: nested dict of parameters, or of their shapes.
      rules: of `read_rules`.
      name: the stage, for errors.

    Raises:
      InputError: a parameter that no rule matches; a rule that no parameter is left for; an update
        beside a parameter that can't have one.
    """
    used, found = set(), {}
    patterns = [Pattern(rule.pattern, f"stage {name}: rule {rule.pattern}") for rule in rules]
    for path in flatten_dict(params, sep="/"):
        number = next((i for i, one in enumerate(patterns) if one.find(path, "fullmatch")), None)
        if number is None:
            raise InputError(f"stage {name}: no rule says how {path} trains")
        if rules[number].how == "lora" and not takes_update(path):
            raise InputError(
                f"stage {name}: rule {rules[number].pattern} puts an update beside {path}, which"
                " can't have one; say full or frozen of it in a rule before"
            )
        used.add(number)
        found[path] = rules[number]
    for number, rule in enumerate(rules):
        if number not in used:
            raise InputError(
                f"stage {name}: this model has no parameter for its rule {rule.pattern}, or rules"
                " before it match them all"
            )
    return found


def how_it_trains(params: Any, stage: str) -> dict[str, str]:
    """Each parameter's path → "full", "lora" or "frozen" in a stage; errors as of `match_rules`."""
    rules = match_rules(params, read_rules(stage), stage)
    return {path: rule.how for path, rule in rules.items()}


def by_leaf(trainable: Any, rules: Mapping[str, Rule]) -> Any:
    """A tree like `trainable` of each array's rule; an update's is its kernel's."""

    def rule(path: Any, _: Any) -> Rule:
        part, *names = (key.key for key in path)
        return rules["/".join(names if part == "params" else (*names[:-1], "kernel"))]

    return jax.tree_util.tree_map_with_path(rule, trainable)


def training_table(
    state: Any, how: Mapping[str, str], rules: Mapping[str, Rule] | None = None
) -> str:
    """What trains how, a line a parameter, with counts: for people, before anything is compiled.

    Args:
      state: a TrainState of arrays or shapes.
      how: of `how_it_trains`.
      rules: of `match_rules`, with a weight decay in each: rates and decays are then shown too.
    """
    flat: dict[str, Any] = flatten_dict(merge(state.trainable["params"], state.frozen), sep="/")
    updates: dict[str, Any] = flatten_dict(state.trainable.get("lora", {}), sep="/")
    rows = [("parameter", "shape", "dtype", "how", "trains", "rate ×", "weight decay", "rule")]
    for path in sorted(flat, key=lambda path: (HOW.index(how[path]), path)):
        leaf, module = flat[path], path.removesuffix("/kernel")
        added = sum(
            updates[name].size for name in (f"{module}/a", f"{module}/b") if name in updates
        )
        shape = "×".join(map(str, leaf.shape))
        trains = count(leaf) if how[path] == "full" else added
        rule = rules[path] if rules else Rule("", how[path])
        rate, decay = (f"{x or 0:g}" if trains else "" for x in (rule.rate, rule.weight_decay))
        told = (rate, decay, rule.pattern)
        dtype = (leaf.values if isinstance(leaf, Quantized) else leaf).dtype
        rows.append((path, shape, str(dtype), how[path], f"{trains:,}", *told))
    shown = rows if rules else [row[:5] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in shown
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
    """How many values the arrays of a tree hold, or would; a quantized weight's, without scales."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return sum(math.prod(leaf.shape) for leaf in leaves)
