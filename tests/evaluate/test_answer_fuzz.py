"""Answers changed at random: no error, no other reading for other dress, none beside a refusal."""

import random

import pytest

from echovlm_jax.evaluate.answers import choice, diagnosis, judgement
from tests.evaluate.test_answer_table import LABELS, OPTIONS, RULES, TABLE

PIECES = [
    *(
        "not",
        "no",
        "不",
        "未见",
        "无法判断",
        "can't",
        "but",
        "但",
        "and",
        "或",
        "A",
        "B",
        "Ｃ",
        "yes",
    ),
    *("?", "。", ",", "，", "\n", "(", ")", "**", '"', "“", "\0", "\ud800", "İ", "ß", "🙂", "1.5"),
    *("恶性", "良性", "benign", "malignant", "正确", "错误", "is", "rule out", "排除", "isn't"),
]
REFUSALS = ("对不起，我无法判断。", "I cannot answer this question.", "I'm not sure.", "信息不足。")


def wrapped(draw, text):
    """The same answer, dressed otherwise."""
    for _ in range(draw.randint(1, 3)):
        before, after = draw.choice([("", "\n"), (" ", " "), ("**", "**"), ("\n\n", ""), ("", " ")])
        text = f"{before}{text}{after}"
    return text


def wide(text):
    """Letters and digits in full width."""
    return "".join(chr(ord(c) + 0xFEE0) if c.isascii() and c.isalnum() else c for c in text)


def fuzz(cases, seed):
    draw, decided = random.Random(seed), 0
    for n in range(cases):
        rule, said, text = draw.choice(TABLE)
        if n % 2:
            mixed = [draw.choice([*PIECES, text]) for _ in range(draw.randint(0, 12))]
            text = draw.choice(["", " "]).join(mixed)
            for found, allowed in (
                (judgement(text), {"yes", "no", None}),
                (choice(text, OPTIONS), {*OPTIONS, None}),
                (diagnosis(text, LABELS), {*LABELS, None}),
            ):
                assert found in allowed, text
                decided += found is not None
            continue
        read = RULES[rule]
        loud = text.upper() if rule == "judgement" else text
        for same in (wrapped(draw, text), wide(text), loud):
            assert (read(same) or "undecided") == said, same
        for refusal in REFUSALS:
            assert read(f"{text}\n{refusal}") is None, (text, refusal)
            assert read(f"{refusal} {text}") is None, (text, refusal)
    return decided


def test_changed_answers():
    assert fuzz(300, seed=1) > 20


@pytest.mark.slow
def test_5000_changed_answers():
    assert fuzz(10_000, seed=2) > 500
