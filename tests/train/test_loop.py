"""The loop: a run is its folder, whatever happens to the process."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from echovlm_jax import demo
from echovlm_jax.config import preset
from echovlm_jax.convert.folder import open_model, read_config
from echovlm_jax.convert.table import leaf_shapes
from echovlm_jax.convert.to_torch import export
from echovlm_jax.errors import InputError
from echovlm_jax.load import load_model
from echovlm_jax.model import EchoVLM
from echovlm_jax.plan import programs as plan_programs
from echovlm_jax.storage import digests
from echovlm_jax.storage.layout import run_files
from echovlm_jax.storage.lock import Lock
from echovlm_jax.storage.verify import verify
from echovlm_jax.train import loop
from echovlm_jax.train.clock import PARTS
from echovlm_jax.train.config_file import check_config, load_config
from echovlm_jax.train.loop import train
from echovlm_jax.train.lora import scaled
from echovlm_jax.train.optimizer import learning_rate
from echovlm_jax.train.program import fingerprint
from echovlm_jax.train.stages import merge
from tests.distributed.train_steps import random_batch

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "instruction.py"  # has all three: full, low-rank and frozen
MODEL = preset("tiny").replace(
    text={"num_layers": 2, "vocab_size": len(demo.SPECIAL) + 256},
    vision={"depth": 1},
)
SMALL = {
    "data": "phantom",
    "data_workers": 0,
    "steps": 6,
    "global_batch_size": 2,
    "seq_len": 512,
    "max_patches": 512,
    "max_image_patches": 64,
    "allow_dropped": 1.0,  # in bytes, many of the phantom's texts are longer than these rows
    "learning_rate": 1e-3,
    "dtype": "float32",
    "moe_dispatch": "dense",
    "log_every": 1,
    "eval_every": 4,
    "eval_batches": 1,
    "checkpoint_every": 2,
    "mesh.fsdp": 1,
    "mesh.data": 1,
}
TIMES = {"step_seconds", "tokens_per_second", "model_flops_per_second", "time", "goodput"}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return demo.make_checkpoint(tmp_path_factory.mktemp("model") / "torch", MODEL)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """All runs compile the same few programs."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("xla")), 0.0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


def config(model_folder, **changes):
    # What all runs of the tests see is planned once.
    own = {"model": str(model_folder), "data_cache": str(Path(model_folder).parent / "plans")}
    return load_config(CONFIG, {**SMALL, **own, **changes})


def lines(folder):
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def stored(folder, step):
    """A checkpoint's state, as Orbax alone reads it."""
    return ocp.PyTreeCheckpointer().restore(folder / "checkpoints" / str(step) / "state")


def state(folder, step):
    """Every array of a checkpoint, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(stored(folder, step))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(ours, expected, step=SMALL["steps"]):
    assert lines(ours) == lines(expected)
    routing = [(folder / "routing.jsonl").read_text() for folder in (ours, expected)]
    assert routing[0] == routing[1]
    a, b = state(ours, step), state(expected, step)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="session")
def undisturbed(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: devices)
        result = train(config(model_folder), folder)
    assert result["final_step"] == SMALL["steps"] and not result["stopped"]
    return folder


def test_a_run_tells_what_it_did(undisturbed):
    told, log = lines(undisturbed), (undisturbed / "metrics.jsonl").read_text()
    steps = [line["step"] for line in told if "loss" in line]
    assert steps == list(range(1, SMALL["steps"] + 1))
    for line in told:
        if "loss" in line:
            assert np.isfinite(line["loss"]) and line["skipped"] == 0 and line["tokens"] > 500
            load = np.array(line["router_load"])
            assert load.shape == (2, 4) and np.allclose(load.sum(-1), 1)
            assert 0 < line["router_entropy"] <= np.log(4) and 0 < line["coefficient"] < 1
    evaluated = [line["step"] for line in told if "eval_loss" in line]
    assert evaluated == [4, 6]
    assert "values train" in (undisturbed / "trainable.txt").read_text()
    assert (undisturbed / "routing.png").stat().st_size > 500
    routing = [json.loads(x) for x in (undisturbed / "routing.jsonl").read_text().splitlines()]
    assert [line["step"] for line in routing] == [4, 6]
    parts = [line["goodput"] for line in map(json.loads, log.splitlines()) if "loss" in line]
    walls = [one["wall"] for one in parts]
    assert walls == sorted(walls) and all(0 < one["goodput"] < 1 for one in parts)
    assert all(sum(one[part] for part in PARTS) == pytest.approx(one["wall"]) for one in parts)
    (events,) = undisturbed.glob("events.out.tfevents.*")
    assert b"goodput/data_wait" in events.read_bytes()
    kept = sorted(int(p.name) for p in (undisturbed / "checkpoints").iterdir())
    assert kept == [2, 4, 6]


def test_a_run_is_a_model(undisturbed, tmp_path):
    """Its updates added to its weights: the logits that it trained with; out and back alike."""
    model = load_model(undisturbed)
    tree = stored(undisturbed, SMALL["steps"])
    batch = random_batch(3, MODEL, 2, 48, 32)
    batch["patches"] = batch["patches"].astype(np.float32)
    variables = {
        "params": merge(tree["trainable"]["params"], tree["frozen"]),
        "lora": scaled(tree["trainable"]["lora"], 16 / 8),
    }
    trained = EchoVLM(MODEL, np.float32).apply(variables, batch, method="forward")
    plain = EchoVLM(MODEL, np.float32).apply(
        {"params": variables["params"]}, batch, method="forward"
    )
    ours = model.forward(batch)
    assert np.abs(ours - trained).max() < 1e-5 * np.abs(trained).max()
    assert np.abs(plain - trained).max() > 1e-4 * np.abs(trained).max()  # the updates do something

    picture = np.random.default_rng(0).integers(0, 255, (56, 84, 3), np.uint8)
    answer = model.generate([picture], "?", max_new_tokens=3)
    assert answer["new_tokens"] == 3
    export(undisturbed, tmp_path / "torch")
    again = load_model(tmp_path / "torch")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    large = np.zeros((768, 1024, 3), np.uint8)
    for asked in (model, again):  # of 64 patches at most, as in training
        assert asked.prepare([large], "?", max_new_tokens=1)["image_grid_thw"].tolist() == [
            [1, 6, 8]
        ]
    with pytest.raises(InputError, match=r"checkpoints/2/.*|is broken"):
        damaged = tmp_path / "run"
        shutil.copytree(undisturbed, damaged)
        for path in (damaged / "checkpoints" / "6").rglob("*"):
            if path.is_file() and path.stat().st_size > 10_000:
                content = bytearray(path.read_bytes())
                content[5000] ^= 1
                path.write_bytes(content)
        load_model(damaged)
    assert load_model(damaged / "checkpoints" / "4").config == MODEL


def edit(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def test_whatever_decides_a_runs_function_is_checked(undisturbed, tmp_path):
    """A run's own files are named; a checkpoint is read with what lies in it."""
    assert verify(undisturbed)["ok"] and "unchecked" not in verify(undisturbed)
    run, name = tmp_path / "run", "text/layers/mlp/gate/kernel"
    shutil.copytree(undisturbed, run)
    index = tuple(slice(0, size) for size in leaf_shapes(MODEL)[name])
    before = open_model(run).read(name, index)
    for file, was, now in (
        ("model/config.json", '"rope_theta": 1000000.0', '"rope_theta": 9000000.0'),
        ("model/tokenizer.json", '"model"', '"model" '),
        ("config.json", '"alpha": 16', '"alpha": 61'),
    ):
        edit(run / file, was, now)
        assert verify(run)["corrupt"] == [file]
        with pytest.raises(InputError, match=f"run: is broken: {file} differs; put back what"):
            load_model(run)
        np.testing.assert_array_equal(
            open_model(run / "checkpoints" / "6").read(name, index), before
        )
        edit(run / file, now, was)
    (run / "model" / "chat_template.jinja").write_text("another")
    assert verify(run)["corrupt"] == ["model/chat_template.jinja"]
    (run / "model" / "chat_template.jinja").unlink()
    (run / digests.SUMS).unlink()
    assert verify(run)["corrupt"] == [digests.SUMS]
    edit(run / "config.json", '"alpha": 16', '"alpha": 61')  # as --change-config does
    digests.write(run, names=run_files(run))
    np.testing.assert_array_equal(open_model(run).read(name, index), before)


def test_a_run_from_before_there_were_digests(undisturbed, tmp_path, capsys):
    """Its model's files lie in RUN/model alone; it says that they are unchecked."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (run / digests.SUMS).unlink()
    for step in (2, 4, 6):
        shutil.rmtree(run / "checkpoints" / str(step) / "extra" / "model")
        digests.write(run / "checkpoints" / str(step))
    told = verify(run)
    assert told["ok"] and {"config.json", "model/config.json"} < set(told["unchecked"])
    assert load_model(run).config == MODEL
    assert "model/config.json" in capsys.readouterr().err


def test_a_begun_run_needs_nothing_of_its_base(undisturbed, model_folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "checkpoints" / "6")
    monkeypatch.setattr(loop, "starting_point", None)
    train(config(model_folder), run)
    assert_same_run(run, undisturbed)
    kept = (run / "model" / "config.json").read_bytes()
    assert train(config(model_folder), run)["final_step"] == SMALL["steps"]
    assert (run / "model" / "config.json").read_bytes() == kept
    edit(run / "model" / "config.json", '"rope_theta": 1000000.0', '"rope_theta": 9000000.0')
    with pytest.raises(
        InputError, match=r"model/config.json differs; .*checkpoints/6/extra/model has"
    ):
        train(config(model_folder), run)


def test_a_refused_second_run_leaves_everything(undisturbed, model_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with Lock(run / "checkpoints"), pytest.raises(InputError, match="another process is writing"):
        train(config(model_folder, stage="alignment"), run, change_config=True)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_change_that_can_not_begin_leaves_everything(undisturbed, model_folder, tmp_path):
    """Not its table, nor its model: the checkpoints were made with those before."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    other = config(model_folder, stage="alignment", max_image_patches=32)  # of another state
    with pytest.raises(InputError, match="go on with the configuration"):
        train(other, run, change_config=True)
    left = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {path: content for path, content in left.items() if path in kept} == kept
    assert {path.parent.name for path in left.keys() - kept.keys()} <= {"plans"}
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_evaluation_takes_organs_as_they_are(monkeypatch):
    seen = []

    def stop(settings, **_):
        seen.append(settings)
        raise InterruptedError

    monkeypatch.setattr(loop, "make_batches", stop)
    rare = {"mix_temperature": None, "organ_weights.vessel": 1.0, "organ_weights.liver": 0.0}
    config = load_config(CONFIG, {**SMALL, **rare})
    assert "InterruptedError" in loop._evaluation(config, None)(None)["eval_error"]
    [settings] = seen  # planned once, and not again
    assert (settings.split, settings.mix_temperature) == ("validation", 1.0)
    check_config(settings)  # one of the two ways to mix, not both
    assert config.organ_weights.vessel == 1.0  # training's are as they were


@pytest.mark.slow
def test_stage_two_starts_from_stage_one(undisturbed, tmp_path):
    short = {"steps": 1, "eval_every": 9, "stage": "alignment", "moe_dispatch": "dense"}
    train(config(undisturbed, **short, learning_rate=1e-9), tmp_path)
    before, after = load_model(undisturbed), load_model(tmp_path)
    for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


def test_what_is_frozen_keeps_its_bytes_and_all_else_moves(undisturbed, model_folder):
    first, last = state(undisturbed, 2), state(undisturbed, 6)
    frozen = [name for name in first if "frozen" in name]
    assert frozen
    for name in frozen:
        np.testing.assert_array_equal(first[name], last[name], err_msg=name)
    for name in first:
        if "trainable" in name:
            assert not np.array_equal(first[name], last[name]), name


def test_a_run_that_fails_goes_on_where_it_was(undisturbed, model_folder, tmp_path, monkeypatch):
    whole = loop.make_batches

    def failing(*args, **options):
        for i, batch in enumerate(whole(*args, **options)):
            if i == 5:
                raise RuntimeError("the machine went away")
            yield batch

    monkeypatch.setattr(loop, "make_batches", failing)
    settings, began = config(model_folder), time.perf_counter()
    with pytest.raises(RuntimeError, match="went away"):
        train(settings, tmp_path)
    time.sleep(1)
    monkeypatch.undo()
    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    assert lines(tmp_path)[-1]["step"] > 2
    result = train(settings, tmp_path)
    wall = time.perf_counter() - began
    assert result["final_step"] == 6
    assert_same_run(tmp_path, undisturbed)
    parts = {part: result["goodput"][part] for part in PARTS}
    assert sum(parts.values()) == pytest.approx(result["goodput"]["wall"])
    assert result["goodput"]["wall"] == pytest.approx(wall, rel=0.01)
    assert parts["between"] > 1 and parts["lost"] > 0 and min(parts.values()) >= 0
    again = train(config(model_folder), tmp_path)
    assert again["final_step"] == 6 and again["final_loss"] is None
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_sigterm_finishes_the_step_and_saves(undisturbed, model_folder, tmp_path, monkeypatch):
    whole = loop.make_batches

    def preempted(*args, **options):
        for i, batch in enumerate(whole(*args, **options)):
            if i == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(loop, "make_batches", preempted)
    result = train(config(model_folder), tmp_path)
    assert result["stopped"] and result["final_step"] == result["saved_step"] == 3
    monkeypatch.setattr(loop, "make_batches", whole)
    assert train(config(model_folder), tmp_path)["final_step"] == 6
    assert_same_run(tmp_path, undisturbed)


def test_what_is_not_finite_changes_nothing(model_folder, tmp_path, monkeypatch):
    whole = loop.make_batches

    def damaged(*args, **options):
        for i, batch in enumerate(whole(*args, **options)):
            if i == 3:
                batch["patches"] = batch["patches"] * np.nan
            yield batch

    monkeypatch.setattr(loop, "make_batches", damaged)
    short = {"steps": 5, "checkpoint_every": 1, "checkpoint_keep": 9, "eval_every": 100}
    result = train(config(model_folder, **short), tmp_path)
    assert result["skipped"] == 1
    bad, after = lines(tmp_path)[3:5]
    assert bad["skipped"] == 1 and bad["batch"] == 3 and bad["loss"] is None
    # The optimizer made three updates before either: its schedule stood still.
    rate = float(learning_rate(1e-3, 5, config(model_folder).warmup_fraction)(3))
    assert after["lr"] == bad["lr"] == pytest.approx(rate) and after["skipped"] == 0
    before, after = state(tmp_path, 3), state(tmp_path, 4)
    for name in before:
        if name not in ("['step']",):
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)


def only_validation(whole, failing):
    """`make_batches`, where `failing` runs before the split validation gives a batch."""

    def read(batches):
        with contextlib.closing(batches):
            for batch in batches:
                failing()
                yield batch

    def make(settings, **options):
        batches = whole(settings, **options)
        return batches if settings.get("split") != "validation" else read(batches)

    return make


def test_an_evaluation_that_fails_is_a_line(
    undisturbed, model_folder, tmp_path, monkeypatch, capsys
):
    def fail():
        raise RuntimeError("no memory\nleft")

    monkeypatch.setattr(loop, "make_batches", only_validation(loop.make_batches, fail))
    result = train(config(model_folder), tmp_path)
    assert result["final_step"] == result["saved_step"] == SMALL["steps"]
    told = lines(tmp_path)
    error = "RuntimeError: no memory left"
    assert [line for line in told if "eval_error" in line] == [
        {"step": 4, "eval_error": error},
        {"step": 6, "eval_error": error},
    ]
    wanted = [line for line in lines(undisturbed) if "loss" in line]
    assert [line for line in told if "loss" in line] == wanted
    assert f"step 4 · NOT EVALUATED: {error}\n" in capsys.readouterr().err


def test_a_split_that_can_not_be_evaluated_is_told_before_compiling(monkeypatch, capsys):
    def none(settings, **_):
        raise InputError("none of its samples can be used")

    monkeypatch.setattr(loop, "make_batches", none)
    evaluate = loop._evaluation(load_config(CONFIG, SMALL), None)  # no program: nothing compiles
    assert capsys.readouterr().err.count("can't be evaluated") == 1
    assert evaluate(None) == {"eval_error": "none of its samples can be used"}


@pytest.mark.slow
def test_a_kill_while_evaluating_costs_no_step(undisturbed, model_folder, tmp_path, monkeypatch):
    def kill():
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "make_batches", only_validation(loop.make_batches, kill))
    with pytest.raises(KeyboardInterrupt):
        train(config(model_folder), tmp_path)
    assert (tmp_path / "checkpoints" / "4").is_dir()
    monkeypatch.undo()
    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    train(config(model_folder), tmp_path)
    assert_same_run(tmp_path, undisturbed)  # the evaluation was made up for


def test_an_evaluation_that_kills_is_tried_twice(tmp_path):
    def kill():
        raise SystemExit

    with pytest.raises(SystemExit):
        loop._catch_up(tmp_path, 4, kill)
    assert "died twice" in loop._catch_up(tmp_path, 4, kill)["eval_error"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "eval_error": "x"}\n')
    assert loop._catch_up(tmp_path, 4, kill) == {}


@pytest.mark.slow
def test_many_in_a_row_end_the_run(model_folder, tmp_path, monkeypatch):
    whole = loop.make_batches

    def damaged(*args, **options):
        for batch in whole(*args, **options):
            batch["patches"] = batch["patches"] * np.inf
            yield batch

    monkeypatch.setattr(loop, "make_batches", damaged)
    with pytest.raises(InputError, match=r"10 steps in a row, the last on batch 9, .*start_step=0"):
        train(config(model_folder, steps=30, eval_every=100, checkpoint_every=100), tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data", "nowhere", "nowhere: is no dataset"),
        ("split", "nope", "has no split 'nope'"),
        ("model", "nowhere", "config key model: 'nowhere'"),
        ("tokenizer", "/nowhere", "/nowhere"),
        ("seq_len", 8, "none of its .* samples can be used"),
        ("mesh.fsdp", 3, "mesh"),
    ],
)
def test_what_can_not_begin_may_be_mended(model_folder, tmp_path, key, value, message):
    """A folder takes another configuration until one has begun there."""
    with pytest.raises(InputError, match=message):
        train(config(model_folder, **{key: value}), tmp_path / "run")
    for kept in ("config.json", "model"):
        assert not (tmp_path / "run" / kept).exists()


def test_a_run_that_would_lose_much_is_refused_and_leaves_nothing(model_folder, tmp_path):
    """The mend that it names is the one that helps."""
    loop._review(config(model_folder))  # planned once, for all that follows
    cramped = config(model_folder, allow_dropped=0.05)
    with pytest.raises(InputError) as refused:
        train(cramped, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    said = str(refused.value)
    assert "samples would be left out, " in said and "\n" not in said
    assert int(re.search(r"--config\.seq_len=(\d+)", said)[1]) > SMALL["seq_len"]
    assert "max_patches" not in said  # of which there is room
    share = float(re.search(r"--config\.allow_dropped=([\d.]+)", said)[1])
    seen = loop._review(config(model_folder, allow_dropped=share))
    assert seen["drawn"] == sum(task["drawn"] for task in seen["tasks"].values())
    with pytest.raises(InputError, match="would be left out"):
        loop._review(config(model_folder, allow_dropped=share - 0.02))


def test_a_run_says_what_it_loses(model_folder, capfd):
    seen = loop._review(config(model_folder))
    text = capfd.readouterr().err
    for name, task in seen["tasks"].items():
        assert task["drawn"] == task["trained"] + task["dropped"]
        assert f"{name:<16}{task['drawn']:>10,}{task['trained']:>10,}" in text
    assert sum(seen["dropped"].values()) == sum(t["dropped"] for t in seen["tasks"].values()) > 0


@pytest.mark.slow
def test_the_program_is_the_one_that_plan_compiles(undisturbed, model_folder, tmp_path, capfd):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    own = config(model_folder)
    train(own, tmp_path)
    planned = plan_programs.training(own, jax.devices(), read_config(model_folder))
    name = fingerprint(planned.lower())
    how = "attention xla_halves, moe_dispatch dense"
    assert f"compiling for 1 devices, {how}: program {name}\n" in capfd.readouterr().err
    other = config(model_folder, remat="none")
    planned = plan_programs.training(other, jax.devices(), read_config(model_folder))
    assert fingerprint(planned.lower()) != name


def test_a_run_that_goes_on_with_other_rows_says_so(tmp_path, monkeypatch, capfd):
    def reviewed(name):
        def review(settings, allowed):
            (settings.cache / name).write_text("")
            return {}

        monkeypatch.setattr(loop, "review", review)
        monkeypatch.setattr(loop, "table", lambda *_: "")
        loop._review(load_config(CONFIG, {"data_cache": str(tmp_path)}), own=True)
        return "planned anew" in capfd.readouterr().err

    assert [reviewed("one"), reviewed("one"), reviewed("two")] == [False, False, True]


def test_another_configuration_is_refused_unless_told(undisturbed, model_folder, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    other = config(model_folder, log_every=2, checkpoint_keep=9)
    with pytest.raises(InputError, match=r"checkpoint_keep 3 → 9; log_every 1 → 2.*--change-conf"):
        train(other, tmp_path)
    assert train(other, tmp_path, change_config=True)["final_step"] == SMALL["steps"]


PROGRAM = """
import sys
from echovlm_jax.train.config_file import load_config
from echovlm_jax.train.lora import scaled
from echovlm_jax.train.loop import train
from echovlm_jax.train.stages import merge
from tests.distributed.train_steps import random_batch
import json
train(load_config(sys.argv[1], json.loads(sys.argv[3])), sys.argv[2])
"""


@pytest.mark.slow  # one kill, of a run in a bucket, is in tests/test_buckets.py
@pytest.mark.parametrize("kills", [1, 30])
def test_kills_at_any_moment_change_nothing(kills, model_folder, tmp_path):
    """Once undisturbed and once killed again and again, during saves too, in processes alike."""
    steps = 6 if kills == 1 else 60
    changes = {**SMALL, "model": str(model_folder), "steps": steps, "checkpoint_every": 1}
    changes["data_cache"] = str(tmp_path / "plans")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    errors = open(tmp_path / "errors.txt", "w+")  # noqa: SIM115

    def start(name):
        command = [sys.executable, "-c", PROGRAM, str(CONFIG), str(tmp_path / name)]
        return subprocess.Popen([*command, json.dumps(changes)], env=environment, stderr=errors)

    def finish(name):
        code = start(name).wait()
        errors.seek(0)
        assert code == 0, errors.read()[-2000:]

    def written():
        path = tmp_path / "killed" / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    finish("undisturbed")
    rng, died = random.Random(5), 0
    for _ in range(kills):
        process = start("killed")
        # Somewhere in the next step or two, or in the saves and evaluations between them.
        enough = written() + rng.randint(1, 2)
        while process.poll() is None and written() < enough:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        died += process.wait() == -signal.SIGKILL
    assert died == kills
    finish("killed")
    assert_same_run(tmp_path / "killed", tmp_path / "undisturbed", steps)


def test_another_tokenizer_takes_the_place_of_the_models(model_folder, tmp_path):
    """Nothing of the model's own is left to be read instead, and nothing else is replaced."""
    other, kept = tmp_path / "other", tmp_path / "kept"
    other.mkdir()
    (other / "vocab.json").write_text(json.dumps({"a": 0}))
    (other / "merges.txt").write_text("#version: 0.2\n")
    (other / "preprocessor_config.json").write_text("{}")
    start = loop.starting_point(str(model_folder))
    start.keep(kept, config(model_folder, tokenizer=str(other)))
    names = {path.name for path in kept.iterdir()}
    assert {"vocab.json", "merges.txt", "config.json"} <= names and "tokenizer.json" not in names
    assert (kept / "config.json").read_bytes() == (model_folder / "config.json").read_bytes()
    for path in (other / "vocab.json", other / "merges.txt"):
        assert (kept / path.name).read_bytes() == path.read_bytes()
