"""Answers written by hand, Chinese and English, and what a reader takes each for.

Undecided are refusals, contradictions, questions, and what leaves a thing open.
"""

from collections import Counter
from pathlib import Path

import pytest

from echovlm_jax.evaluate.answers import choice, diagnosis, judgement

OPTIONS = {"A": "benign nodule", "B": "malignant nodule", "C": "cyst", "D": "normal thyroid"}
LABELS = ("benign", "malignant", "cyst", "normal", "恶性", "良性", "囊肿", "正常")
RULES = {
    "judgement": judgement,
    "choice": lambda text: choice(text, OPTIONS),
    "diagnosis": lambda text: diagnosis(text, LABELS),
}
TABLE = [
    line.split("\t")
    for line in Path(__file__).with_name("answers.tsv").read_text("utf-8").splitlines()
    if not line.startswith("#")
]


def test_the_table_is_long_and_has_every_kind():
    assert len(TABLE) == len({(rule, text) for rule, _, text in TABLE}) > 600
    assert min(Counter(rule for rule, *_ in TABLE).values()) > 150
    assert min(Counter((rule, said) for rule, said, _ in TABLE).values()) > 2


@pytest.mark.parametrize("rule", RULES)
def test_answers_are_read_as_a_reader_takes_them(rule):
    wrong = [
        (text, said, found)
        for name, said, text in TABLE
        if name == rule and (found := RULES[rule](text) or "undecided") != said
    ]
    assert not wrong
