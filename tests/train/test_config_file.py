"""Configuration files: read, changed, checked."""

import re
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from echovlm_jax.errors import InputError
from echovlm_jax.train.config_file import CONSTRAINTS, check_config, load_config

CONFIG = Path(__file__).parents[2] / "configs" / "full_finetune.py"
FILE = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.count = 3
    config.rate = 0.5
    config.fast = False
    config.name = "a"
    config.open = None
    config.sizes = (1, 2)
    config.group = ConfigDict({"count": 4, "deeper": ConfigDict({"rate": 1.0})})
    config.twice = config.get_ref("count") * 2
    return config
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "f.py"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("count=-7", -7),
        ("rate=2", 2.0),
        ("rate=1e-5", 1e-5),
        ("fast=True", True),
        ("fast=false", False),
        ("name=3", "3"),
        ("name=a=b c", "a=b c"),
        ("name=", ""),
        ("name=none", "none"),  # as remat's
        ("open=none", None),
        ("open=text", "text"),
        ("group.count=5", 5),
        ("group.deeper.rate=3", 3.0),
    ],
)
def test_an_override_takes_the_type_of_the_value(file, word, value) -> None:
    key = word.partition("=")[0]
    config = load_config(file, [word])
    found: object = config
    for part in key.split("."):
        found = found[part]  # type: ignore[index]
    assert found == value and type(found) is type(value)
    # Nothing else changed, but for what the file derives from it.
    other = load_config(file)
    untouched = {"count", "rate", "fast", "name", "sizes", "group"} - {key.split(".")[0]}
    assert all(config[name] == other[name] for name in untouched)


def test_a_word_of_the_keys_own_may_be_none() -> None:
    """remat's "none" is a choice; of a key that may be missing, none is None."""
    config = load_config(CONFIG, ["remat=none", "tokenizer=none"])
    assert config.remat == "none" and config.get("tokenizer") is None
    check_config(config)


def test_overrides_are_together_and_reach_what_is_derived(file) -> None:
    config = load_config(file, ["count=5", "group.count=6", "count=8"])
    assert (config.count, config.twice, config.group.count) == (8, 16, 6)


def test_overrides_from_python_keep_their_types(file) -> None:
    config = load_config(str(file), {"count": np.int64(5), "rate": 2, "open": 3, "fast": True})
    assert (config.count, config.rate, config.open, config.fast) == (5, 2.0, 3, True)
    assert type(config.count) is int and type(config.rate) is float
    for key, value in {"count": 2.0, "fast": 1, "name": 3, "rate": True}.items():
        with pytest.raises(InputError, match=f"{key}: {value!r} is not"):
            load_config(file, {key: value})


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("count=3.0", "config key count: '3.0' is not a whole number"),
        ("count=", "config key count: '' is not a whole number"),
        ("count=none", "config key count: 'none' is not a whole number"),
        ("rate=fast", "config key rate: 'fast' is not a number"),
        ("fast=1", "config key fast: '1' is not true or false"),
        ("sizes=3", "config key sizes: '3' is not a tuple, which only the file can set"),
        ("group.cuont=5", "config key group.cuont is unknown; did you mean group.count?"),
        ("learning_rat=5", "config key learning_rat is unknown; did you mean learning_rate?"),
        ("group=5", "config key group is unknown; it is the group of group.count, group.deeper"),
        ("count.x=5", "config key count.x is unknown; did you mean"),
        ("zzz=1", "config key zzz is unknown; known keys are count, "),
        ("count", "--config.count must be --config.KEY=VALUE"),
        ("=5", "--config.=5 must be --config.KEY=VALUE"),
    ],
)
def test_bad_overrides_are_named(file, word, message) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        load_config(file, [word])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "No such file"),
        ("def f(:", "not Python: line 1: "),
        ("x = '\0'", "not Python: .*null byte"),
        ("x = 1", "has no function get_config()"),
        ("get_config = 3", "has no function get_config()"),
        ("import nowhere", "running it fails with ModuleNotFoundError: No module named 'nowhere'"),
        ("def get_config():\n    raise ValueError('two\\nlines')", "with ValueError: two lines"),
        ("def get_config(a): pass", "running it fails with TypeError"),
        ("def get_config(): return {'a': 1}", "must return an ml_collections.ConfigDict, not dict"),
        (
            "from ml_collections import FrozenConfigDict\n"
            "def get_config(): return FrozenConfigDict()",
            "must return an ml_collections.ConfigDict, not FrozenConfigDict",
        ),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, source, message) -> None:
    path = tmp_path / "bad.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(InputError) as caught:
        load_config(path)
    text = str(caught.value)
    assert re.match(f"config {re.escape(str(path))}: ", text) and "\n" not in text
    assert re.search(message.replace("()", r"\(\)"), text)


def test_a_changed_file_is_read_anew(tmp_path) -> None:
    path = tmp_path / "f.py"
    for value in (1, 2):  # of one length, within one second: what a bytecode cache would miss
        path.write_text(FILE.replace("count = 3", f"count = {value}"))
        assert load_config(path).count == value
    assert [entry.name for entry in tmp_path.iterdir()] == ["f.py"]


IMPOSSIBLE = {
    "steps": 0,
    "seed": -1,
    "seq_len": 2.5,
    "grad_accum": True,
    "max_patches": -4,
    "model": "",
    "stage": "aligment",
    "moe_dispatch": "sparse",
    "remat": "some",
    "dtype": "float16",
    "param_dtype": None,
    "optimization_level": "O9",
    "learning_rate": float("nan"),
    "clip_norm": 0.0,
    "warmup_fraction": 1.5,
    "adam_b2": 1.0,
    "weight_decay": -0.1,
    "lora.rank": 0,
    "lora.dropout": 1.0,
    "mesh.data": 0,
    "mesh.expert": -2,
    "capacity_factor": 0.0,
    "mix_temperature": float("inf"),
    "checkpoint_keep": [3],
}


def change(config: ConfigDict, key: str, value: object) -> ConfigDict:
    with config.unlocked(), config.ignore_type():
        *group, last = key.split(".")
        (config[group[0]] if group else config)[last] = value
    return config


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_impossible_values_are_named(key) -> None:
    value = IMPOSSIBLE[key]
    with pytest.raises(InputError) as caught:
        check_config(change(load_config(CONFIG), key, value))
    shown = re.escape(repr(value))
    assert re.match(f"config key {key} must be .+; found {shown}$", str(caught.value))


@pytest.mark.parametrize("key", [key for key, rule in CONSTRAINTS.items() if not rule.optional])
def test_every_key_has_to_be_there(key) -> None:
    config = load_config(CONFIG)
    *group, last = key.split(".")
    del (config[group[0]] if group else config)[last]
    with pytest.raises(InputError, match=f"lacks {key};"):
        check_config(config)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("learning_rte", "learning_rte is unknown; did you mean learning_rate?"),
        ("mesh.datum", "mesh.datum is unknown; did you mean mesh.data?"),
        ("zzz", "zzz is unknown; known keys are seed, "),
    ],
)
def test_a_key_that_nothing_reads_is_refused(key, message) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_config(change(load_config(CONFIG), key, 1))


def test_organs_are_mixed_in_one_way() -> None:
    check_config(load_config(CONFIG, ["mix_temperature=2"]))
    weights = ["organ_weights.liver=2", "organ_weights.vessel=0"]
    config = load_config(CONFIG, ["mix_temperature=none", *weights])
    check_config(config)
    assert config.organ_weights.to_dict() == {"liver": 2.0, "vessel": 0.0}
    for words, message in [
        (weights, "give one of them"),
        (["mix_temperature=none"], "give one of them"),
        (["mix_temperature=none", "organ_weights.liver=0"], "are all 0"),
        (["mix_temperature=none", "organ_weights.liver=-1"], "at least 0; found -1.0"),
    ]:
        with pytest.raises(InputError, match=message):
            check_config(load_config(CONFIG, words))


def test_optional_keys_may_be_set_or_left_out() -> None:
    words = ["moe_dispatch=einsum", "capacity_factor=1.5", "optimization_level=none"]
    config = load_config(CONFIG, words)
    check_config(config)
    assert (config.capacity_factor, config.optimization_level) == (1.5, None)
    config.moe_dispatch = "ragged"
    with pytest.raises(InputError, match="capacity_factor is of moe_dispatch einsum; ragged drops"):
        check_config(config)


def test_keys_of_the_data_may_be_set_or_left_out() -> None:
    words = [
        "task_weights.report=2",
        "tokenizer=/models/qwen",
        "data_workers=0",
        "data_cache=plans",
    ]
    config = load_config(CONFIG, words)
    check_config(config)
    assert config.task_weights.to_dict() == {"report": 2.0}
    assert (config.tokenizer, config.data_workers) == ("/models/qwen", 0)
    with pytest.raises(
        InputError, match=r"task_weights\.reports is unknown; did you mean .*report"
    ):
        load_config(CONFIG, ["task_weights.reports=1"])
    for word in ("task_weights.report=-1", "data_workers=-1"):
        with pytest.raises(InputError, match="at least 0"):
            check_config(load_config(CONFIG, [word]))
