"""Trains as one process of a job: joins the job that the environment describes, then trains.

    python launch/train.py --config F.py --workdir DIR [--config.KEY=VALUE …]

The words are those of `echovlm train`. What describes a job, the first that is there:
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, all three;
  a TPU slice's metadata, or GKE's TPU_WORKER_* variables; srun's SLURM_*; mpirun's OMPI_*.
Without any this process trains alone, on all devices of its machine.

Exit codes are those of `echovlm train`, and 75 (EX_TEMPFAIL) where the run was asked to stop, by
SIGTERM or a notice of preemption, before its last step: it has saved; the same command goes on.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys

import jax

# The folder of a script is where Python looks first.
from join import initialize_from_environment, leave

from echovlm_jax.cli import build_parser, main
from echovlm_jax.errors import InputError

STOPPED = os.EX_TEMPFAIL


def join() -> None:
    """Joins the job that the environment describes, if it describes one.

    Raises:
      InputError: it describes half of one.
    """
    if jax.distributed.is_initialized():  # local_processes.py has done it
        return
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    missing = [name for name in names if not os.environ.get(name)]
    if 0 < len(missing) < len(names):
        there = ", ".join(name for name in names if name not in missing)
        raise InputError(f"the environment has {there} but not {', '.join(missing)}: set all three")
    try:
        initialize_from_environment()
    except ValueError as error:
        if missing and "should be defined" in str(error):  # JAX knows of no job
            print("train.py: the environment describes no job: training alone", file=sys.stderr)
            return
        raise InputError(f"the environment's job can't be joined: {error}") from None


def train(words: list[str]) -> int:
    """`echovlm train`, and its exit code; STOPPED where steps are left."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main(["train", "--json", *words])
    stopped = code == 0 and json.loads(said.getvalue())["stopped"]
    if jax.process_index() == 0:
        print(said.getvalue(), end="", flush=True)
    return STOPPED if stopped else code


if __name__ == "__main__":
    build_parser().parse_args(["train", *sys.argv[1:]])  # bad usage is said before others wait
    try:
        join()
    except InputError as error:
        sys.exit(print(f"train.py: error: {error}", file=sys.stderr) or 2)
    code = train(sys.argv[1:])
    if code not in (0, STOPPED):
        leave(code)
    jax.distributed.shutdown()  # waits for all: none is ended while another still writes
    sys.exit(code)
