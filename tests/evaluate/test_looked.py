"""Where a model looked: a model that looks at one place is found out."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from echovlm_jax import demo
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.looked import overlay, where_looked

CONFIG = demo.CONFIG
ANSWER = [40, 41]


class Looker:
    """Its answer is the likelier, the brighter one image token is."""

    def __init__(self, token: int) -> None:
        self.config, self._token, self.rows = CONFIG, token, set()
        tokenizer = SimpleNamespace(encode=lambda text: ANSWER if text else [])
        self.processor = SimpleNamespace(tokenizer=tokenizer)

    def forward(self, batch):
        rows, columns = batch["tokens"].shape
        self.rows.add(rows)
        unit = CONFIG.vision.merge_unit
        seen = batch["patches"][:, unit * self._token : unit * (self._token + 1)].mean(axis=(1, 2))
        logits = jnp.zeros((rows, columns, CONFIG.text.vocab_size))
        return logits.at[..., jnp.array(ANSWER)].set(jnp.asarray(seen)[:, None, None])


def inputs(*grids, kind="image"):
    """Media of ones, and a prompt of two words."""
    patches = sum(int(np.prod(grid)) for grid in grids)
    token = getattr(CONFIG, f"{kind}_token_id")
    ids = []
    for grid in grids:
        ids += [CONFIG.vision_start_token_id, *[token] * (int(np.prod(grid)) // 4)]
    key = "pixel_values" if kind == "image" else "pixel_values_videos"
    return {
        "input_ids": np.array([[*ids, 50, 51]]),
        key: np.ones((patches, CONFIG.vision.patch_dim), np.float32),
        f"{kind}_grid_thw": np.array(grids),
    }


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_the_place_is_found(rows):
    model = Looker(4)  # of 2 × 3 tokens: the second row, the second column
    [heat] = where_looked(model, inputs((1, 4, 6)), "a cyst", rows=rows)
    assert heat.shape == (2, 3) and heat.dtype == np.float32
    assert heat[1, 1] > 0.5 and np.allclose(np.delete(heat.ravel(), 4), 0, atol=1e-6)
    assert model.rows == {rows}


def test_of_several_pictures_the_right_one():
    first, second = where_looked(Looker(7), inputs((1, 4, 4), (1, 4, 4)), "a cyst")
    assert np.allclose(first, 0, atol=1e-6) and np.unravel_index(second.argmax(), (2, 2)) == (1, 1)


def test_large_pictures_have_larger_parts():
    [heat] = where_looked(Looker(0), inputs((1, 8, 12)), "a cyst", cells=2)
    assert heat.shape == (2, 2) and heat.argmax() == 0


def test_a_part_of_a_loop_goes_at_all_its_times():
    [heat] = where_looked(Looker(6), inputs((2, 4, 4), kind="video"), "a cyst")
    assert heat.shape == (2, 2) and np.unravel_index(heat.argmax(), (2, 2)) == (1, 0)


def test_what_can_not_be_asked():
    with pytest.raises(InputError, match="images: none"):
        where_looked(Looker(0), {"input_ids": np.array([[50]])}, "a cyst")
    with pytest.raises(InputError, match="answer: is empty"):
        where_looked(Looker(0), inputs((1, 4, 4)), "")
    with pytest.raises(InputError, match="cells and rows"):
        where_looked(Looker(0), inputs((1, 4, 4)), "a cyst", cells=0)


def test_the_overlay_is_red_where_it_looked():
    picture = np.full((40, 60, 3), 100, np.uint8)
    drawn = np.asarray(overlay(picture, np.array([[0.0, 2.0], [-1.0, 0.0]]), width=120))
    assert drawn.shape == (80, 120, 3)
    assert drawn[10, 100, 0] > 150 and drawn[10, 100, 2] < 60
    assert (drawn[60, 10] == 100).all()
