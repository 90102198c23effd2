"""A job's processes compile once: process 0, and the others take what it has made."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.buckets import S3_ENVIRONMENT, s3_server

ROOT = Path(__file__).parents[2]
PROGRAM = str(Path(__file__).with_name("shared_programs.py"))


def run(folder: Path, place: str, *words: str, **environment: str) -> list[str]:
    """What each of two processes did."""
    launcher = [sys.executable, str(ROOT / "launch" / "local_processes.py")]
    command = [*launcher, "--processes", "2", "--devices", "4", "--", PROGRAM, str(folder / "said")]
    told = {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": place,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [*command, *words], env={**os.environ, **told, **environment}, timeout=120
    )
    assert done.returncode == 0
    return [json.loads((folder / f"said.{i}").read_text()) for i in range(2)]


def test_one_process_compiles_for_all_and_for_the_next_try(tmp_path):
    place = str(tmp_path / "programs")
    assert run(tmp_path, place) == ["compiled", "found"]
    assert run(tmp_path, place) == ["found", "found"]
    assert run(tmp_path, "") == ["compiled", "compiled"]


def test_programs_are_kept_in_a_bucket(tmp_path):
    with s3_server() as server:
        told = {"AWS_ENDPOINT_URL": server.address, **S3_ENVIRONMENT}
        assert run(tmp_path, "s3://bucket/programs", **told) == ["compiled", "found"]
        assert run(tmp_path, "s3://bucket/programs", **told) == ["found", "found"]
        written = [one.name for one in server.seen if one.method == "PUT" and one.name]
    assert len(written) == 1 and written[0].startswith("programs/jit__lambda")


def test_where_the_first_fails_the_others_do_not_wait_for_it(tmp_path):
    assert run(tmp_path, str(tmp_path / "programs"), "0") == ["failed", "compiled"]
