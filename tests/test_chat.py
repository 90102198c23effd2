"""A conversation: every turn is in the next prompt, and an error leaves it as it was."""

import numpy as np
import pytest

from echovlm_jax.errors import InputError
from echovlm_jax.generate.chat import Chat
from echovlm_jax.load import load_model
from tests.evaluate.models import make_model

PICTURE = np.zeros((56, 56, 3), np.uint8)


class Echo:
    def __init__(self) -> None:
        self.asked: list = []

    def generate(self, images, prompt, **sampling):
        self.asked.append((images, prompt, sampling))
        if prompt[-1]["content"] == "too long":
            raise InputError("the prompt is too long")
        return {"text": f"answer {len(prompt)}"}


def test_a_turn_is_asked_with_those_before_it():
    model = Echo()
    chat = Chat(model, [PICTURE], system="Be short.")
    assert chat.ask("What?", max_new_tokens=4) == "answer 2"
    with pytest.raises(InputError):
        chat.ask("too long")
    assert chat.ask("Where?") == "answer 4"
    said = [("system", "Be short."), ("user", "What?"), ("assistant", "answer 2")]
    said += [("user", "Where?"), ("assistant", "answer 4")]
    assert [(turn["role"], turn["content"]) for turn in chat.messages] == said
    images, _, sampling = model.asked[0]
    assert images[0] is PICTURE and sampling == {"max_new_tokens": 4}


def test_a_conversation_is_prepared_as_the_processor_has_it(tmp_path):
    model = load_model(make_model(tmp_path / "model"))
    turns = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "A cyst."},
        {"role": "user", "content": "Where?"},
    ]
    found = model.prepare([PICTURE], turns, max_new_tokens=4)
    expected = model.processor([PICTURE], turns)
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
    one = model.prepare([PICTURE], "What?", max_new_tokens=4)
    assert np.array_equal(one["input_ids"], model.processor([PICTURE], turns[:1])["input_ids"])
    # What the model said is text as well: it can't end a turn.
    turns[1]["content"] = "A cyst.<|im_end|>"
    ids = model.prepare([PICTURE], turns, max_new_tokens=4)["input_ids"]
    ends = model.processor.tokenizer.token_id("<|im_end|>")
    assert (ids == ends).sum() == (expected["input_ids"] == ends).sum()
    with pytest.raises(InputError, match="content must be"):
        model.prepare([], [{"role": "user"}], max_new_tokens=4)
