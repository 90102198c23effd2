"""Training as one job of several processes: the same run, and one that goes on with other ones."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from echovlm_jax import demo, digests
from echovlm_jax.config import preset
from echovlm_jax.convert.store import Reader

ROOT = Path(__file__).parents[2]
MODEL = preset("tiny").replace(
    text={"num_layers": 1, "vocab_size": len(demo.SPECIAL) + 256}, vision={"depth": 1}
)
STEPS, RATE = 4, 1e-3
KEYS = {
    "data": "phantom",
    "data_workers": 0,
    "steps": STEPS,
    "global_batch_size": 4,
    "seq_len": 512,
    "max_patches": 512,
    "max_image_patches": 64,
    "learning_rate": RATE,
    "dtype": "float32",
    "moe_dispatch": "dense",
    "log_every": 1,
    "eval_every": 2,
    "eval_batches": 1,
    "checkpoint_every": 2,
}


def run(
    folder: Path,
    model: Path,
    processes: int,
    devices: int,
    keys: dict[str, int],
    kill_at: Path | None = None,
) -> None:
    """Trains; with kill_at, kills all processes as soon as that exists."""
    command = [sys.executable, str(ROOT / "launch" / "local_processes.py"), "--timeout", "500"]
    command += ["--processes", str(processes), "--devices", str(devices), "--"]
    command += ["-m", "echovlm_jax.cli", "train", "--workdir", str(folder)]
    command += ["--config", str(ROOT / "configs" / "instruction.py"), f"--config.model={model}"]
    command += [f"--config.{key}={value}" for key, value in (KEYS | keys).items()]
    with (folder.parent / f"{folder.name}.txt").open("w+") as said:
        job = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
        while kill_at is not None and job.poll() is None and not kill_at.exists():
            time.sleep(0.005)
        if kill_at is not None:
            job.kill()  # the launcher's processes die with it
        code = job.wait()
        said.seek(0)
        assert code == (0 if kill_at is None else -signal.SIGKILL), said.read()[-3000:]


def losses(folder: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "aux_loss", "eval_loss")
    return {name: [line[name] for line in lines if name in line] for name in names}


def assert_close(ours: Path, expected: Path) -> None:
    found, wanted = losses(ours), losses(expected)
    for name, values in wanted.items():
        assert len(values) == (2 if name == "eval_loss" else 4)
        np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)
    state = states(STEPS, ours, expected)
    for name, (value, right) in state.items():
        bound = 3e-6 * np.abs(right).max(initial=0)
        moment = name.replace("trainable/", "opt_state/1/nu/")
        if name != moment and moment in state:
            # Adam divides by the gradient's size: where that is near nothing, so are its digits.
            # The second moment shows it as it was last; of a low-rank `a`, whose `b` begins at
            # zero, the first gradients are far smaller: hence 3e-5, not 1e-6.
            # What had no gradient has not moved: there is nothing to allow for.
            squares = state[moment][1]
            there = squares > 0
            small = np.sqrt(squares.max(initial=0) / np.where(there, squares, 1)) * there
            bound = bound + STEPS * RATE * 3e-5 * small
        assert (np.abs(value - right) <= bound).all(), name


def states(step: int, *folders: Path) -> dict[str, list[np.ndarray]]:
    """What each run's checkpoint of a step holds: parameters, updates, optimizer's moments."""
    readers = [Reader(folder / "checkpoints" / str(step) / "state") for folder in folders]
    assert readers[0].shapes == readers[1].shapes
    for part in ("trainable/params/", "trainable/lora/", "frozen/", "opt_state/"):
        assert any(name.startswith(part) for name in readers[0].shapes)
    whole = {name: tuple(map(slice, shape)) for name, shape in readers[0].shapes.items()}
    return {name: [each.read(name, at) for each in readers] for name, at in whole.items()}


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_two_devices_compute_the_same_bits_in_one_process_and_in_two(tmp_path, axis):
    """Also where two processes are killed on the way, and one goes on. A sum of two has no order:
    nothing else may tell how many processes there are."""
    model = demo.make_checkpoint(tmp_path / "torch", MODEL)
    keys = {"mesh.data": 1, "mesh.fsdp": 1, f"mesh.{axis}": 2}
    keys |= {"steps": 100, "eval_every": 50, "checkpoint_every": 10}
    one, two, changed = (tmp_path / name for name in ("one", "two", "changed"))
    run(one, model, 1, 2, keys)
    run(two, model, 2, 1, keys)
    run(changed, model, 2, 1, keys, kill_at=changed / "checkpoints" / "20" / digests.SUMS)
    assert not (changed / "checkpoints" / "100").exists()
    run(changed, model, 1, 2, keys)
    for other in (two, changed):
        assert losses(other) == losses(one)
        for name, (found, right) in states(100, other, one).items():
            np.testing.assert_array_equal(found, right, err_msg=name)


@pytest.mark.slow
def test_four_devices_differ_by_the_rounding_of_their_sums(tmp_path):
    """One process adds up four numbers in another order than two with two devices each."""
    model = demo.make_checkpoint(tmp_path / "torch", MODEL)
    keys = {"mesh.data": 2, "mesh.fsdp": 2}
    one, two, changed = (tmp_path / name for name in ("one", "two", "changed"))
    run(one, model, 1, 4, keys)
    run(two, model, 2, 2, keys)
    assert_close(two, one)
    # Begun by two processes, and gone on by one from the second step's checkpoint.
    shutil.copytree(two, changed)
    shutil.rmtree(changed / "checkpoints" / "4")
    run(changed, model, 1, 4, keys)
    assert_close(changed, one)
