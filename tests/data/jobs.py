"""What worker processes are told to do in test_workers.py: they import it, so it stands alone."""

import os
import signal
import sys
import time

import numpy as np

from echovlm_jax.errors import InputError
from echovlm_jax.storage import retry

LAYOUT = {"number": ((3,), np.int64), "values": ((3, 5000), np.float32)}


def fill(job, out, note) -> None:
    what, number = job
    if what == "die first":
        os.kill(os.getpid(), signal.SIGTERM)
    note(0)
    note(1)
    if what == "refuse":
        raise InputError(f"{number} is refused")
    if what == "fail":
        raise KeyError("a defect")
    if what == "print":
        print("printed by a worker")
    if what == "modules":
        number = sum(name in sys.modules for name in ("jax", "grain", "torch", "tests.data.fakes"))
    if what == "retry":
        retry.count(number)
    if what == "sleep":
        time.sleep(3600)
    if what == "row":
        assert out["values"].shape == (5000,)
        out["values"][...] = number
        return
    out["number"][...] = number
    out["values"][...] = number
