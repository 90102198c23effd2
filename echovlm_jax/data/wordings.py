"""How a task is asked for: system prompts and questions of our own, Chinese and English.

The sentences are in `wordings_zh.py` and `wordings_en.py`, one tuple a task. In them {images}
stands for what the exam consists of ("this sonogram", "these ultrasound images"), {n} for the
number of media, {statement} for what the options are ("description"), {question} for a question
that came with the exam. English sentences are such that {images} may be singular or plural.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

from echovlm_jax.data import keys, wordings_en, wordings_zh
from echovlm_jax.data.record import Medium

_LANGUAGES: dict[str, ModuleType] = {"zh": wordings_zh, "en": wordings_en}
# Which tuple of sentences asks for what. `own_options…` are for questions that came with options.
ASKS = (
    "report",
    "findings",
    "impression",
    "caption",
    "diagnosis",
    "question",
    "choice",
    "choice_restate",
    "judge",
    "own_options",
    "own_options_restate",
    "own_options_words",
)
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
    return pick(_LANGUAGES[language].SYSTEM, key, 2)


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
    words = _LANGUAGES[language]
    sentence = pick(getattr(words, ask.upper()), key, 3)
    images = pick(words.IMAGES[media_kind(media)], key, 4)
    statement = pick(words.STATEMENT[kind], key, 5)
    return _fill(sentence, images, len(media), statement, question)


def all_wordings(language: str) -> Iterator[str]:
    """Every sentence that can come out, with {question} left open and three media where many."""
    words = _LANGUAGES[language]
    yield from words.SYSTEM
    for ask in ASKS:
        for sentence in getattr(words, ask.upper()):
            for nouns in words.IMAGES.values():
                for images in nouns:
                    for kind in words.STATEMENT.values():
                        for statement in kind:
                            yield _fill(sentence, images, 3, statement, "{question}")


def _fill(sentence: str, images: str, n: int, statement: str, question: str) -> str:
    out = sentence.replace("{images}", images.replace("{n}", str(n)))
    out = out.replace("{statement}", statement)
    # The question last: braces in it are its own. No sentence begins with a noun of ours in small
    # letters, except where {images} is put first.
    return (out[:1].upper() + out[1:]).replace("{question}", question)
