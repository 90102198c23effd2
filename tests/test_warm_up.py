"""Programs compiled ahead: those of every size, and none is compiled again."""

import jax
import numpy as np
import pytest

from echovlm_jax import demo
from echovlm_jax.config import preset
from echovlm_jax.generate.offline import columns_for
from echovlm_jax.generate.prompts import split_rows
from echovlm_jax.generate.warm_up import prompts, warm_up
from echovlm_jax.load import load_model

SMALL = preset("tiny")


def programs(prompt, new):
    """What an answer's programs depend on."""
    shapes = {name: array.shape for name, array in prompt.batch.items()}
    return tuple(sorted(shapes.items())), columns_for(int(prompt.length[0]) + new)


@pytest.mark.parametrize(("text", "new"), [(40, 512), (130, 16), (200, 100)])
def test_no_size_of_an_image_needs_other_programs(text, new):
    most = 3000  # patches: 750 tokens, in the middle of a bucket
    made = [programs(one, new) for one in prompts(SMALL, text=text, patches=most, new=new)]
    assert len(set(made)) == len(made) <= 30
    for count in range(0, 751, 7):
        words, image = [9] * (text + (2 if count else 0)), [SMALL.image_token_id] * count
        inputs = {"input_ids": np.array([[*words[:5], *image, *words[5:]]])}
        if count:
            shape = (4 * count, SMALL.vision.patch_dim)
            inputs["pixel_values"] = np.zeros(shape, np.float32)
            inputs["image_grid_thw"] = np.array([[1, 2, 2 * count]])
        [asked] = split_rows(SMALL, inputs)
        assert programs(asked, new) in made, count


def test_prompts_end_where_the_model_does():
    long = SMALL.text.max_position_embeddings
    made = prompts(SMALL, text=40, patches=8 * long, new=16)
    assert made and all(int(one.length[0]) + 16 <= long for one in made)


@pytest.mark.slow
def test_an_answer_after_it_compiles_nothing(tmp_path):
    folder = demo.make_checkpoint(tmp_path / "model", preset("nano_dense"))
    model = load_model(folder, max_pixels=28 * 28 * 80)
    assert warm_up(model, "What is seen?", max_new_tokens=8)["prompts"] == 3
    compiled = []

    def listen(name, *_, **__):
        if name.endswith("backend_compile_duration"):
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for side in (28, 56, 140, 196, 252):
        picture = np.full((side, side, 3), 100, np.uint8)
        model.generate([picture], "What is seen?", max_new_tokens=8)
    assert not compiled
