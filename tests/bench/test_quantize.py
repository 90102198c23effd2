"""What few bits cost, on a model that has learnt nothing and on one that has."""

from pathlib import Path

import jax
import numpy as np
import pytest

from echovlm_jax.bench import quantize as bench
from echovlm_jax.cli import main
from echovlm_jax.quantize import KINDS
from tests.evaluate.models import make_model


@pytest.mark.slow
def test_a_model_beside_itself_in_few_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model")
    found = bench.bench_quantize(model, exams=2)
    assert found["kinds"].keys() == KINDS.keys() and found["tokens"] > 100
    int8, int4 = found["kinds"]["int8"], found["kinds"]["int4"]
    assert 0 < int8["mean_kl"] < int4["mean_kl"]
    assert int8["top1_agreement"] >= int4["top1_agreement"]
    assert int4["bytes"] < int8["bytes"] < found["wide_bytes"]
    # Nothing differs where nothing is rounded.
    monkeypatch.setattr(bench, "quantize_params", lambda params, config, kind: params)
    for same in bench.bench_quantize(model, exams=1)["kinds"].values():
        assert same["top1_agreement"] == 1 and same["mean_kl"] == 0


def test_the_columns_are_those_that_predict_the_answer(tmp_path: Path) -> None:
    model = bench.load_model(make_model(tmp_path / "model"), dtype="float32")
    dataset = bench.open_dataset("phantom", "test")
    sample = bench.make_samples(dataset, limit=1)[0][0]
    limits = bench.Limits(4000, 2**30, 2**30)
    made = bench._answer(model, dataset, sample, limits)
    assert made is not None
    batch, at, wanted = made
    np.testing.assert_array_equal(batch["tokens"][0, at + 1][:-1], wanted[:-1])
    assert batch["tokens"][0, -1] == wanted[-1] and at[-1] + 2 == batch["tokens"].shape[1]
    assert model.processor.tokenizer.decode(wanted.tolist()) == sample.reference
    own = bench._log_probabilities(model.config, model.params, batch, at)
    logits = model.forward(batch)[0, at]
    np.testing.assert_allclose(own, jax.nn.log_softmax(logits, axis=-1), atol=1e-4)


def test_no_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quantize"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
