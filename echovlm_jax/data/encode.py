"""A conversation as token ids and labels: what Qwen2-VL's template and tokenizer make of it.

The text comes from `processing.qwen2_vl_prompt`. It is tokenised piece by piece between the chat's
control tokens, which a tokenizer never joins with what is beside them; an answer is a piece of its
own, as in generation, where the prompt ends before it.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from echovlm_jax.config import ModelConfig
from echovlm_jax.data.record import Turn
from echovlm_jax.errors import InputError
from echovlm_jax.processing.chat import neutral, qwen2_vl_prompt
from echovlm_jax.processing.tokenizer import Tokenizer

IGNORED = -100  # the label of a token that the loss leaves out

_CONTROL = re.compile(
    r"(<\|(?:im_start|im_end|vision_start|vision_end|image_pad|video_pad|endoftext)\|>)"
)
_MARKS = {"<|image_pad|>": "image", "<|video_pad|>": "video"}
_ANSWER = "assistant\n"  # what opens an answer, after <|im_start|>
_SHORT = 160  # characters: few reports are as short, all questions and system prompts are
_BATCH = 32


class Encoded(NamedTuple):
    tokens: np.ndarray  # int32 [n]
    labels: np.ndarray  # int32 [n]; at t the token at t itself, or IGNORED: the loss shifts


class _Piece(NamedTuple):
    text: str
    control: bool  # a control token of the chat; otherwise a text between two
    learned: bool


def encode(
    tokenizer: Tokenizer,
    model_config: ModelConfig,
    turns: Sequence[Turn],
    vision_tokens: Sequence[tuple[str, int]],
) -> Encoded:
    """The tokens of a whole conversation, and which of them are learned.

    Learned are the answers, each with its closing `<|im_end|>` and line end.

    Args:
      turns: an optional system turn, then user and assistant by turns, ending with an assistant.
      vision_tokens: "image" or "video" and the number of merged patches, of each medium. Their
        marks go to the front of the first user turn.

    Raises:
      InputError: turns of another form, an empty answer, or a text that the tokenizer turns into
        one of the model's control tokens though it holds none.
    """
    pieces = _pieces(turns, [kind for kind, _ in vision_tokens])
    ids = _tokenize(tokenizer, pieces)
    _check_controls(tokenizer, model_config, pieces, ids)
    counts = iter(vision_tokens)
    tokens: list[int] = []
    learned: list[tuple[int, int]] = []  # [start, end) of what is learned
    for piece, found in zip(pieces, ids, strict=True):
        start = len(tokens)
        if piece.control and piece.text in _MARKS:
            tokens += found * int(next(counts)[1])
        else:
            tokens += found
        if piece.learned:
            learned.append((start, len(tokens)))
    out = np.array(tokens, np.int32)
    labels = np.full_like(out, IGNORED)
    for start, end in learned:
        labels[start:end] = out[start:end]
    return Encoded(out, labels)


def text_tokens(tokenizer: Tokenizer, turns: Sequence[Turn], n_media: int) -> int:
    """How many tokens `encode` gives, less those that stand for patches."""
    return text_tokens_of(tokenizer, [(turns, n_media)])[0]


def text_tokens_of(
    tokenizer: Tokenizer, samples: Sequence[tuple[Sequence[Turn], int]]
) -> list[int]:
    """`text_tokens` of many (turns, number of media) at once: faster, the same numbers."""
    # Of all media but the first, what counts is the start and the end: two control tokens.
    pieces = [_pieces(turns, ["image"] * min(n_media, 1)) for turns, n_media in samples]
    ids = iter(_tokenize(tokenizer, [piece for sample in pieces for piece in sample]))
    return [
        sum(len(next(ids)) * (piece.text not in _MARKS or not piece.control) for piece in sample)
        + 2 * max(0, n_media - 1)
        for sample, (_, n_media) in zip(pieces, samples, strict=True)
    ]


def _pieces(turns: Sequence[Turn], kinds: Sequence[str]) -> list[_Piece]:
    """The template's text cut at its control tokens, and every answer from what opens it."""
    _check_turns(turns)
    messages, marks = [], [{"type": kind} for kind in kinds]
    for role, text in turns:
        content = [{"type": "text", "text": neutral(text)}]
        if role == "user":
            content, marks = marks + content, []
        messages.append({"role": role, "content": content})
    out: list[_Piece] = []
    parts = _CONTROL.split(qwen2_vl_prompt(messages, add_generation_prompt=False))
    learned = False
    for i, part in enumerate(parts):
        if i % 2:
            out.append(_Piece(part, True, learned))
        elif part.startswith(_ANSWER) and parts[i - 1] == "<|im_start|>":
            out.append(_Piece(_ANSWER, False, False))
            out.append(_Piece(part[len(_ANSWER) :], False, True))
            learned = True  # on to the turn's closing
        elif part:
            out.append(_Piece(part, False, learned))
            learned = False
    return out


def _check_turns(turns: Sequence[Turn]) -> None:
    talk = turns[1:] if turns and turns[0].role == "system" else turns
    roles = [turn.role for turn in talk]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise InputError(
            "turns must be an optional system turn, then user and assistant by turns; found"
            f" {', '.join(turn.role for turn in turns) or 'none'}"
        )
    if not all(turn.text.strip() for turn in talk if turn.role == "assistant"):
        raise InputError("an assistant turn is empty; there is nothing to learn from it")


def _tokenize(tokenizer: Tokenizer, pieces: Sequence[_Piece]) -> list[list[int]]:
    """The ids of each piece. Short ones are mostly questions, which come again: remembered."""
    long = list(dict.fromkeys(piece.text for piece in pieces if len(piece.text) > _SHORT))
    if len(long) < _BATCH:  # a thread pool for a handful of texts costs more than it saves
        found = [_latest(tokenizer, text) for text in long]
    else:
        found = tokenizer.encode_batch(long)
    known = dict(zip(long, found, strict=True))
    return [known.get(piece.text) or _remembered(tokenizer, piece.text) for piece in pieces]


@functools.lru_cache(maxsize=64)
def _latest(tokenizer: Tokenizer, text: str) -> list[int]:
    """Of a text that was measured a moment ago, to see what fits."""
    return tokenizer.encode(text)


@functools.lru_cache(maxsize=8192)
def _remembered(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


def _check_controls(
    tokenizer: Tokenizer, config: ModelConfig, pieces: Sequence[_Piece], ids: Sequence[list[int]]
) -> None:
    """Control tokens are single ids, the model's; no text has made one."""
    expected = {
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
    }
    controls = {config.eos_token_id, *expected.values()}
    for piece, found in zip(pieces, ids, strict=True):
        if piece.control:
            controls.update(found)
            if len(found) != 1 or expected.get(piece.text, found[0]) != found[0]:
                raise InputError(
                    f"{tokenizer.source}: {piece.text} has the ids {found}, the model"
                    f" {expected.get(piece.text, 'one id')}; give the model's own tokenizer"
                )
    for piece, found in zip(pieces, ids, strict=True):
        if not piece.control and not controls.isdisjoint(found):
            raise InputError(
                f"{tokenizer.source}: makes a control token of the text {piece.text[:40]!r}; take"
                " it out of the text"
            )
