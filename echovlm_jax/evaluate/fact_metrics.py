"""How many of a report's statements are the exam's: precision, recall and F1 of facts.

The exam's facts are those of its reference text, read by the same rules as the prediction's
(`facts`). Of phantom exams these are their parameters exactly; a test holds the reader to that.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from echovlm_jax.data.record import LANGUAGES
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.bootstrap import Statistic
from echovlm_jax.evaluate.facts import ATTRIBUTES, RULES, Fact, Reading, read_facts
from echovlm_jax.evaluate.metrics import percentages

TOLERANCE = 0.1  # of the exam's size: what is nearer, in every dimension that both give, agrees
FACT_METRICS = (
    *("facts_f1", "facts_precision", "facts_recall"),
    *("hallucinated_per_report", "contradictions_per_report", "repeated_per_report"),
    *("facts_unread", "facts_unread_reference"),
)
SIGNATURE = {
    "facts": f"statements by the rules {RULES} (evaluate/facts.json), of the reference text read by"
    f" the same rules; sizes agree within {100 * TOLERANCE:g} % of the reference's; F1, precision"
    " and recall over all statements together",
    "facts_unread": "clauses, without advice, in which no rule reads anything; none is guessed",
}
_RIGHT, _WANTED, _STATED = range(3)


def fact_statistics(
    references: Sequence[str], predictions: Sequence[str], languages: Sequence[str] | str
) -> dict[str, Statistic]:
    """Every metric of FACT_METRICS, as statistics for `bootstrap`.

    Those "per_report" are numbers a report: statements that the reference does not make, attributes
    that a prediction states in two ways, and clauses that it has said before. The others are
    percentages; "facts_unread" of the predictions' clauses, the last one of the references'.

    Args:
      references, predictions: pairs, in the same order. An empty text states nothing.
      languages: "zh" or "en", of each pair or of all.

    Raises:
      InputError: an unknown language.
    """
    pairs = _read(references, predictions, languages)
    counts = np.array([_counts(*pair) for pair in pairs], np.float64)
    counts = counts.reshape(len(pairs), len(ATTRIBUTES), 3).sum(axis=1)
    theirs, ours = ([pair[at] for pair in pairs] for at in (0, 1))
    return {
        "facts_f1": Statistic(counts, _f1),
        "facts_precision": _ratio(counts[:, _RIGHT], counts[:, _STATED]),
        "facts_recall": _ratio(counts[:, _RIGHT], counts[:, _WANTED]),
        "hallucinated_per_report": _each(counts[:, _STATED] - counts[:, _RIGHT]),
        "contradictions_per_report": _each([one.contradictions for one in ours]),
        "repeated_per_report": _each([one.repeated for one in ours]),
        "facts_unread": _ratio([one.unread for one in ours], [one.clauses for one in ours]),
        "facts_unread_reference": _ratio(
            [one.unread for one in theirs], [one.clauses for one in theirs]
        ),
    }


def facts_by_attribute(
    references: Sequence[str],
    predictions: Sequence[str],
    languages: Sequence[str] | str,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """F1, precision and recall of each attribute that occurs.

    Returns:
      {attribute: {f1, precision, recall, intervals, wanted, stated}}: the last two are how many
      statements the references and the predictions make of it.

    Raises:
      InputError: an unknown language.
    """
    pairs = _read(references, predictions, languages)
    table = np.array([_counts(*pair) for pair in pairs], np.float64)
    table = table.reshape(len(pairs), len(ATTRIBUTES), 3)
    out = {}
    for at, attribute in enumerate(ATTRIBUTES):
        counts = table[:, at]
        _, wanted, stated = counts.sum(axis=0)
        if not wanted and not stated:
            continue
        statistics = {
            "f1": Statistic(counts, _f1),
            "precision": _ratio(counts[:, _RIGHT], counts[:, _STATED]),
            "recall": _ratio(counts[:, _RIGHT], counts[:, _WANTED]),
        }
        counted = {"wanted": int(wanted), "stated": int(stated)}
        out[attribute] = percentages(statistics, seed) | counted
    return out


def compare_facts(wanted: Iterable[Fact], stated: Iterable[Fact]) -> set[Fact]:
    """The stated facts that are among the wanted ones; each of those is met once.

    Args:
      wanted: facts of the exam.
      stated: facts of a prediction.
    """
    wanted, stated = set(wanted), set(stated)
    right = wanted & stated
    left = {fact for fact in wanted - right if fact.attribute == "size"}
    for fact in sorted((fact for fact in stated - right if fact.attribute == "size"), key=str):
        near = [other for other in sorted(left, key=str) if _agree(other, fact)]
        if near:
            left.remove(near[0])
            right.add(fact)
    return right


def _agree(wanted: Fact, stated: Fact) -> bool:
    """Whether two sizes are of one thing and near each other, the largest dimensions first."""
    if wanted.subject != stated.subject:
        return False
    pairs = zip(wanted.value, stated.value, strict=False)
    return all(abs(float(a) - float(b)) < TOLERANCE * float(a) - 1e-9 for a, b in pairs)


def _read(
    references: Sequence[str], predictions: Sequence[str], languages: Sequence[str] | str
) -> list[tuple[Reading, Reading]]:
    if isinstance(languages, str):
        languages = [languages] * len(references)
    for language in languages:
        if language not in LANGUAGES:
            raise InputError(f"language {language!r} is unknown; choose {' or '.join(LANGUAGES)}")
    return [
        (read_facts(reference, language), read_facts(prediction, language))
        for reference, prediction, language in zip(references, predictions, languages, strict=True)
    ]


def _counts(reference: Reading, prediction: Reading) -> np.ndarray:
    """[attributes, 3]: statements that agree, that the reference and that the prediction makes."""
    out = np.zeros((len(ATTRIBUTES), 3))
    right = compare_facts(reference.facts, prediction.facts)
    for column, facts in ((_RIGHT, right), (_WANTED, reference.facts), (_STATED, prediction.facts)):
        for fact in facts:
            out[ATTRIBUTES.index(fact.attribute), column] += 1
    return out


def _f1(sums: np.ndarray) -> np.ndarray:
    return 200 * sums[:, _RIGHT] / np.maximum(sums[:, _WANTED] + sums[:, _STATED], 1)


def _ratio(part: Sequence[float] | np.ndarray, whole: Sequence[float] | np.ndarray) -> Statistic:
    """The sum of a part in the sum of the whole, as a percentage; 0 of nothing."""
    columns = np.stack([np.asarray(part, np.float64), np.asarray(whole, np.float64)], axis=1)
    return Statistic(columns, lambda sums: 100 * sums[:, 0] / np.maximum(sums[:, 1], 1))


def _each(values: Sequence[float] | np.ndarray) -> Statistic:
    """The mean of numbers, one a report, as it is."""
    columns = np.stack([np.asarray(values, np.float64), np.ones(len(values))], axis=1)
    return Statistic(columns, lambda sums: sums[:, 0] / np.maximum(sums[:, 1], 1))


def score_facts(
    references: Sequence[str], predictions: Sequence[str], language: str, seed: int = 0
) -> dict[str, Any]:
    """The metrics of FACT_METRICS of pairs of texts, with intervals; None where there are no pairs.

    Returns:
      each of FACT_METRICS, intervals, facts_by_attribute, signature.

    Raises:
      InputError: an unknown language.
    """
    found = percentages(fact_statistics(references, predictions, language), seed)
    by_attribute = facts_by_attribute(references, predictions, language, seed)
    return found | {"facts_by_attribute": by_attribute, "signature": SIGNATURE}
