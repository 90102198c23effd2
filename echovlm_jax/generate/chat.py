"""Several questions about one exam, each with what was said before."""

from typing import Any


class Chat:
    """A conversation about one exam.

    Example:
      ```python
      chat = Chat(model, ["liver1.png", "cine.dcm"])
      print(chat.ask("Is there a focal lesion?"))
      print(chat.ask("Where?"))
      ```

    Attributes:
      messages: the turns so far, as {"role", "content"}.
    """

    def __init__(self, model: Any, images: Any, *, system: str | None = None) -> None:
        """
        Args:
          model: what `load_model` gives.
          images: as of its `generate`; they stand before the first question.
          system: the system prompt; by default the chat template's own.
        """
        self._model, self._images = model, images
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def ask(self, question: str, **sampling: Any) -> str:
        """The answer to the next question. Both are kept; after an error, neither.

        Args:
          question: the user's turn.
          sampling: as of `generate`, `stream` too.

        Raises:
          InputError: as `generate`; the conversation has become too long, for one.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        text = self._model.generate(self._images, asked, **sampling)["text"]
        self.messages = [*asked, {"role": "assistant", "content": text}]
        return text
