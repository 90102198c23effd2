"""Deletes the folder that its input names once that input ends, as it does with the process that
started this program. It imports nothing of ours."""

import os
import shutil
import sys

if __name__ == "__main__":
    shutil.rmtree(os.fsdecode(sys.stdin.buffer.read()), ignore_errors=True)
