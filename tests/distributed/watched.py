"""A program that makes steps under a watch, without anything to compute.

watched.py FOLDER [STEP_TIMEOUT [HANGS]]: each process writes FOLDER/<number> with its step. Process
HANGS gets no third batch.
"""

import itertools
import os
import sys
import time
from pathlib import Path

import jax

from echovlm_jax.train.watch import Watch


def batches(hangs: bool):
    for number in itertools.count():
        time.sleep(3600 if hangs and number == 3 else 0.05)
        yield number


if __name__ == "__main__":
    folder, timeout = Path(sys.argv[1]), float((sys.argv[2:] or ["0"])[0])
    with Watch(float(os.environ.get("ECHOVLM_HEARTBEAT", 10)), timeout) as watch:
        source = batches(sys.argv[3:] == [str(jax.process_index())])
        for step in itertools.count():
            watch.next(source, step)
            (folder / str(jax.process_index())).write_text(str(watch.made(step + 1)))
