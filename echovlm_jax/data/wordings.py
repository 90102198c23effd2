"""The wordings of tasks: system prompts and questions of our own, Chinese and English.

The sentences are in `wordings.json`, a list for each task. In them {images} stands for what the
exam consists of ("this sonogram", "these ultrasound images"), {n} for the number of media,
{statement} for what the options are ("description"), {question} for a question that came with the
exam. English sentences are such that {images} may be singular or plural.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from echovlm_jax.data import keys
from echovlm_jax.data.record import Medium

# language → "system" and each of ASKS → sentences; "images" and "statement" → kind → nouns.
_WORDS: dict[str, Any] = json.loads(Path(__file__).with_name("wordings.json").read_text("utf-8"))
# The kinds of questions. `own_options…` are for questions that came with options.
ASKS = tuple(ask for ask in _WORDS["en"] if ask not in ("images", "system", "statement"))
YES_NO = {"zh": ("是", "否"), "en": ("Yes", "No")}


def pick(options: Sequence[str], *key: int) -> str:
    """One of the options, uniformly by key."""
    return options[keys.number(*key) % len(options)]


def media_kind(media: Sequence[Medium]) -> str:
    """'none', 'one' (image), 'many' (images), 'loop' (one video) or 'mixed'."""
    loops = sum(medium.frames > 0 for medium in media)
    if not loops:
        return ("none", "one", "many")[min(len(media), 2)]
    return "loop" if len(media) == 1 else "mixed"


def system_prompt(language: str, key: int) -> str | None:
    """A system prompt, or in a quarter of cases none.

    Without one the chat template puts Qwen's own in, and that is how many users will ask.
    """
    if keys.number(key, 1) % 4 == 0:
        return None
    return pick(_WORDS[language]["system"], key, 2)


def wording(
    ask: str,
    language: str,
    media: Sequence[Medium],
    key: int,
    *,
    kind: str = "description",
    question: str = "",
) -> str:
    """A question, chosen uniformly by key among the sentences and then among the nouns.

    Args:
      ask: one of ASKS.
      kind: 'description' or 'conclusion', what the statements of a choice or judgement are.
      question: the question itself, where `ask` leads up to one.
    """
    words = _WORDS[language]
    sentence = pick(words[ask], key, 3)
    images = pick(words["images"][media_kind(media)], key, 4)
    statement = pick(words["statement"][kind], key, 5)
    return _fill(sentence, images, len(media), statement, question)


def all_wordings(language: str) -> Iterator[str]:
    """Every sentence that can come out, with {question} left open and three media where many."""
    words = _WORDS[language]
    yield from words["system"]
    images = [noun for nouns in words["images"].values() for noun in nouns]
    statements = [noun for nouns in words["statement"].values() for noun in nouns]
    for ask, noun, statement in itertools.product(ASKS, images, statements):
        for sentence in words[ask]:
            yield _fill(sentence, noun, 3, statement, "{question}")


def _fill(sentence: str, images: str, n: int, statement: str, question: str) -> str:
    out = sentence.replace("{images}", images.replace("{n}", str(n)))
    out = out.replace("{statement}", statement)
    # The question last: braces in it are its own. No sentence begins with a noun of ours in small
    # letters, except where {images} is put first.
    return (out[:1].upper() + out[1:]).replace("{question}", question)
