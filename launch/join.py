"""Joins the job that the environment describes, then runs a Python program in it.

    python launch/join.py program.py [argument …]
    python launch/join.py -m module [argument …]

JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe the job, as
`local_processes.py` sets them. Without them JAX finds it out itself, on the clusters that it knows.
The program needs no word about processes: when it starts, jax.devices() are those of the whole job.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import jax

HEARTBEAT = "ECHOVLM_HEARTBEAT"  # seconds after which a process is taken for lost


def initialize_from_environment() -> None:
    """Calls jax.distributed.initialize with what the environment says.

    Raises:
      ValueError: a variable can't be what it is.
    """
    text = os.environ.setdefault(HEARTBEAT, "60")
    if not text.isdecimal() or int(text) < 10:
        raise ValueError(f"{HEARTBEAT} is {text!r}: must be whole seconds, at least 10")
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, process = (os.environ.get(name) for name in names)
    if not (address and count and process):
        jax.distributed.initialize(heartbeat_timeout_seconds=int(text))
        return
    jax.distributed.initialize(
        address,
        int(count),
        int(process),
        cluster_detection_method="deactivate",  # a job of its own inside another one's machine
        coordinator_bind_address=os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"),
        heartbeat_timeout_seconds=int(text),
    )


def run_program(words: list[str]) -> None:
    """What `python words…` does, in this process. A program may also be a script on PATH."""
    if words[0] == "-m":
        sys.argv[:] = words[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    path = words[0] if Path(words[0]).exists() else shutil.which(words[0])
    if path is None:
        raise SystemExit(f"{words[0]}: no such file, and no program of that name on PATH")
    sys.argv[:] = [path, *words[1:]]
    sys.path[0] = str(Path(path).parent.resolve())
    runpy.run_path(path, run_name="__main__")


def leave(code: int) -> NoReturn:
    """Ends this process at once. sys.exit would wait minutes for the others, which wait for us."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(words: list[str]) -> None:
    if not words or words == ["-m"]:
        raise SystemExit("usage: python launch/join.py (program.py | -m module) [argument …]")
    try:
        initialize_from_environment()
    except ValueError as error:
        print(f"join.py: {error}", file=sys.stderr)
        leave(2)
    try:
        run_program(words)
        return
    except SystemExit as exit_:
        if exit_.code in (None, 0):
            return
        code = exit_.code if isinstance(exit_.code, int) else 1
        if code != exit_.code:
            print(exit_.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)


if __name__ == "__main__":
    main(sys.argv[1:])
