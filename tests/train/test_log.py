"""What the log says of a step's speed, with padding and without."""

import json
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from echovlm_jax.config import preset
from echovlm_jax.flops import Work, model_flops
from echovlm_jax.train import log as log_module
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
    with Log(tmp_path, config, program, 0) as log:
        log.add(0, {**step, "tokens": 4 * 128 * 0.25, "patches": 4 * 256 * 0.5})
        log.add(1, {**step, "tokens": 4 * 128 * 0.75, "patches": 0.0})
        log.flush()
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    counted = model_flops(tiny, Work(4, 128, 256, 64))
    expected = counted.used(0.5, 0.25) / counted.total
    assert 0 < line["useful_mfu"] < line["mfu"]
    assert line["useful_mfu"] / line["mfu"] == pytest.approx(expected)
    assert line["patches"] == 0.0
