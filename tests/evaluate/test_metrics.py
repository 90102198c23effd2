"""Text metrics against the packages' own calls, and texts of every odd kind."""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from echovlm_jax.data.dataset import open_dataset
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate import metrics
from echovlm_jax.evaluate.bootstrap import estimate
from echovlm_jax.evaluate.metrics import TEXT_METRICS, lcs_length, score, text_statistics

EXACT = {"rel": 0, "abs": 1e-9}


class ZhTokens:
    """What rouge-score is given for Chinese."""

    def __init__(self):
        self.cut = BLEU(tokenize="zh").tokenizer

    def tokenize(self, text):
        return self.cut(text).split()


def direct(references, predictions, language, kinds=("rouge1", "rouge2", "rougeL")):
    """The metrics by the packages' own calls."""
    tokens, tokenizer = ("zh", ZhTokens()) if language == "zh" else ("13a", None)
    out = {}
    for n in range(1, 5):
        bleu = BLEU(tokenize=tokens, max_ngram_order=n)
        out[f"bleu{n}"] = bleu.corpus_score(predictions, [references]).score
    scorer = RougeScorer(list(kinds), tokenizer=tokenizer)
    pairs = [scorer.score(r, p) for r, p in zip(references, predictions, strict=True)]
    for kind in kinds:
        out[kind] = 100 * float(np.mean([pair[kind].fmeasure for pair in pairs]))
    return out


@pytest.fixture(scope="module")
def reports():
    """Made-up reports in both languages."""
    dataset = open_dataset("phantom", "test")
    found = {"zh": [], "en": []}
    for i in range(60):
        for report in dataset.record(i).reports:
            found[report.language].append(f"{report.findings}\n{report.impression}")
    return found


def pairs_of(texts, count, seed=0):
    rng = random.Random(seed)
    return rng.choices(texts, k=count), rng.choices(texts, k=count)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_values_are_the_packages(reports, language):
    references, predictions = pairs_of(reports[language], 60)
    predictions[3:6] = "", references[4], references[5][:7]
    found = score(references, predictions, language)
    for name, value in direct(references, predictions, language).items():
        assert found[name] == pytest.approx(value, **EXACT), name
        low, high = found["intervals"][name]
        assert low < found[name] < high
    assert found["n"] == 60 and set(TEXT_METRICS) <= set(found)
    assert json.dumps(found) == json.dumps(score(references, predictions, language))


@pytest.fixture(scope="module")
def real_pairs(public_data):
    texts = []
    for path in sorted((public_data / "echovlm_public").glob("*.json")):
        for record in json.loads(path.read_text("utf-8")):
            turns = record.get("conversations") or record.get("messages")
            roles = ((turn.get("from") or turn.get("role"), turn) for turn in turns)
            texts += [t.get("value") or t["content"] for r, t in roles if r in ("gpt", "assistant")]
    return pairs_of(texts, 1000)


def test_bleu_of_real_reports(real_pairs):
    some = [texts[:150] for texts in real_pairs]
    found = text_statistics(*some, "zh")
    for name, value in direct(*some, "zh", kinds=()).items():
        assert estimate(found[name]) == pytest.approx(value, **EXACT), name


@pytest.mark.slow
def test_all_of_real_reports(real_pairs):
    found = score(*real_pairs, "zh")
    for name, value in direct(*real_pairs, "zh").items():
        assert found[name] == pytest.approx(value, **EXACT), name


def test_resampled_bleu_is_sacrebleus(reports):
    """All orders, among them sums without a match and without a token."""
    rng = np.random.default_rng(0)
    total = np.sort(rng.integers(0, 9, (300, 4)), axis=1)[:, ::-1]
    right = np.sort(rng.integers(0, total + 1), axis=1)[:, ::-1]
    sums = np.concatenate([total[:, :1], rng.integers(1, 12, (300, 1)), right, total], axis=1)
    for n in range(1, 5):
        expected = [
            BLEU.compute_bleu(
                row[2 : 2 + n].tolist(), row[6 : 6 + n].tolist(), int(row[0]), int(row[1]),
                smooth_method="exp", max_ngram_order=n,
            ).score
            for row in sums
        ]  # fmt: skip
        assert 20 < np.count_nonzero(expected) < 300
        np.testing.assert_allclose(metrics._bleu(sums.astype(float), n), expected, atol=1e-9)


def test_each_text_is_cut_as_its_language_is(reports):
    zh, en = pairs_of(reports["zh"], 5), pairs_of(reports["en"], 7)
    mixed = text_statistics(zh[0] + en[0], zh[1] + en[1], ["zh"] * 5 + ["en"] * 7)
    alone = text_statistics(*zh, "zh"), text_statistics(*en, "en")
    for name in TEXT_METRICS:
        joined = np.concatenate([part[name].columns for part in alone])
        np.testing.assert_array_equal(mixed[name].columns, joined)


def test_two_different_chinese_reports_are_not_equal():
    found = score(["肝脏大小正常。"], ["肾脏回声增强。"], "zh")
    assert 0 < found["rouge1"] < 50 and found["rougeL"] < 50


@given(st.text("abc", max_size=90), st.text("abcd", max_size=90))
def test_the_common_subsequence(a, b):
    table = [0] * (len(b) + 1)
    for x in a:
        before = table[:]
        for j, y in enumerate(b):
            table[j + 1] = before[j] + 1 if x == y else max(before[j + 1], table[j])
    assert lcs_length(a, b) == table[-1]


def test_meteor_by_hand():
    # 5 of 5 and of 6 words match, "cysts" by its stem, in 2 chunks.
    found = score(["one small liver cyst was seen"], ["liver cysts was seen small"], "en")
    precision, recall, chunks, matches = 5 / 5, 5 / 6, 2, 5
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    assert found["meteor"] == pytest.approx(100 * mean * (1 - 0.5 * (chunks / matches) ** 3))
    # Chinese has no stems: 2 of 3 characters, in one chunk.
    found = score(["肝囊肿"], ["肾囊肿"], "zh")
    assert found["meteor"] == pytest.approx(100 * 2 / 3 * (1 - 0.5 * (1 / 2) ** 3))
    assert score(["cysts"], ["cyst"], "zh")["meteor"] == 0


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize(
    ("reference", "prediction"),
    [("", ""), ("", "肝 liver"), ("肝 liver", ""), (" \n", "\t"), ("囊 cyst", "🙂"), ("肝", "肝")],
)
def test_odd_texts_have_scores(language, reference, prediction):
    found = score([reference], [prediction], language)
    for name in TEXT_METRICS:
        assert found[name] == 0 or (reference == prediction == "肝" and name != "rouge2"), name
        assert np.isfinite(found["intervals"][name]).all()


def test_equal_texts():
    found = score(["🙂 肝囊肿 3 mm 🙂"] * 2, ["🙂 肝囊肿 3 mm 🙂"] * 2, "zh")
    for name in TEXT_METRICS[:-1]:
        assert found[name] == pytest.approx(100)
    assert found["meteor"] > 99
    # Surrogate halves come out of JSON's escapes; a word may be as long as it likes.
    odd = ["\ud800 肝", "a" * 30_000]
    assert score(odd, odd, "en")["bleu1"] == pytest.approx(100)


def test_a_very_long_text_takes_neither_minutes_nor_gigabytes():
    rng = np.random.default_rng(0)
    words = list("肝肾囊肿结石回声低高无")
    a, b = ("".join(rng.choice(words, 20_000)) for _ in range(2))
    found = score([a], [b], "zh")
    assert 40 < found["rougeL"] < 90 and found["rouge1"] > 95
    common = lcs_length(a, b)
    assert found["rougeL"] == pytest.approx(100 * common / 20_000)


def test_no_pairs_have_no_scores():
    found = score([], [], "zh")
    assert found["n"] == 0 and found["intervals"] == {}
    assert all(found[name] is None for name in TEXT_METRICS)


def test_words_by_jieba():
    pytest.importorskip("jieba")
    found = score(["右肝囊肿，大小约3 mm。"], ["右肝血管瘤，大小约3 mm。"], "zh", segment="jieba")
    characters = score(["右肝囊肿，大小约3 mm。"], ["右肝血管瘤，大小约3 mm。"], "zh")
    assert "jieba" in found["signature"]["bleu"] and "jieba" in found["signature"]
    assert 0 < found["bleu1"] < 100 and found["bleu1"] != characters["bleu1"]


def test_what_cannot_be_done_is_said(monkeypatch):
    for arguments, what in (
        ({"language": "fr"}, "language 'fr'"),
        ({"segment": "words"}, "segment 'words'"),
    ):
        with pytest.raises(InputError, match=what):
            score(["a"], ["a"], **arguments)
    monkeypatch.setitem(__import__("sys").modules, "jieba", None)
    metrics._cuts.cache_clear()
    with pytest.raises(InputError, match=r"echovlm-jax\[jieba\]"):
        score(["肝"], ["肝"], segment="jieba")


def test_the_signature_says_what_was_done(reports):
    said = metrics.signature(["en", "zh"], seed=3)
    assert "sacrebleu 2" in said["bleu"] and "zh: sacrebleu's zh" in said["rouge"]
    assert "no WordNet" in said["meteor"] and "seed 3" in said["intervals"]
