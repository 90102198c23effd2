"""One visitor's exam, and what the model has said of it. Nothing of it is written anywhere."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from echovlm_jax.data.record import ORGANS
from echovlm_jax.data.wordings import wording
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.looked import overlay, where_looked
from echovlm_jax.evaluate.mixture import Read, read_answer
from echovlm_jax.generate.chat import Chat
from echovlm_jax.generate.likeliest import Answer, likeliest
from echovlm_jax.phantom.words import ORGANS as NAMES
from echovlm_jax.web.exam import Exam

ANY_ORGAN = "not stated"
LANGUAGES = {"English": "en", "中文": "zh"}
# What is said of the organ before a question; without it, questions are worded as in training.
_STATED = {"en": "This is an ultrasound exam: {organ}. ", "zh": "这是一次超声检查：{organ}。"}
_DIAGNOSIS_TOKENS = 32
_at_work = threading.Lock()  # one prompt at a time, that of a visitor who left included


class Said(NamedTuple):
    """An answer, and the conversation that it answers."""

    asked: list[dict[str, str]]
    answer: str


@dataclass
class Session:
    """Attributes:
    exam: the pictures; a new exam is a new session.
    said: the newest answer of each kind: "report", "diagnosis" and "reply".
    read: what the mixture did while it read the answer that was looked at last.
    about: organ and language of the conversation.
    """

    model: Any
    max_new_tokens: int
    exam: Exam = field(default_factory=Exam)
    said: dict[str, Said] = field(default_factory=dict)
    read: Read | None = None
    chat: Chat | None = None
    about: tuple[str, str] | None = None

    def report(self, organ: str, language: str) -> Iterator[str]:
        """The report, as far as it is written."""
        asked = self._question("report", organ, language)
        yield from self._keep("report", asked, streamed(lambda send: self._generate(asked, send)))

    def diagnoses(self, organ: str, language: str) -> list[Answer]:
        """The likeliest diagnoses."""
        asked = self._question("diagnosis", organ, language)
        with _at_work:
            inputs = self._prepare(asked)
            found = likeliest(self.model, inputs, max_new_tokens=_DIAGNOSIS_TOKENS)
        self.said["diagnosis"] = Said(asked, found[0].text)
        return found

    def reply(self, question: str, organ: str, language: str) -> Iterator[str]:
        """The answer to the next question of a conversation, as far as it is written. Another organ
        or language than it began with begins it anew; its first question states them.

        Raises:
          InputError: at once: there is no exam or no question.
        """
        self._pictures()
        if not question.strip():
            raise InputError("write a question first")
        if self.chat is None or self.about != (organ, language):
            self.chat, self.about = Chat(self.model, self.exam.given), (organ, language)
        chat = self.chat
        if not chat.messages:  # nor where the first question came to nothing
            question = _stated(organ, language) + question
        asked = [*chat.messages, {"role": "user", "content": question}]

        def ask(send: Callable[[str], None]) -> str:
            return chat.ask(question, max_new_tokens=self.max_new_tokens, stream=send)

        return self._keep("reply", asked, streamed(ask))

    @property
    def turns(self) -> list[dict[str, str]]:
        """The conversation so far."""
        return [] if self.chat is None else self.chat.messages

    def inside(self, kind: str) -> Read:
        """What the mixture did at every token of an answer. Raises InputError: there is none."""
        said = self._answer(kind)
        with _at_work:
            self.read = read_answer(self.model, self._prepare(said.asked), said.answer)
        return self.read

    def looked(self, kind: str) -> list[Any]:
        """The pictures, redder where an answer depends on them; images first, then loops.

        Raises:
          InputError: there is no such answer.
        """
        said, pictures = self._answer(kind), self._pictures()
        with _at_work:
            inputs = self._prepare(said.asked)
            heat = where_looked(
                self.model, inputs, said.answer, cells=8 if len(pictures) == 1 else 4
            )
        shown = sorted(pictures, key=lambda picture: picture.ndim)  # in the order of the inputs
        frames = [picture if picture.ndim == 3 else picture[0] for picture in shown]
        return [overlay(frame, one) for frame, one in zip(frames, heat, strict=True)]

    def _pictures(self) -> list[Any]:
        if not self.exam.pictures:
            raise InputError("the exam is empty; drop its images first")
        return self.exam.pictures

    def _question(self, ask: str, organ: str, language: str) -> list[dict[str, str]]:
        self._pictures()
        text = wording(ask, LANGUAGES[language], self.exam.media, 0)
        return [{"role": "user", "content": _stated(organ, language) + text}]

    def _prepare(self, asked: list[dict[str, str]]) -> Any:
        return self.model.prepare(self.exam.given, asked, max_new_tokens=_DIAGNOSIS_TOKENS)

    def _generate(self, asked: list[dict[str, str]], send: Callable[[str], None]) -> None:
        new = self.max_new_tokens
        self.model.generate(self.exam.given, asked, max_new_tokens=new, stream=send)

    def _keep(self, kind: str, asked: list[dict[str, str]], texts: Iterator[str]) -> Iterator[str]:
        text = ""
        for text in texts:
            yield text
        self.said[kind] = Said(asked, text)

    def _answer(self, kind: str) -> Said:
        said = self.said.get(kind)
        if said is None or not said.answer.strip():
            raise InputError(f"there is no {kind} yet; ask for it first")
        return said


def _stated(organ: str, language: str) -> str:
    code = LANGUAGES[language]
    if organ not in ORGANS:
        return ""
    return _STATED[code].format(organ=NAMES[organ][("en", "zh").index(code)])


class _Stopped(Exception):
    """Nobody listens any more."""


def streamed(ask: Callable[[Callable[[str], None]], Any]) -> Iterator[str]:
    """A text that is written elsewhere, as far as it has come; where nobody takes more of it, the
    writing ends at its next piece.

    Args:
      ask: writes the text: it gives every piece of it to the function that it is given.

    Raises:
      Exception: what `ask` raises.
    """
    pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    stopped, failed = threading.Event(), []

    def send(piece: str) -> None:
        if stopped.is_set():
            raise _Stopped
        pieces.put(piece)

    def write() -> None:
        try:
            with _at_work:
                ask(send)
        except _Stopped:
            pass
        except Exception as error:
            failed.append(error)
        finally:
            pieces.put(None)

    threading.Thread(target=write, daemon=True).start()
    text = ""
    try:
        while (piece := pieces.get()) is not None:
            text += piece
            yield text
    finally:
        stopped.set()
    if failed:
        raise failed[0]
