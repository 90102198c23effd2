"""The training loop: a configuration and a folder in, a trained model in the folder.

A run is its folder. Started again, it goes on from the newest whole checkpoint, and what it then
computes is what it would have computed: the data's position is the step, and so is every random
number's.
"""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from echovlm_jax.checkpoint import open_checkpoints
from echovlm_jax.config import PRESETS
from echovlm_jax.data import global_arrays, make_batches
from echovlm_jax.data.dataset import split_names
from echovlm_jax.data.review import ALLOWED, losses, review, table
from echovlm_jax.data.settings import Settings
from echovlm_jax.errors import InputError
from echovlm_jax.progress import progress
from echovlm_jax.storage import digests, files
from echovlm_jax.storage.layout import (
    CHECKPOINTS,
    CONFIG,
    MODEL,
    OWN_MODEL,
    TRAINABLE,
    run_files,
    steps,
)
from echovlm_jax.storage.verify import run_problems
from echovlm_jax.train.clock import Clock
from echovlm_jax.train.compile_cache import in_turn, use_compile_cache
from echovlm_jax.train.config_file import check_config, differences
from echovlm_jax.train.log import Log, was_evaluated
from echovlm_jax.train.program import Config, Program, fingerprint, init_state, make_program
from echovlm_jax.train.stages import training_table
from echovlm_jax.train.start import Start, frozen_start, starting_point
from echovlm_jax.train.step import TrainState
from echovlm_jax.train.watch import Watch, asked_to_stop

EVALUATING = ".evaluating"  # the step whose evaluation is being made up for
PROFILE, PLANS = "profile", "plans"
VALIDATION = "validation"
# What a run's model/ is made from. A run that has begun keeps that, unless one of these is changed.
_MADE_FROM = ("model", "tokenizer", "max_image_patches", "max_patches", "data", "split")


def train(
    config: Config,
    workdir: Path | str,
    *,
    change_config: bool = False,
    profile: tuple[int, int] | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Trains to `config.steps`, from the newest checkpoint of `workdir` where there is one.

    A run needs nothing outside its folder but the data once it has a checkpoint: the model's
    configuration, tokenizer and template are kept in the folder, and all weights in the checkpoint.

    On SIGTERM, or a notice of preemption, the step in hand is finished and saved. `eval_loss` is
    over the split `validation`, organs as often as they are there, however training mixes them. It
    comes after saving, and what fails in it is a line, `eval_error`: the run goes on.

    Args:
      config: as the files in configs/ return it.
      workdir: the run's folder; made if missing. It gets config.json, trainable.txt,
        metrics.jsonl, TensorBoard events and checkpoints/.
      change_config: go on although the configuration differs from the folder's, which it replaces.
      profile: (first, end): of these steps a profile for TensorBoard is written.
      watch: the watch over the job's processes, which the caller has entered; none by default.

    Returns:
      final_step, final_loss (of the last step logged; None where no step was left), workdir,
      stopped (whether before `config.steps`), skipped (steps without an update), and what
      `data.review.counted` says of the data: tasks, by_organ, images_shrunk, …

    Raises:
      InputError: a value of the configuration can't be; the folder is of another configuration;
        the data can't be read, or more samples than `allow_dropped` don't fit a row; or ten steps
        in a row had no finite loss and gradient.
    """
    clock = Clock()
    check_config(config)
    use_compile_cache()
    folder, watch = files.as_path(workdir), watch or Watch()
    if profile and files.in_bucket(folder):
        raise InputError(f"{folder}: a profile can't be written to a bucket; name a local folder")
    changed = _differences(config, folder, change_config)
    begun = bool(steps(folder / CHECKPOINTS))
    start = _frozen(folder, change_config) if begun else None
    if start is None or changed & set(_MADE_FROM):
        start = starting_point(config.model)
    split_names(config.data)  # it is there: said before weights are read
    program = make_program(config, model=start.config)
    # Before anything is written.
    settings = _data_settings(config, folder, own=start.files == folder / MODEL)
    seen = _review(settings, own=not config.get("data_cache"))
    checkpoints = open_checkpoints(
        folder / CHECKPOINTS,
        keep=config.checkpoint_keep,
        keep_every=config.get("checkpoint_keep_every"),
    )
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)  # nothing is written before this process has the folder
        stack.enter_context(jax.set_mesh(program.mesh))
        if begun != bool(steps(folder / CHECKPOINTS)):
            raise InputError(f"{folder}: another process has just saved there; run this again")
        trains = training_table(program.state, program.how, program.rules)
        _say(trains.rstrip())
        if start.files != folder / MODEL:
            stack.enter_context(_frozen_files(start, folder, config))
        settings = _data_settings(config, folder, own=True)
        if found := checkpoints.restore_latest(program.state):
            first, state, kept = found
        else:
            first, kept = 0, {}
            state = init_state(program, jax.random.key(config.seed), start.params(program))
        batches = make_batches(
            settings,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            start_step=first,
        )
        stack.callback(batches.close)  # type: ignore[attr-defined]
        stop = stack.enter_context(asked_to_stop())
        profiled = stack.enter_context(_profiler(folder, profile))
        log = stack.enter_context(Log(folder, config, program, first, kept, clock))
        tick = stack.enter_context(progress(config.steps - first, "step", "train"))
        evaluate = _evaluation(settings, program, watch.next)  # planned before compiling
        with clock.during("compile"):
            update = _compiled(program)
        # Only now is the folder this configuration's: one that could not begin may be mended.
        _write(folder / TRAINABLE, trains)
        _write(folder / CONFIG, _as_json(config))
        if jax.process_index() == 0:
            digests.write(folder, names=run_files(folder))
        _say(f"training from step {first} to {config.steps} in {folder}")
        step, saved = first, first
        if first and _due(config, first):
            with log.aside("evaluation"):
                log.evaluated(first, _catch_up(folder, first, functools.partial(evaluate, state)))
        while step < config.steps:
            with profiled(step):
                batch = clock.data_wait(functools.partial(watch.next, batches, step))
                state, metrics = update(state, global_arrays(batch, program.batch))
                metrics["retries"] = watch.retries()
                log.add(step, metrics)  # reads those of the step before: this one still runs
            step = watch.made(step + 1)
            tick(1)
            checkpoints.check()
            ending = step == config.steps or stop(step)
            if ending or step % config.checkpoint_every == 0:
                with log.aside("save"):
                    extra = {"config": json.loads(config.to_json()), **log.kept()}
                    checkpoints.save(step, state, extra, model=folder / MODEL, wait=ending)
                saved = step
            if _due(config, step):  # after saving: it may take the run down
                with log.aside("evaluation"):
                    log.evaluated(step, evaluate(state))
            if ending:
                break
    return {
        "final_step": step,
        "final_loss": log.last_loss,
        "workdir": str(folder),
        "stopped": step < config.steps,
        "skipped": log.skipped,
        "saved_step": saved,
        "goodput": clock.report(),
        **seen,
    }


def _differences(config: Config, folder: Path, change_config: bool) -> set[str]:
    """The keys that the folder's run has otherwise. Raises InputError where they may not differ."""
    path = folder / CONFIG
    if not path.exists():
        return set()
    try:
        kept = json.loads(path.read_text("utf-8"))
        changed = differences(kept, json.loads(config.to_json()))
    except (ValueError, TypeError, AttributeError) as error:
        if change_config:
            return set(_MADE_FROM)
        raise InputError(
            f"{path}: is damaged ({error}); with --change-config it is replaced"
        ) from None
    if changed and not change_config:
        raise InputError(
            f"{path}: this run was begun with another configuration ({'; '.join(changed)});"
            " name another folder, or go on with --change-config"
        )
    return {line.split(" ", 1)[0] for line in changed}


def _frozen(folder: Path, change_config: bool) -> Start | None:
    """What a run that has begun starts from: its own model/; None where it has none.

    Raises:
      InputError: that differs from its digests. `change_config` takes it as it is.
    """
    if not (folder / MODEL / CONFIG).is_file():
        return None
    problems, unchecked = run_problems(folder)
    problems.pop(CONFIG, None)  # compared with the configuration asked for
    if problems and not change_config:
        newest = folder / CHECKPOINTS / str(steps(folder / CHECKPOINTS)[-1]) / OWN_MODEL
        raise InputError(
            f"{folder}: is broken: {digests.told(problems)}; put back what changed ({newest} has a"
            " copy), or take it as it is with --change-config"
        )
    if unchecked:
        _say(f"{folder / MODEL}: from before runs had digests of it; unchecked")
    return frozen_start(folder / MODEL)


@contextlib.contextmanager
def _frozen_files(start: Start, folder: Path, config: Config) -> Iterator[None]:
    """Makes the run's model/. The one before comes back where the run could not begin."""
    before = folder / f".{MODEL}.was"
    if jax.process_index() == 0:
        files.remove(before)
        try:
            if (folder / MODEL).exists():
                files.copy_folder(folder / MODEL, before)
            with files.new_folder(folder / MODEL) as made:
                start.keep(made, config)
        except OSError as error:
            raise InputError(f"{folder / MODEL}: can't be written ({error})") from error
    multihost_utils.sync_global_devices("echovlm: the model's files are kept")
    try:
        yield
    finally:
        if jax.process_index() == 0:
            accepted = folder / CONFIG
            if not accepted.exists() or accepted.read_bytes() != _as_json(config).encode():
                files.remove(folder / MODEL)
                if before.exists():
                    files.copy_folder(before, folder / MODEL)
            files.remove(before)


def _as_json(config: Config) -> str:
    return config.to_json(indent=2) + "\n"


def _data_settings(config: Config, folder: Path, *, own: bool) -> Config:
    """The configuration with the run's cache of plans and, with `own`, with the run's copies in the
    place of folders outside it."""
    settings = config.copy_and_resolve_references()
    with settings.unlocked():
        if not settings.get("data_cache"):
            settings.data_cache = str(folder / PLANS)
        if own and config.model not in PRESETS:
            settings.model, settings.tokenizer = str(folder / MODEL), None
        elif own and config.get("tokenizer"):
            settings.tokenizer = str(folder / MODEL)
    return settings


def _review(config: Config, own: bool = False) -> dict[str, Any]:
    """Tells what the first epoch shows and what it leaves out, by task and organ; counts of it.

    With `own`, data_cache is this run's alone, also where it goes on with other rows.

    Raises InputError where the configuration doesn't allow as much to be left out.
    """
    settings, allowed = Settings.from_config(config), config.get("allow_dropped")
    plans = settings.cache or Path()
    before = set(files.below(plans)) if own else set()
    seen = review(settings, ALLOWED if allowed is None else allowed)
    _say(table(seen, settings))
    if before and set(files.below(plans)) - before:
        _say(
            "the rows are planned anew: the data, the configuration or this program is another than"
            " when this run began; what it goes on with is not what it would have come to"
        )
    return seen


def _write(path: Path, text: str) -> None:
    """A whole file or none; by one process of the job."""
    if jax.process_index():
        return
    try:
        files.make_folder(path.parent)
        files.write_text(path, text)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror or error})") from error


def _compiled(program: Program) -> jax.stages.Compiled:
    lowered = program.lower()
    how = f"attention {program.compute.attention}, moe_dispatch {program.compute.moe_dispatch}"
    _say(f"compiling for {program.mesh.size} devices, {how}: program {fingerprint(lowered)}")
    return in_turn(functools.partial(program.compile, lowered))


def _due(config: Config, step: int) -> bool:
    """Whether there is an evaluation after so many steps: wherever the run stops, the same ones."""
    return step % config.eval_every == 0 or step == config.steps


def _evaluation(
    config: Config, program: Program, take: Callable[[Any], Any] = next
) -> Callable[[TrainState], dict[str, Any]]:
    """A function of the state: `eval_loss` over the first batches of the split VALIDATION.

    It does not raise: what went wrong is its `eval_error`, and the run goes on. What is planned of
    the split is planned here, so that one which can't be used is known before anything compiles.
    """
    settings = config.copy_and_resolve_references()
    with settings.unlocked():
        settings.split = VALIDATION
        # Organs as they are there: which are shown more often is training's matter, and a small
        # split may lack one that has a weight.
        settings.mix_temperature = 1.0
        if "organ_weights" in settings:
            del settings.organ_weights
    compiled = None
    if VALIDATION not in split_names(config.data):
        _say(f"{config.data} has no split {VALIDATION}: nothing is evaluated on the way")
        return lambda state: {}
    with contextlib.suppress(InputError):  # what is wrong with the split is said when it is used
        seen = review(Settings.from_config(settings), 1.0)
        _say(f"the split {VALIDATION}: {losses(seen)}")

    def read() -> Any:
        return make_batches(
            settings, process_index=jax.process_index(), process_count=jax.process_count()
        )

    def evaluate(state: TrainState) -> dict[str, float]:
        nonlocal compiled
        losses = labels = 0.0
        with contextlib.closing(_together(read)) as batches:
            for _ in range(config.get("eval_batches") or 4):
                batch = global_arrays(_together(lambda: take(batches)), program.batch)
                if compiled is None:
                    compiled = in_turn(program.compile_eval)
                found = jax.device_get(compiled(state.trainable, state.frozen, batch))
                losses += float(found["ce_loss"] * found["labels"])
                labels += float(found["labels"])
        return {"eval_loss": losses / labels}

    def attempt(state: TrainState) -> dict[str, Any]:
        try:
            return evaluate(state)
        except Exception as error:  # the data, memory, a worker's death: the run is worth more
            return {"eval_error": _in_a_line(error)}

    try:
        _together(read).close()
    except Exception as error:
        reason = _in_a_line(error)
        _say(f"the split {VALIDATION} can't be evaluated, training goes on without: {reason}")
        return lambda state: {"eval_error": reason}
    return attempt


def _together(make: Callable[[], Any]) -> Any:
    """`make()`, which raises in all processes of the job where it does in one: nobody waits, in a
    collective, for one that gave up."""
    made, problem = None, None
    try:
        made = make()
    except Exception as error:
        problem = error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.asarray(problem is not None))
        if problem is None and np.any(failed):
            problem = InputError(f"process {int(np.argmax(failed))} of the job could not read on")
    if problem is not None:
        raise problem
    return made


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:1000]  # XLA lists all that it has allocated
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _catch_up(folder: Path, step: int, evaluate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the evaluation after `step` finds, where a kill cut it off; {} where none did.

    It is tried once more, and no more often: one that takes the process down must not do so at
    every start.
    """
    mark = folder / EVALUATING
    todo = jax.process_index() == 0 and not was_evaluated(folder, step)
    died = todo and mark.exists() and mark.read_text("utf-8") == str(step)
    if jax.process_count() > 1:  # as the first process sees it
        todo, died = multihost_utils.broadcast_one_to_all(np.array([todo, died])).tolist()
    if not todo:
        return {}
    _write(mark, str(step))
    found = {"eval_error": "the process died twice while evaluating"} if died else evaluate()
    if jax.process_index() == 0:
        mark.unlink(missing_ok=True)
    return found


@contextlib.contextmanager
def _profiler(folder: Path, steps: tuple[int, int] | None) -> Iterator[Any]:
    """Yields a function of the step, to be entered: those from steps[0] to before steps[1] are
    profiled, as far as this process makes them."""
    first, end = steps or (0, 0)
    on = False

    def at(step: int) -> jax.profiler.StepTraceAnnotation:
        nonlocal on
        if on != (first <= step < end):
            on = not on
            if on:
                jax.profiler.start_trace(str(folder / PROFILE))
            else:
                jax.profiler.stop_trace()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    try:
        yield at
    finally:
        if on:
            jax.profiler.stop_trace()


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)
