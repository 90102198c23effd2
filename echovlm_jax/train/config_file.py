"""Training configurations: reading a file, changing keys of it, and checking all of them."""

import difflib
import math
import numbers
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from echovlm_jax.data.tasks import TASKS
from echovlm_jax.errors import InputError
from echovlm_jax.mesh import AXES
from echovlm_jax.model.compute import REMAT
from echovlm_jax.ops.moe.dispatch import DISPATCHES
from echovlm_jax.storage.files import as_path, local_path
from echovlm_jax.train.loss import WEIGHTINGS
from echovlm_jax.train.stages import STAGES, read_rules
from echovlm_jax.train.step import BALANCES


class Constraint(NamedTuple):
    """What a key's value must be."""

    type: type
    holds: Callable[[Any], bool]  # of a value of that type
    text: str  # what `holds` asks for, after "must be"
    optional: bool = False  # the key may be missing, or None


def _at_least(least: int) -> Constraint:
    return Constraint(int, lambda value: value >= least, f"a whole number of at least {least}")


def _one_of(names: Sequence[str], optional: bool = False) -> Constraint:
    return Constraint(str, lambda value: value in names, f"one of {', '.join(names)}", optional)


_NAMED = Constraint(str, bool, "a name, or a folder's path")
_ABOVE_0 = Constraint(float, lambda value: value > 0, "a number above 0")
_BELOW_1 = Constraint(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")
_NOT_NEGATIVE = Constraint(float, lambda value: value >= 0, "a number of at least 0")
_AXIS = Constraint(int, lambda value: value == -1 or value >= 1, "at least 1, or -1 to be inferred")
_DTYPE = _one_of(("float32", "bfloat16"))

# Every key of a configuration; a dot stands between a group and its key.
CONSTRAINTS: Mapping[str, Constraint] = {
    "seed": _at_least(0),
    "model": _NAMED,
    "data": _NAMED,
    "stage": _one_of(tuple(STAGES)),
    # What each may be, `stages.read_rules` says.
    "stage_rules": Constraint(tuple, bool, "a tuple of (pattern, how)", optional=True),
    "steps": _at_least(1),
    "global_batch_size": _at_least(1),
    "grad_accum": _at_least(1),
    "seq_len": _at_least(1),
    "max_patches": _at_least(0),
    "max_image_patches": _at_least(1),
    "mix_temperature": _ABOVE_0._replace(optional=True),
    **{f"task_weights.{task}": _NOT_NEGATIVE._replace(optional=True) for task in TASKS},
    "allow_dropped": Constraint(float, lambda value: 0 <= value <= 1, "a number from 0 to 1", True),
    "tokenizer": _NAMED._replace(optional=True),
    "data_workers": _at_least(0)._replace(optional=True),
    "data_cache": _NAMED._replace(optional=True),
    "learning_rate": _ABOVE_0,
    "warmup_fraction": Constraint(float, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "adam_b1": _BELOW_1,
    "adam_b2": _BELOW_1,
    "adam_eps": _ABOVE_0,
    "weight_decay": _NOT_NEGATIVE,
    "clip_norm": _ABOVE_0,
    "lora.rank": _at_least(1),
    "lora.alpha": _ABOVE_0,
    "lora.dropout": _BELOW_1,
    "moe_dispatch": _one_of((*DISPATCHES, "auto")),
    "balance_weight": _NOT_NEGATIVE._replace(optional=True),
    "balance_over": _one_of(BALANCES, optional=True),
    "loss_weighting": _one_of(WEIGHTINGS, optional=True),
    "router_z_weight": _NOT_NEGATIVE._replace(optional=True),
    "capacity_factor": _ABOVE_0._replace(optional=True),
    "dtype": _DTYPE,
    "param_dtype": _DTYPE,
    # With w8a8 a product's own rounding would have no gradient.
    "quantize": _one_of(("int8", "int4"), optional=True),
    "grad_sum_dtype": _DTYPE._replace(optional=True),
    "remat": _one_of(tuple(REMAT)),
    "optimization_level": _one_of(("O0", "O1", "O2", "O3"), optional=True),
    **{f"mesh.{axis}": _AXIS for axis in AXES},
    **{f"mesh.dcn.{axis}": _at_least(1)._replace(optional=True) for axis in AXES},
    "split": _NAMED._replace(optional=True),
    "log_every": _at_least(1),
    "eval_batches": _at_least(1)._replace(optional=True),
    "eval_every": _at_least(1),
    "checkpoint_every": _at_least(1),
    "checkpoint_keep": _at_least(1),
    "checkpoint_keep_every": _at_least(1)._replace(optional=True),
}
# ArrayRecord wants a file system.
_PATHS = {"data": local_path, "model": as_path, "tokenizer": as_path, "data_cache": as_path}
# organ_weights.NAME: the names are the data's.
ORGANS = "organ_weights"


def own_config(name: str) -> Path:
    """configs/NAME.py, as installed or in a checkout. Raises InputError where it is missing."""
    package = Path(__file__).parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if (path := folder / f"{name}.py").is_file():
            return path
    raise InputError(f"{package}: has no configs/{name}.py beside it; install the package again")


def load_config(path: Path | str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> ConfigDict:
    """What a configuration file's get_config() returns, with some of its keys changed.

    Args:
      path: a Python file as in configs/. It is run: it can do whatever a program can.
      overrides: "KEY=VALUE" each, or key → value; a key in a group is GROUP.KEY. A text becomes
        the type that the key has: a whole number, a number, true or false, a text; none is None.

    Raises:
      InputError: a file that can't be read or run or has no get_config, an unknown key, or a value
        of another type. Which values make sense, `check_config` says.
    """
    config = _run(Path(path))
    if not isinstance(overrides, Mapping):
        overrides = dict(_pair(word) for word in overrides)
    for key, value in overrides.items():
        _override(config, key, value)
    return config


def check_config(config: ConfigDict) -> None:
    """Refuses a configuration that lacks a key, has one that nothing reads, or an impossible value.

    Raises:
      InputError: it names the key, the value, and what would do.
    """
    flat = dict(_flatten(config))
    for key in flat:
        if _must_be(key) is None:
            raise InputError(f"config key {key} is unknown; {_nearest(key, CONSTRAINTS)}")
    missing = [key for key, must in CONSTRAINTS.items() if key not in flat and not must.optional]
    if missing:
        raise InputError(f"the configuration lacks {', '.join(missing)}; see configs/ for examples")
    for key, value in flat.items():
        must = _must_be(key)
        if must and not (value is None and must.optional) and not _allowed(value, must):
            none = ", or none" if must.optional else ""
            raise InputError(f"config key {key} must be {must.text}{none}; found {value!r}")
    if flat.get("capacity_factor") is not None and flat["moe_dispatch"] != "einsum":
        raise InputError(
            f"config key capacity_factor is of moe_dispatch einsum; {flat['moe_dispatch']} drops"
            " nothing: leave it out"
        )
    for key, check in _PATHS.items():
        try:
            check(flat.get(key) or "")
        except InputError as error:
            raise InputError(f"config key {key}: {error}") from None
    read_rules(flat["stage"], flat.get("stage_rules"))
    weights = [value for key, value in flat.items() if key.startswith(f"{ORGANS}.")]
    if bool(weights) == (flat.get("mix_temperature") is not None):
        raise InputError(
            f"config keys mix_temperature and {ORGANS} both say how organs are mixed; give one of"
            f" them: mix_temperature, or a weight {ORGANS}.NAME for each organ"
        )
    if weights and not any(weights):
        raise InputError(f"config keys {ORGANS}.* are all 0; give some organ a weight above 0")


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What two configurations (as of JSON) say differently: "key before → after" each."""
    flat = [dict(_flatten(ConfigDict(config))) for config in (before, after)]
    keys = sorted(flat[0].keys() | flat[1].keys())
    old, new = ([one.get(key) for key in keys] for one in flat)
    return [f"{key} {a!r} → {b!r}" for key, a, b in zip(keys, old, new, strict=True) if a != b]


def _run(path: Path) -> ConfigDict:
    """The file's configuration. It is compiled here, not imported: no stale bytecode, no cache."""
    try:
        code = compile(path.read_bytes(), str(path), "exec")
    except OSError as error:
        raise InputError(f"config {path}: {error.strerror or 'cannot be read'}") from error
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"line {line}: " if line else ""
        raise InputError(
            f"config {path}: not Python: {where}{getattr(error, 'msg', error)}"
        ) from error
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(code, module.__dict__)
        get_config = module.__dict__.get("get_config")
        config = get_config() if callable(get_config) else None
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"config {path}: running it fails with {reason}") from error
    if not callable(get_config):
        raise InputError(f"config {path}: has no function get_config()")
    if type(config) is not ConfigDict:
        kind = type(config).__name__
        raise InputError(
            f"config {path}: get_config() must return an ml_collections.ConfigDict, not {kind}"
        )
    return config


def _pair(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not (key and equals):
        raise InputError(f"--config.{word} must be --config.KEY=VALUE")
    return key, value


def _override(config: ConfigDict, key: str, value: Any) -> None:
    flat = dict(_flatten(config))
    must = _must_be(key)
    if key not in flat and must is None:
        known = {**flat, **CONSTRAINTS}
        inside = [name for name in known if name.startswith(f"{key}.")]
        hint = f"it is the group of {', '.join(inside)}" if inside else _nearest(key, known)
        raise InputError(f"config key {key} is unknown; {hint}")
    if must:
        wanted, optional = must.type, must.optional
    else:  # a file's own key
        wanted, optional = type(flat[key]), flat[key] is None
    *groups, last = key.split(".")
    place: Any = config
    for group in groups:
        if not isinstance(place.get(group), ConfigDict):
            with place.unlocked(), place.ignore_type():
                place[group] = ConfigDict()
        place = place[group]
    # One of the key's own words, as remat's "none" is, is no None.
    own = must is not None and wanted is str and not optional and _allowed(value, must)
    with place.unlocked(), place.ignore_type():
        place[last] = value if own else _parse(key, value, wanted, optional)


def _parse(key: str, value: Any, wanted: type, optional: bool) -> Any:
    """The value in the type wanted; a text of it where that is meant."""
    if optional and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    if wanted is type(None) or (wanted is str and isinstance(value, str)):
        return value
    if isinstance(value, str):
        try:
            return _PARSERS[wanted](value)
        except (KeyError, ValueError):
            pass
    elif _is(value, wanted):
        return wanted(value)
    name = _NAMES.get(wanted, f"a {wanted.__name__}, which only the file can set")
    raise InputError(f"config key {key}: {value!r} is not {name}{' or none' if optional else ''}")


def _bool(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


_PARSERS: Mapping[type, Callable[[str], Any]] = {int: int, float: float, bool: _bool}
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _is(value: Any, wanted: type) -> bool:
    """Whether a value is of a type: a whole number is a number too, but true is neither."""
    if wanted in (int, float):
        kind = numbers.Integral if wanted is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    if wanted is tuple:  # JSON gives a list back
        return isinstance(value, list | tuple)
    return isinstance(value, wanted)


def _allowed(value: Any, must: Constraint) -> bool:
    if not _is(value, must.type) or (must.type is float and not math.isfinite(value)):
        return False
    return bool(must.holds(value))


def _must_be(key: str) -> Constraint | None:
    return _NOT_NEGATIVE if key.startswith(f"{ORGANS}.") else CONSTRAINTS.get(key)


def _flatten(config: ConfigDict, group: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _flatten(value, f"{group}{key}.")
        else:
            yield f"{group}{key}", value


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known keys are {', '.join(known)}"
