"""Text metrics of predictions against references: BLEU, ROUGE and METEOR, Chinese and English.

Chinese is cut by sacrebleu's `zh` tokenizer for every metric (a token a character, numbers and
Latin words whole), or into words by jieba. rouge-score's own tokenizer keeps only a-z and 0-9: it
would call any two Chinese reports without numbers equal. English is cut as each package does by
default. All values are percentages.

METEOR matches equal tokens and, in English, equal Porter stems; there is no WordNet behind it.
"""

import functools
import importlib
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from echovlm_jax.data.record import LANGUAGES
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.bootstrap import LEVEL, RESAMPLES, Statistic, estimate, interval, mean_of

SEGMENTS = ("characters", "jieba")
ORDERS = 4
TEXT_METRICS = (
    *(f"bleu{n}" for n in range(1, ORDERS + 1)),
    *("rouge1", "rouge2", "rougeL", "meteor"),
)

Cut = Callable[[str], list[str]]


class _Cuts(NamedTuple):
    """How a language's texts are cut into tokens."""

    bleu: Cut
    rouge: Cut
    meteor: Cut
    names: tuple[str, str, str]  # what a signature calls these
    stems: bool  # whether METEOR matches stems too


def text_statistics(
    references: Sequence[str],
    predictions: Sequence[str],
    languages: Sequence[str] | str,
    segment: str = "characters",
) -> dict[str, Statistic]:
    """Every text metric of these pairs, as statistics for `bootstrap`.

    Args:
      references, predictions: pairs, in the same order. A text without tokens scores 0.
      languages: "zh" or "en", of each pair or of all. Each pair is cut as its language is.
      segment: "characters", or "jieba" for Chinese words.

    Raises:
      InputError: an unknown language or segmentation, or jieba is wanted and not installed.
    """
    if isinstance(languages, str):
        languages = [languages] * len(references)
    rows = [
        _pair_statistics(reference, prediction, _cuts(language, segment))
        for reference, prediction, language in zip(references, predictions, languages, strict=True)
    ]
    table = np.array(rows, np.float64).reshape(len(rows), 2 + 2 * ORDERS + 4)
    counts, values = table[:, : 2 + 2 * ORDERS], table[:, 2 + 2 * ORDERS :]
    out = {
        f"bleu{n}": Statistic(counts, functools.partial(_bleu, order=n))
        for n in range(1, ORDERS + 1)
    }
    for at, name in enumerate(TEXT_METRICS[ORDERS:]):
        out[name] = mean_of(values[:, at])
    return out


def score(
    references: Sequence[str],
    predictions: Sequence[str],
    language: str = "zh",
    *,
    segment: str = "characters",
    seed: int = 0,
) -> dict[str, Any]:
    """BLEU-1 to 4, ROUGE-1, 2 and L and METEOR of pairs of texts.

    BLEU-n is sacrebleu's corpus score with max_ngram_order n (its default smoothing, "exp"); the
    others are means over pairs, ROUGE of the F-measure.

    Returns:
      each of TEXT_METRICS (None where there are no pairs), intervals, n, signature.

    Raises:
      InputError: as `text_statistics`.
    """
    found = text_statistics(references, predictions, language, segment)
    return percentages(found, seed) | {
        "n": len(references),
        "signature": signature([language], segment, seed),
    }


def signature(
    languages: Sequence[str], segment: str = "characters", seed: int = 0
) -> dict[str, str]:
    """What has to be the same for two tables to be compared: versions, tokens and settings."""
    packages = {"bleu": "sacrebleu", "rouge": "rouge-score", "meteor": "nltk"}
    settings = {
        "bleu": f"corpus score, max_ngram_order 1 to {ORDERS}, smooth exp, case mixed",
        "rouge": "mean F-measure over pairs, no stemmer",
        "meteor": "mean over pairs, alpha 0.9, beta 3, gamma 0.5",
    }
    out = {}
    for at, (metric, package) in enumerate(packages.items()):
        cuts = {language: _cuts(language, segment) for language in sorted(set(languages))}
        tokens = ", ".join(
            f"{language}: {c.names[at]}" + (f" {_matching(c.stems)}" if metric == "meteor" else "")
            for language, c in cuts.items()
        )
        out[metric] = f"{package} {version(package)}; tokens {tokens or 'none'}; {settings[metric]}"
    if segment == "jieba":
        out["jieba"] = f"jieba {version('jieba')}"
    out["intervals"] = (
        f"{LEVEL} % bootstrap over samples, percentiles of {RESAMPLES} resamples, seed {seed}"
    )
    return out


def _matching(stems: bool) -> str:
    return "(exact and Porter stem matching, no WordNet)" if stems else "(exact matching alone)"


def _pair_statistics(reference: str, prediction: str, cuts: _Cuts) -> list[float]:
    """BLEU's counts, as sacrebleu orders them, then ROUGE-1, 2 and L and METEOR from 0 to 1."""
    theirs, ours = cuts.bleu(reference), cuts.bleu(prediction)
    right, total = [], []
    for n in range(1, ORDERS + 1):
        wanted, found = _ngrams(theirs, n), _ngrams(ours, n)
        right.append((wanted & found).total())
        total.append(found.total())
    theirs_rouge, ours_rouge = cuts.rouge(reference), cuts.rouge(prediction)
    rouge = [*_rouge(theirs_rouge, ours_rouge), _rouge_l(theirs_rouge, ours_rouge)]
    meteor = _meteor(cuts.meteor(reference), cuts.meteor(prediction), cuts.stems)
    return [len(ours), len(theirs), *right, *total, *rouge, meteor]


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def _bleu(sums: np.ndarray, order: int) -> np.ndarray:
    """sacrebleu's BLEU of summed counts [r, 2 + 2 ORDERS], all r at once: float64 [r]."""
    ours, theirs = sums[:, 0], sums[:, 1]
    right, total = sums[:, 2 : 2 + order], sums[:, 2 + ORDERS : 2 + ORDERS + order]
    # "exp" smoothing: the k-th order without a match counts as 1 / 2^k matches.
    halved = np.where(right > 0, right, 0.5 ** np.cumsum(right == 0, axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(halved / total).sum(axis=1) / order
        brevity = np.where(ours < theirs, np.exp(1 - theirs / ours), 1.0)
        out = 100 * brevity * np.exp(logs)
    possible = (right[:, 0] > 0) & (total > 0).all(axis=1)
    return np.where(possible, out, 0.0)


def _rouge(reference: list[str], prediction: list[str]) -> list[float]:
    """ROUGE-1 and ROUGE-2 by rouge-score, of tokens."""
    result = _rouge_scorer().score(reference, prediction)  # type: ignore[arg-type]
    return [float(result[kind].fmeasure) for kind in ("rouge1", "rouge2")]


class _AsTheyAre:
    """A tokenizer, as rouge-score wants one, of texts that are tokens already."""

    @staticmethod
    def tokenize(text: list[str]) -> list[str]:
        return text


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2"], tokenizer=_AsTheyAre())


# until: rouge-score 0.2
def _rouge_l(reference: Sequence[str], prediction: Sequence[str]) -> float:
    """ROUGE-L as rouge-score defines it, without its table of both lengths' product."""
    if not reference or not prediction:
        return 0.0
    common = lcs_length(reference, prediction)
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence, 64 cells of the usual table at a time.

    Hyyrö 2004 ("Bit-parallel LCS-length computation revisited"): a whole row of the table is one
    number, whose zero bits are where the row's values go up.
    """
    where: dict[str, int] = {}
    for at, token in enumerate(a):
        where[token] = where.get(token, 0) | 1 << at
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        matches = row & where.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


class _NoSynonyms:
    """What nltk's METEOR asks for synonyms."""

    @staticmethod
    def synsets(word: str) -> list[Any]:
        return []


class _NoStems:
    @staticmethod
    def stem(word: str) -> str:
        return word


class _Stems:
    @staticmethod
    @functools.lru_cache(2**16)
    def stem(word: str) -> str:
        return _porter().stem(word)


@functools.cache
def _porter() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


def _meteor(reference: list[str], prediction: list[str], stems: bool) -> float:
    from nltk.translate.meteor_score import single_meteor_score

    stemmer: Any = _Stems if stems else _NoStems
    synonyms: Any = _NoSynonyms
    return single_meteor_score(reference, prediction, stemmer=stemmer, wordnet=synonyms)


@functools.cache
def _cuts(language: str, segment: str) -> _Cuts:
    if language not in LANGUAGES:
        raise InputError(f"language {language!r} is unknown; choose {' or '.join(LANGUAGES)}")
    if segment not in SEGMENTS:
        raise InputError(f"segment {segment!r} is unknown; choose {' or '.join(SEGMENTS)}")
    if language == "en":
        from rouge_score.tokenizers import DefaultTokenizer

        words = _sacrebleu("13a")
        names = ("13a", "rouge-score's", "13a in small letters")
        return _Cuts(words, DefaultTokenizer().tokenize, words, names, True)
    cut = _jieba() if segment == "jieba" else _sacrebleu("zh")
    name = "jieba words" if segment == "jieba" else "sacrebleu's zh"
    return _Cuts(cut, cut, cut, (name, name, name), False)


def _sacrebleu(name: str) -> Cut:
    """sacrebleu's tokens of a text, as its corpus score has them."""
    from sacrebleu.metrics.bleu import BLEU

    tokenizer = BLEU(tokenize=name).tokenizer
    return lambda text: tokenizer(text.rstrip()).split()


def _jieba() -> Cut:
    try:
        jieba: Any = importlib.import_module("jieba")
    except ImportError:
        raise InputError(
            "segment jieba needs the package jieba: pip install 'echovlm-jax[jieba]'"
        ) from None
    jieba.setLogLevel(60)  # it reports on standard error
    tokenizer = jieba.Tokenizer()
    # It keeps its dictionary in a folder that every user of the machine may write to, and would
    # read what lies there; here it reads nothing but its own.
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.tmp_dir = folder
        tokenizer.initialize()
    return lambda text: [word for word in tokenizer.lcut(text) if not word.isspace()]


def percentages(values: Mapping[str, Statistic], seed: int) -> dict[str, Any]:
    """{metric: value} and, under "intervals", {metric: (low, high)}; None without samples."""
    out: dict[str, Any] = {name: estimate(statistic) for name, statistic in values.items()}
    out["intervals"] = {
        name: found
        for name, statistic in values.items()
        if (found := interval(statistic, seed)) is not None
    }
    return out
