"""`echovlm bench data`: both sides read the same exams and make the same of them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from echovlm_jax.bench import data as bench_data
from echovlm_jax.errors import InputError

ROOT = Path(__file__).parents[2]
BOTH = """
import json, sys
import numpy as np
from echovlm_jax.bench import data as bench_data

def total(counts):
    print(json.dumps(np.sum(list(counts), axis=0).tolist()))

bench_data._print_speed = total
{side}(json.load(sys.stdin))
"""


@pytest.mark.slow
def test_both_sides_make_the_same(tmp_path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    seen = []

    def run(side: str, job: dict) -> bench_data.Speed:
        done = subprocess.run(
            [sys.executable, "-c", BOTH.format(side=f"bench_data.{side}")],
            input=json.dumps(job),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=ROOT,
        )
        seen.append((side, json.loads(done.stdout.splitlines()[-1]), job))
        return bench_data.Speed(*([6.0, 8.0] if side == "ours" else [2.0, 4.0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_data, "_run", run)
        result = bench_data.bench_data(tmp_path, exams=20, rounds=1)
    (_, ours, job), (_, theirs, _) = seen
    assert ours == theirs
    images = [name for exam in job["exams"] for name in exam["images"]]
    assert theirs == [len(images), sum(exam["tokens"] for exam in job["exams"])]
    assert {Path(name).suffix for name in images} == {".png", ".jpg"}
    assert result | {"what": ""} == {
        "ratio": 3.0,
        "ours": 6.0,
        "theirs": 2.0,
        "what": "",
        "tokens_ratio": 2.0,
        "ours_tokens_per_second": 8.0,
        "theirs_tokens_per_second": 4.0,
        "exams": len(job["exams"]),
        "images": theirs[0],
        "tokens": theirs[1],
    }
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_a_missing_library_is_said_in_one_line(monkeypatch, name) -> None:
    if name != "torch":
        pytest.importorskip("torch")  # it would be missed first
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *rest: None if n == name else found(n, *rest)
    )
    with pytest.raises(InputError, match=rf"^[^\n]*{name} is not installed[^\n]*$"):
        bench_data.bench_data()


@pytest.mark.parametrize("key", ["exams", "rounds", "workers"])
def test_numbers_are_checked(key) -> None:
    pytest.importorskip("torch")
    with pytest.raises(InputError, match=f"{key} must be at least 1, found 0"):
        bench_data.bench_data(**{key: 0})
