"""Training as one job of several processes: the same run, and one that goes on with other ones."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from echovlm_jax import demo
from echovlm_jax.config import preset
from echovlm_jax.storage import digests
from echovlm_jax.storage.arrays import Reader
from echovlm_jax.storage.files import as_path
from tests.buckets import s3_server

ROOT = Path(__file__).parents[2]
MODEL = preset("tiny").replace(
    text={"num_layers": 1, "vocab_size": len(demo.SPECIAL) + 256}, vision={"depth": 1}
)
KEYS = {
    "data": "phantom",
    "data_workers": 0,
    "steps": 30,
    "global_batch_size": 4,
    "seq_len": 512,
    "max_patches": 512,
    "max_image_patches": 64,
    "allow_dropped": 1.0,
    "learning_rate": 1e-3,
    "dtype": "float32",
    "moe_dispatch": "dense",
    "log_every": 1,
    "eval_every": 15,
    "eval_batches": 1,
    "checkpoint_every": 10,
    "mesh.data": 2,
    "mesh.fsdp": 2,
}


def run(
    folder: Path,
    model: Path,
    processes: int,
    devices: int,
    kill_at: Path | None = None,
) -> None:
    """Trains; with kill_at, kills all processes as soon as that exists."""
    command = [sys.executable, str(ROOT / "launch" / "local_processes.py"), "--timeout", "500"]
    command += ["--processes", str(processes), "--devices", str(devices), "--"]
    command += ["-m", "echovlm_jax.cli", "train", "--workdir", str(folder)]
    command += ["--config", str(ROOT / "configs" / "instruction.py"), f"--config.model={model}"]
    command += [f"--config.{key}={value}" for key, value in KEYS.items()]
    with tempfile.TemporaryFile("w+") as said:
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


def states(*folders: Path) -> dict[str, list[np.ndarray]]:
    """What each run's last checkpoint holds: parameters, updates, optimizer's moments."""
    readers = [Reader(folder / "checkpoints" / "30" / "state") for folder in folders]
    assert readers[0].shapes == readers[1].shapes
    for part in ("trainable/params/", "trainable/lora/", "frozen/", "opt_state/"):
        assert any(name.startswith(part) for name in readers[0].shapes)
    whole = {
        name: tuple(slice(0, size) for size in shape) for name, shape in readers[0].shapes.items()
    }
    return {name: [each.read(name, at) for each in readers] for name, at in whole.items()}


@pytest.mark.slow
def test_the_number_of_processes_changes_no_bit_also_on_the_way(tmp_path):
    """Nor where two processes are killed, and one goes on."""
    model = demo.make_checkpoint(tmp_path / "torch", MODEL)
    one, two, changed = (tmp_path / name for name in ("one", "two", "changed"))
    run(one, model, processes=1, devices=4)
    run(two, model, processes=2, devices=2)
    kill_at = changed / "checkpoints" / "10" / digests.SUMS
    run(changed, model, processes=2, devices=2, kill_at=kill_at)
    assert not (changed / "checkpoints" / "30").exists()
    run(changed, model, processes=1, devices=4)
    assert {name: len(found) for name, found in losses(one).items()} == {
        "loss": 30, "grad_norm": 30, "aux_loss": 30, "eval_loss": 2
    }  # fmt: skip
    for other in (two, changed):
        assert losses(other) == losses(one)
        for name, (found, right) in states(other, one).items():
            np.testing.assert_array_equal(found, right, err_msg=name)


@pytest.mark.slow
def test_a_bucket_changes_no_bit(tmp_path):
    """Four processes are killed and two resume; on a disk it is one process."""
    model = demo.make_checkpoint(tmp_path / "torch", MODEL)
    run(tmp_path / "one", model, processes=1, devices=4)
    with s3_server():
        there = as_path("s3://bucket/run")
        kill_at = there / "checkpoints" / "10" / digests.SUMS
        run(there, model, processes=4, devices=1, kill_at=kill_at)
        assert not (there / "checkpoints" / "30" / digests.SUMS).exists()
        run(there, model, processes=2, devices=2)
        assert losses(there) == losses(tmp_path / "one")
        for name, (found, right) in states(there, tmp_path / "one").items():
            np.testing.assert_array_equal(found, right, err_msg=name)
