"""The same training steps on eight devices, whatever number of processes hold them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = [sys.executable, str(ROOT / "launch" / "local_processes.py")]
PROGRAM = str(Path(__file__).with_name("train_steps.py"))
# Three ways to dispatch tokens to experts, over meshes that use every axis but sequence.
CASES = {
    "ragged": ("mesh.fsdp=8",),
    "dense": ('moe_dispatch="dense"', 'remat="none"', "mesh.fsdp=4", "mesh.tensor=2"),
    "einsum": (
        *('moe_dispatch="einsum"', "grad_accum=2"),
        *("mesh.data=1", "mesh.fsdp=2", "mesh.expert=2", "mesh.tensor=2"),
    ),
}


def train(out: Path, *changes: str, processes: int | None) -> dict[str, np.ndarray]:
    """What the program wrote: as processes of one job, or (None) as a program like any other."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable]
    if processes is not None:
        command = [*LAUNCHER, "--processes", str(processes), "--devices", str(8 // processes), "--"]
    done = subprocess.run(
        [*command, PROGRAM, str(out), *changes],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    with np.load(out) as file:
        found = dict(file)
    assert found.pop("layout").tolist() == [processes or 1, 8 // (processes or 1)]
    return found


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not np.array_equal(a[name], b[name])] == []


def assert_learns(found: dict[str, np.ndarray]) -> None:
    """Gradients are there, everywhere: equal zeros would prove nothing."""
    assert all(np.isfinite(value).all() for value in found.values())
    moments = {name: value for name, value in found.items() if ".mu" in name}
    assert len(moments) > 20
    assert all(np.abs(value).max() > 0 for value in moments.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "counts"), [("ragged", (2, 4)), ("dense", (2,)), ("einsum", (4,))]
)
def test_any_number_of_processes_makes_the_same_steps(tmp_path, case, counts):
    """Bit for bit: all of them add up in the order of the devices."""
    one = train(tmp_path / "1.npz", *CASES[case], processes=1)
    assert_learns(one)
    for processes in counts:
        assert_same_bits(train(tmp_path / "n.npz", *CASES[case], processes=processes), one)


@pytest.mark.slow
def test_a_program_that_is_no_job_makes_the_same_steps(tmp_path):
    """Here other code adds up, in another order: 1e-6 of each array's largest value.

    Parameters are left out: Adam divides by the gradient's size, and makes rounding into a step
    where the gradient is nearly zero.
    """
    two = train(tmp_path / "2.npz", *CASES["ragged"], processes=2)
    plain = train(tmp_path / "plain.npz", *CASES["ragged"], processes=None)
    assert two.keys() == plain.keys()
    for name in (name for name in plain if not name.startswith("params/")):
        atol = 1e-6 * np.abs(plain[name]).max()
        np.testing.assert_allclose(two[name], plain[name], rtol=0, atol=atol, err_msg=name)
