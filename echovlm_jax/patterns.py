"""Users' regular expressions, matched where they can do no harm.

Python's matcher may take time and memory that grow exponentially with a text's length, and which
expressions make it do so is not to be seen. So it runs in a process with limits of both.
"""

from collections.abc import Mapping
from typing import Any, Literal

from echovlm_jax import pattern_child
from echovlm_jax.child import Child
from echovlm_jax.errors import InputError

MAX_LENGTH = 10_000  # characters of an expression
MAX_MILLISECONDS = 1  # of the processor's time for a text, on average ...
MAX_SECONDS = 2  # ... and so much beyond it
MAX_MEMORY = 2**28  # bytes of address space
_MAX_REPLY = 2**26

_told = {"seconds": MAX_SECONDS, "milliseconds": MAX_MILLISECONDS, "bytes": MAX_MEMORY}
_matcher = Child(pattern_child.__file__, _told, _MAX_REPLY)


class Pattern:
    """An expression of Python's `re`.

    Attributes:
      groups: how many groups it has.
    """

    def __init__(self, expression: str, name: str) -> None:
        """Args:
        expression: what it is.
        name: of the expression, as messages begin: with the file or key that has it.

        Raises:
        InputError: it is none.
        """
        self._expression, self._name = expression, name
        if not isinstance(expression, str) or len(expression) > MAX_LENGTH:
            raise InputError(
                f"{name} is no regular expression (it is no text of up to {MAX_LENGTH:,}"
                " characters); mend it"
            )
        self.groups: int = self._ask(None, "")["count"]

    def find(
        self, text: str, how: Literal["match", "fullmatch", "search"]
    ) -> Mapping[str, str | None] | None:
        """What a method of `re` finds in a text: the groups by number, the whole as "0", and by
        name; None where nothing.

        Raises:
          InputError: it takes more time or memory than an expression may.
        """
        return self._ask(how, text)["groups"]

    def _ask(self, how: str | None, text: str) -> dict[str, Any]:
        reply = _matcher.ask({"expression": self._expression, "how": how, "text": text})
        if reply is None:
            raise InputError(
                f"{self._name} takes more time or memory to match {len(text)} characters than an"
                " expression may; write it with fewer repeats"
            )
        if "invalid" in reply:
            raise InputError(f"{self._name} is no regular expression ({reply['invalid']}); mend it")
        return reply
