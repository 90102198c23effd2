"""What a run tells while it goes: metrics.jsonl, TensorBoard, and a line on the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from echovlm_jax.chips import chip_of
from echovlm_jax.data.record import ORGANS
from echovlm_jax.errors import InputError
from echovlm_jax.flops import Flops, Work, model_flops
from echovlm_jax.storage.files import (
    Lines,
    copy_folder,
    in_bucket,
    make_folder,
    new_file,
    remove,
    write_text,
)
from echovlm_jax.storage.layout import METRICS_LOG, ROUTING
from echovlm_jax.train.clock import Clock
from echovlm_jax.train.heatmap import heatmap
from echovlm_jax.train.program import Config, Program
from echovlm_jax.train.telemetry import KINDS

ROUTING_PICTURE = "routing.png"
EVALUATED = ("eval_loss", "eval_error")  # what an evaluation's line has one of
COUNTS, CLOCK = "expert_counts", "clock"  # what a checkpoint holds of `counts` and `clock`
MOST_SKIPPED = 10  # steps in a row without a finite loss and gradient; then something is wrong


class Log:
    """A run's metrics; a context manager. Only the job's first process writes.

    The devices are a step ahead: `add` reads the metrics of the step before the one it is given,
    so that waiting for them never leaves a device without work.

    Attributes:
      last_loss: of the last step that was read; None before.
      skipped: steps whose update was left out.
      counts: float64 [L, O, M, E], `mixture_sums`' expert_counts since the last evaluation, without
        axes where nothing was counted; of a run that goes on, first its checkpoint's.

    Args:
      first: the step that the run goes on from.
      kept: what that checkpoint holds beside the state, such as `kept`; nothing at the start.
      clock: the run's.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        program: Program,
        first: int,
        kept: Mapping[str, Any],
        clock: Clock,
    ) -> None:
        self.last_loss: float | None = None
        self.skipped = 0
        self._config, self._program = config, program
        self._in_a_row = 0
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._flops = _step_flops(config, program)
        self._peak = _peak_flops(program)
        self._places = config.global_batch_size * np.array([config.seq_len, config.max_patches])
        self._steps, self._used = 0, np.zeros(2)  # of tokens and patches, since the last line
        self._since = time.perf_counter()
        self._folder = folder
        self.counts = np.asarray(kept.get(COUNTS, 0.0), np.float64)
        self.clock = clock
        if CLOCK in kept:
            whole = kept["config"]["steps"] == first
            clock.resume(kept[CLOCK], _last_time(folder / METRICS_LOG), whole=whole)
        self._file = self._board = None
        if jax.process_index() == 0:
            self._file = _reopen(folder / METRICS_LOG, first)
            _reopen(folder / ROUTING, first).close()
            self._routed = _last_step(folder / ROUTING)
            # Events for TensorBoard are appended to, which a bucket can't: they are sent whole.
            self._events = Path(tempfile.mkdtemp()) if in_bucket(folder) else folder
            self._board = SummaryWriter(str(self._events), purge_step=first + 1)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: Any) -> None:
        self.clock.stop()
        self._send()
        for writer in (self._file, self._board):
            if writer is not None:
                writer.close()
        if self._board is not None and self._events != self._folder:
            remove(self._events)

    def _send(self) -> None:
        """Copies the events into a bucket."""
        if self._board is not None and self._events != self._folder:
            self._board.flush()
            copy_folder(self._events, self._folder)

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a step just begun (from 0), and reads those of the one before.

        Raises:
          InputError: MOST_SKIPPED steps in a row had no finite loss and gradient.
        """
        self.clock.watch(metrics)
        before, self._pending = self._pending, (step, metrics)
        if before is not None:
            self._read(*before)

    def flush(self) -> None:
        """Reads the metrics that are still to come."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._read(*pending)

    @contextlib.contextmanager
    def aside(self, part: str) -> Iterator[None]:
        """What is done in here takes no part in the time of a step, but is `part` of the run's."""
        self.flush()
        began = time.perf_counter()
        with self.clock.during(part):
            if self._file is not None:
                self._file.sync()  # what a checkpoint comes after is not lost
            self._send()
            yield
        self._since += time.perf_counter() - began

    def kept(self) -> dict[str, Any]:
        """What a checkpoint holds, so that a run that goes on from it has the same log."""
        return {COUNTS: self.counts.tolist(), CLOCK: self.clock.kept()}

    def evaluated(self, step: int, values: Mapping[str, Any]) -> None:
        """What an evaluation after `step` updates found, and the routing since the last one."""
        if values:
            self.write(step, values)
        if "eval_error" in values:
            self._tell(f"step {step} · NOT EVALUATED: {values['eval_error']}")
        counts, self.counts = self.counts, np.zeros(())
        if self._board is None or counts.ndim == 0 or step == self._routed:
            return  # the last: a kill came after this line
        shares = _shares(counts)
        organs = (*ORGANS, "others")
        line = {
            organ: {kind: _plain(shares[:, o, m]) for m, kind in enumerate(KINDS)}
            for o, organ in enumerate(organs)
            if counts[:, o].any()
        }
        with Lines(self._folder / ROUTING) as file:
            file.write(json.dumps({"step": step, "expert_load": line}) + "\n")
        both = counts.sum(axis=2)
        seen = both.sum(axis=-1, keepdims=True) > 0
        picture = heatmap(np.where(seen, _shares(both), np.nan), organs)
        with new_file(self._folder / ROUTING_PICTURE) as file:
            picture.save(file, "PNG")
        self._board.add_image("expert_load", np.asarray(picture), step, dataformats="HWC")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl after `step` updates, at `time` (seconds since 1970); numbers go
        to TensorBoard too, those inside a record with its name before theirs."""
        if self._file is None or self._board is None:
            return
        plain = {name: _plain(value) for name, value in values.items()}
        line = {"step": step, "time": round(time.time(), 3), **plain}
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise InputError(
                f"{self._file.path}: can't be written ({error.strerror}); mend that and start"
                " again: the run goes on from its last checkpoint"
            ) from error
        for name, value in plain.items():
            inside = value.items() if isinstance(value, dict) else [("", value)]
            for key, number in inside:
                if isinstance(number, float):
                    self._board.add_scalar(f"{name}/{key}".rstrip("/"), number, step)

    def _read(self, step: int, metrics: Mapping[str, Any]) -> None:
        found = jax.device_get(metrics)
        self.last_loss = float(found["loss"])
        self._steps += 1
        found = self._mixture(found)
        self._used += float(found["tokens"]), float(found["patches"])
        skipped = bool(found["skipped"])
        self.skipped += skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if skipped or (step + 1) % self._config.log_every == 0 or step + 1 == self._config.steps:
            rate = float(np.asarray(self._program.schedule(found.pop("updates"))))
            line = {**found, "lr": rate, "batch": step, **self._pace()}
            line["goodput"] = self.clock.goodput()
            self.write(step + 1, line)
            self._show(step + 1, line)
        if self._in_a_row == MOST_SKIPPED:
            first = step + 1 - MOST_SKIPPED
            raise InputError(
                f"{MOST_SKIPPED} steps in a row, the last on batch {step}, had a loss or gradient"
                f" that is no finite number; parameters are as after step {first}. Lower"
                f" learning_rate, or look at the batches: make_batches(config, start_step={first})"
            )

    def _mixture(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """The sums of `telemetry.mixture_sums` as means, and shares, a number or list a layer."""
        found = dict(found)
        if "expert_counts" not in found:
            return found
        counts, tokens = found.pop("expert_counts"), max(float(found["tokens"]), 1.0)
        self.counts = self.counts + counts
        choices = max(float(counts.sum()), 1.0)
        entropy, weight = (found.pop(name) / tokens for name in ("router_entropy", "coefficient"))
        return {
            **found,
            "dropped": float(found["dropped"]) / choices,
            "router_load": _shares(counts.sum(axis=(1, 2))),
            "router_entropy": float(entropy.mean()),
            "router_entropy_by_layer": entropy,
            "coefficient": float(weight.mean()),
            "coefficient_by_layer": weight,
        }

    def _pace(self) -> dict[str, float]:
        """Since the last line: seconds a step, tokens and model FLOPs a second; and their shares of
        the devices' peak, with padding (`mfu`) and without (`useful_mfu`)."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        pace = {
            "step_seconds": seconds / self._steps,
            "tokens_per_second": self._used[0] / seconds,
            "model_flops_per_second": self._flops.total * self._steps / seconds,
        }
        if self._peak:
            pace["mfu"] = pace["model_flops_per_second"] / self._peak
            share = self._used / np.maximum(self._places * self._steps, 1)
            useful = self._flops.used(*share.tolist()) * self._steps / seconds
            pace["useful_mfu"] = useful / self._peak
        self._since, self._steps, self._used = now, 0, np.zeros(2)
        return pace

    def _show(self, step: int, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        words = [f"step {step}", f"loss {float(line['loss']):.4f}"]
        words += [f"gradient {float(line['grad_norm']):.3f}", f"rate {line['lr']:.2e}"]
        words += [f"{line['tokens_per_second']:.0f} tokens/s"]
        if "mfu" in line:
            words += [f"MFU {line['mfu']:.1%}, useful {line['useful_mfu']:.1%}"]
        if line["skipped"]:
            words.append(f"NOT FINITE: batch {line['batch']} changed nothing")
        self._tell(" · ".join(words))

    def _tell(self, text: str) -> None:
        if self._file is None:
            return
        if sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)


def _shares(counts: np.ndarray) -> np.ndarray:
    """Counts over the last axis as shares of their sum; 0 where that is 0."""
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1.0)


def _reopen(path: Path, first: int) -> Any:
    """metrics.jsonl, open for more, without what is after step `first`: it will come again."""
    kept = []
    if path.exists():
        for line in path.read_text("utf-8").splitlines(keepends=True):
            try:
                whole = line.endswith("\n") and json.loads(line)["step"] <= first
            except (ValueError, KeyError, TypeError):
                whole = False  # the end of a line that a crash cut off
            if whole:
                kept.append(line)
    try:
        make_folder(path.parent)
        write_text(path, "".join(kept))
        return Lines(path)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror})") from error


def _last_step(path: Path) -> int | None:
    """The step of a log's last line."""
    lines = path.read_text("utf-8").splitlines()
    return json.loads(lines[-1])["step"] if lines else None


def _last_time(path: Path) -> float:
    """When a log's last line was written, in seconds since 1970; 0 where none tells."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a crash cut off
            return float(json.loads(line)["time"])
    return 0.0


def was_evaluated(folder: Path, step: int) -> bool:
    """Whether a run's metrics tell of an evaluation after `step` updates, made or failed."""
    path = folder / METRICS_LOG
    found = path.read_text("utf-8").splitlines() if path.exists() else []
    return any(
        line["step"] == step and not line.keys().isdisjoint(EVALUATED)
        for line in map(json.loads, found)
    )


def _plain(value: Any) -> Any:
    """A number or nested list for JSON, which has no word for what is not finite: None."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = np.asarray(value).tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _step_flops(config: Config, program: Program) -> Flops:
    """Model FLOPs of one step, as `plan` counts them."""
    work = Work(
        rows=config.global_batch_size,
        seq_len=config.seq_len,
        max_patches=config.max_patches,
        frame_patches=min(config.max_image_patches, config.max_patches) or None,
        trains=program.how,
        lora_rank=config.lora.rank,
    )
    return model_flops(program.model, work)


def _peak_flops(program: Program) -> float | None:
    """Of all devices together; None where the chip is unknown."""
    devices = program.mesh.devices.ravel()
    chip = chip_of(devices[0].device_kind)
    return None if chip is None else chip.flops / chip.devices * len(devices)
