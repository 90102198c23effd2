"""From an empty folder to a tuned model that PyTorch loads, through a bucket of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.buckets import S3_ENVIRONMENT, s3_server

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_whole_way(tmp_path):
    pytest.importorskip("torch")
    with s3_server() as server:
        environment = {
            **os.environ,
            **S3_ENVIRONMENT,
            "AWS_ENDPOINT_URL": server.address,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
            "XLA_FLAGS": (
                "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
            ),
        }
        folder = tmp_path / "empty"
        folder.mkdir()
        done = subprocess.run(
            ["bash", str(Path(__file__).with_name("whole_way.sh")), str(ROOT), "s3://bucket"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-5000:]
    assert done.stdout.rstrip().endswith("s] done")
