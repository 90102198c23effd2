"""What the log says of a step's speed, with padding and without."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from ml_collections import ConfigDict

from echovlm_jax.config import preset
from echovlm_jax.data.record import ORGANS
from echovlm_jax.flops import Work, model_flops
from echovlm_jax.train import log as log_module
from echovlm_jax.train.clock import Clock
from echovlm_jax.train.log import Log


def test_padding_is_no_useful_work(tmp_path, monkeypatch):
    """Two steps of the same time: half of the tokens and a quarter of the patches are used."""
    config = ConfigDict(
        {"global_batch_size": 4, "seq_len": 128, "max_patches": 256, "max_image_patches": 64}
        | {"steps": 2, "log_every": 2, "lora": {"rank": 8}}
    )
    tiny = preset("tiny")
    program = SimpleNamespace(model=tiny, how=None, schedule=lambda step: 0.1)
    monkeypatch.setattr(log_module, "_peak_flops", lambda program: 1e15)
    step = {"loss": 1.0, "grad_norm": 1.0, "skipped": 0.0, "updates": 0.0}
    with Log(tmp_path, config, program, 0, {}, Clock()) as log:
        log.add(0, {**step, "tokens": 4 * 128 * 0.25, "patches": 4 * 256 * 0.5})
        log.add(1, {**step, "tokens": 4 * 128 * 0.75, "patches": 0.0})
        log.flush()
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    counted = model_flops(tiny, Work(4, 128, 256, 64))
    expected = counted.used(0.5, 0.25) / counted.total
    assert 0 < line["useful_mfu"] < line["mfu"]
    assert line["useful_mfu"] / line["mfu"] == pytest.approx(expected)
    assert line["patches"] == 0.0


def test_routing_goes_on_where_a_checkpoint_was(tmp_path):
    """Between evaluations, and at one: after its line was written, and before."""
    config = ConfigDict(
        {"global_batch_size": 4, "seq_len": 128, "max_patches": 256, "max_image_patches": 64}
        | {"steps": 6, "log_every": 1, "lora": {"rank": 8}}
    )
    program = SimpleNamespace(
        model=preset("tiny"), how=None, schedule=lambda step: 0.1, mesh=Mesh(jax.devices()[:1], "x")
    )
    drawn = np.random.default_rng(0).integers(0, 2**24, (6, 2, len(ORGANS) + 1, 2, 4))

    def steps(folder, first, last, kept=None, cut=False):
        """What a checkpoint after step `last` holds."""
        with Log(folder, config, program, first, kept or {}, Clock()) as log:
            if first in (3, 6):
                log.evaluated(first, {})
            for step in range(first, last):
                sums = {"router_entropy": np.ones(2), "coefficient": np.ones(2), "dropped": 0.0}
                told = {"loss": 1.0, "grad_norm": 1.0, "skipped": 0.0, "updates": 0.0}
                counted = {"expert_counts": drawn[step].astype(np.float32), "patches": 1.0}
                log.add(step, told | sums | counted | {"tokens": 9.0})
                log.flush()
                kept = json.loads(json.dumps({"config": {"steps": 6}, **log.kept()}))
                if step in (2, 5) and not (cut and step + 1 == last):
                    log.evaluated(step + 1, {})
        return kept

    def routing(folder):
        return (folder / "routing.jsonl").read_text()

    steps(tmp_path / "whole", 0, 6)
    assert routing(tmp_path / "whole").count("\n") == 2
    for last in range(1, 7):
        for cut in (False, True):
            folder = tmp_path / f"{last} {cut}"
            kept = steps(folder, 0, last, cut=cut)
            steps(folder, last, 6, kept)
            assert routing(folder) == routing(tmp_path / "whole"), folder.name
