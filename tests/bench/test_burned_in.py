"""`bench burned-in`, scaled down: readable text is found, scales and plain phantoms are not."""

import json

import numpy as np
import pytest

from echovlm_jax.bench import burned_in as bench
from echovlm_jax.cli import main
from echovlm_jax.errors import InputError
from echovlm_jax.processing.burned_in import Box

SMALL = ((240, 320),)


def test_what_a_reader_finds_is_counted(monkeypatch, tmp_path):
    """By one that finds the upper half of every picture, whatever is there."""
    half = lambda picture: [Box(0, picture.shape[0] // 2, 0, picture.shape[1])]  # noqa: E731
    monkeypatch.setattr(bench, "found", half)
    monkeypatch.setattr(bench, "engine", lambda: "a reader 1.0")
    monkeypatch.setattr(bench, "_SIZES", SMALL)
    result = bench.bench_burned_in(12, fonts=[tmp_path])
    assert result["texts"] == 24 and 0.2 < result["found"] < 0.8
    for table in ("by_legible", "by_cap", "by_kind", "by_ink"):
        rows = result[table].values()
        assert sum(row["texts"] for row in rows) == 24
        found = sum(row["texts"] * row["found"] for row in rows) / 24
        assert found == pytest.approx(result["found"])
    assert list(result["by_cap"]) == [str(cap) for cap in bench.CAPS]
    assert result["false_alarms"] == {"plain": 1, "scale": 1}
    assert result["fonts"] == ["Pillow's"] and "chinese" not in result["by_kind"]
    json.dumps(result)


def test_contrast_is_that_of_the_guidelines():
    """WCAG 2.2, "contrast ratio": black and white have 21, #777777 on white 4.48."""
    for ink, ground, ratio in ((0, 255, 21), (255, 0, 21), (0x77, 255, 4.48), (80, 80, 1)):
        found = bench._contrast(np.full(3, ink), np.full((5, 3), ground))
        assert found == pytest.approx(ratio, abs=0.01)


def test_strokes_are_where_the_text_was_drawn():
    picture, scan = bench._screen(0, 0)
    before, chances = picture.copy(), np.random.default_rng(0)
    for place in bench.PLACES:
        text = bench._write(picture, scan, (place, 20), ([""], []), chances)
        changed = (picture != before).any(axis=-1)
        assert text.drawn.any() and changed[text.drawn].mean() > 0.95
        rows = np.flatnonzero(text.drawn.any(axis=1))
        assert 16 <= rows[-1] - rows[0] < 40  # with accents and tails
        before = picture.copy()


def test_readable_text_is_found_and_scales_are_not(monkeypatch):
    pytest.importorskip("rapidocr", reason="the extra `ocr` is not installed")
    monkeypatch.setattr(bench, "_SIZES", SMALL)
    monkeypatch.setattr(bench, "CAPS", (10, 14, 20))
    monkeypatch.setattr(bench, "INKS", {"white": (255, 255, 255), "yellow": (255, 220, 60)})
    # Only Pillow's own font: those of machines differ.
    result = bench.bench_burned_in(6, seed=3, fonts=())
    assert result["found"] >= 0.9 and result["hidden"] >= 0.9
    assert result["false_alarms"]["plain"] == 0 and result["seconds"] > 0


def test_bad_usage_is_one_line(capsys):
    with pytest.raises(InputError, match="images"):
        bench.bench_burned_in(0)
    assert main(["bench", "burned-in", "--size", "tiny"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
