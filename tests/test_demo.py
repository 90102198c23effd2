"""The demo, with so few exams and steps that it learns nothing: what is left is the whole way."""

import html
import json

import pytest

from echovlm_jax import demo
from echovlm_jax.errors import InputError
from echovlm_jax.load import load_model
from echovlm_jax.storage.verify import verify


@pytest.mark.slow
def test_it_leaves_a_report_and_a_model_that_answers(tmp_path, capfd):
    stages = {
        name: {**changes, "steps": 2, "eval_every": 2, "checkpoint_every": 2}
        for name, changes in demo.STAGES.items()
    }
    out = tmp_path / "out"
    found = demo.demo(out, exams=150, held_out=7, stages=stages)
    assert found["parity"]["ok"]
    for results in ("eval", "blind", "shuffled"):
        assert found[results]["n"] == 14
    assert set(found["eval"]["by_organ"]) <= set(demo.open_dataset(out / "data").organ_names)
    page = (out / "report.html").read_text("utf-8")
    assert "OUTSIDE what the model was trained on" in page
    assert "no image" in page and "another exam's image" in html.unescape(page)
    for stage in stages:
        assert verify(out / stage)["ok"]
        assert (out / stage / "trainable.txt").exists()
    # The folder is a model on its own, with images as large as in training.
    model = load_model(out / "model")
    picture = demo.open_dataset(out / "data", "test").media(0)
    answer = model.generate(picture, demo.QUESTION, max_new_tokens=4)
    assert answer["prompt_tokens"] < 80
    assert "training: instruction" in capfd.readouterr().err
    # A demo's folder is replaced, and no other.
    assert json.loads((out / "demo.json").read_text("utf-8"))["made_by"] == "echovlm demo"
    (out / "demo.json").unlink()
    with pytest.raises(InputError, match="no demo made it"):
        demo.demo(out)
    assert (out / "report.html").exists()


def test_what_it_can_not_read_is_said_before_the_training(tmp_path):
    picture = tmp_path / "broken.png"
    picture.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"broken\.png"):
        demo.demo(tmp_path / "out", image=picture)


def test_a_small_model_is_made_once(tmp_path, monkeypatch):
    made = []

    def make_data(out, exams, seed, *, balanced):
        (out / "tokenizer").mkdir()
        made.append((exams, seed, balanced))

    def train_whole(config, run):
        (run / "checkpoints" / str(config.steps)).mkdir(parents=True)
        made.append((run.name, config.steps, config.model, config.get("tokenizer")))

    monkeypatch.setattr(demo, "make_data", make_data)
    monkeypatch.setattr(demo, "train_whole", train_whole)
    out = tmp_path / "out"
    for _ in range(2):
        assert (
            demo.small_model(out, exams=9, steps=(3, 2), organs=("liver",)) == out / "instruction"
        )
    assert made == [
        (9, 0, ("liver",)),
        ("alignment", 3, "nano", str(out / "tokenizer")),
        ("instruction", 2, str(out / "alignment"), None),
    ]
    assert demo.small_model(tmp_path / "b", exams=9, steps=(3, 0)) == tmp_path / "b" / "alignment"
    with pytest.raises(InputError, match="holds a model of other sizes"):
        demo.small_model(out, exams=10, steps=(3, 2), organs=("liver",))
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="holds a model of other sizes"):
        demo.small_model(tmp_path / "mine")
    for steps in ((0, 0), (1,), (-1, 2)):
        with pytest.raises(InputError, match="steps must be 2 numbers"):
            demo.small_model(tmp_path / "c", steps=steps)
