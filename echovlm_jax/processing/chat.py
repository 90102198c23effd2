"""Messages to the prompt's text: the checkpoint's own template, or Qwen2-VL's where it has none.

A checkpoint's template is a program by a stranger. It runs in jinja2's immutable sandbox, which
keeps it from the interpreter, and under limits of steps and text, which keep it from hanging or
filling memory.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from echovlm_jax.errors import InputError
from echovlm_jax.processing.files import read_json, read_json_if_there, read_text, shown
from echovlm_jax.processing.tokenizer import special_token_text

IMAGE_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO_MARK = "<|vision_start|><|video_pad|><|vision_end|>"
DEFAULT_SYSTEM = "You are a helpful assistant."

MAX_TEMPLATE_BYTES = 128 * 2**10
MAX_STEPS = 100_000  # lines a template may execute; a real one takes a few for each message
MAX_TEXT = 2 * 2**20  # characters of a rendered prompt, or of any text the template holds
MAX_SUMS = 500  # places where a template adds texts; each may make MAX_TEXT characters
MAX_NUMBER = 10_000  # of a factor, an exponent or a width: `'x' * 10**9` is no chat

_TOO_LONG = f"it makes more than {MAX_TEXT} characters of text"

_LOOKS_CONTROL = re.compile(r"<(?=\|\w{1,40}\|>)")

Message = Mapping[str, Any]
_SIZED = (str, bytes, list, tuple, dict, set)


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A copy of the messages, two levels deep. Raises InputError where their form is wrong."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise InputError("messages must be a non-empty list of {role, content} objects")
    out = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {i + 1} must be an object with a role and a content")
        content = message.get("content")
        if isinstance(content, list | tuple):
            if not all(isinstance(entry, Mapping) for entry in content):
                raise InputError(f"message {i + 1}: each entry of its content must be an object")
            for entry in content:
                if not isinstance(entry.get("text", ""), str):
                    raise InputError(f"message {i + 1}: the text of an entry must be a string")
            content = [dict(entry) for entry in content]
        elif not isinstance(content, str):
            raise InputError(f"message {i + 1}: its content must be a string or a list of entries")
        out.append({**message, "content": content})
    return out


def neutral(text: str) -> str:
    """A text whose control tokens are written apart: '<|im_end|>' becomes '< |im_end|>'.

    A report that holds such a mark, by accident or malice, must not end a turn or claim an image.
    Everything of the form `<|word|>` is taken apart, whether or not a tokenizer knows it.
    """
    return _LOOKS_CONTROL.sub("< ", text)


def entry_kind(entry: Mapping[str, Any]) -> str | None:
    """'image', 'video' or 'text': what an entry of a content list is, by Qwen2-VL's rules."""
    if entry.get("type") == "image" or "image" in entry or "image_url" in entry:
        return "image"
    if entry.get("type") == "video" or "video" in entry:
        return "video"
    return "text" if "text" in entry else None


def qwen2_vl_prompt(messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
    """The built-in template: what Qwen2-VL's own template gives, turn by turn.

    A conversation that does not begin with a system turn gets the default one.
    """
    turns = [(message["role"], _content_text(message["content"])) for message in messages]
    if turns and turns[0][0] != "system":
        turns.insert(0, ("system", DEFAULT_SYSTEM))
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def _content_text(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    marks = {"image": IMAGE_MARK, "video": VIDEO_MARK, None: ""}
    return "".join(
        entry["text"] if (kind := entry_kind(entry)) == "text" else marks[kind] for entry in content
    )


def load_chat_template(folder: str | Path) -> Callable[..., str]:
    """The chat template of a checkpoint folder, or the built-in one.

    Looks at chat_template.jinja, chat_template.json, then tokenizer_config.json, in that order
    (Hugging Face's).

    Returns:
      a function (messages, *, add_generation_prompt=True) -> text.

    Raises:
      InputError: a template is no valid jinja2, or a file does not hold one.
    """
    folder = Path(folder)
    config = read_json_if_there(folder / "tokenizer_config.json") or {}
    if (path := folder / "chat_template.jinja").is_file():
        found: Any = read_text(path, MAX_TEMPLATE_BYTES)
    elif (path := folder / "chat_template.json").is_file():
        found = read_json(path).get("chat_template")
        if found is None:
            raise InputError(f"{shown(path)}: key chat_template is missing")
    else:
        path = folder / "tokenizer_config.json"
        found = config.get("chat_template")
        if found is None:
            return qwen2_vl_prompt
    if isinstance(found, list):  # several by name, as objects
        found = {e.get("name"): e.get("template") for e in found if isinstance(e, Mapping)}
    if isinstance(found, Mapping):
        found = found.get("default")
    if not isinstance(found, str):
        raise InputError(f"{shown(path)}: chat_template must be text, or name a default one")
    special = {
        key: text
        for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (text := special_token_text(config, key)) is not None
    }
    return compile_template(found, shown(path), special)


def compile_template(
    source: str, name: str = "chat_template", special: Mapping[str, str] | None = None
) -> Callable[..., str]:
    """A jinja2 template as a function of messages, run in the sandbox.

    Args:
      source: the template; it sees `messages`, `add_generation_prompt` and the special tokens.
      name: what to call it in errors.
      special: values of bos_token, eos_token, …

    Raises:
      InputError: here for a template that does not compile, from the function for one that fails,
        refuses the conversation, or exceeds the limits.
    """
    if len(source) > MAX_TEMPLATE_BYTES:
        raise InputError(f"{name}: is larger than {MAX_TEMPLATE_BYTES} bytes")
    environment = _Sandbox()
    try:
        _refuse_many_sums(environment, source)
        template = environment.from_string(source)
    except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, OverflowError) as error:
        raise InputError(f"{name}: is not a valid jinja2 template ({_first_line(error)})") from None

    def render(messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        variables = dict(special or {}, messages=messages)
        try:
            with _StepLimit():
                text = template.render(variables, add_generation_prompt=add_generation_prompt)
        except _Refused as error:
            raise InputError(f"{name}: refuses the conversation ({_first_line(error)})") from None
        except Exception as error:  # the template is foreign code
            raise InputError(f"{name}: fails on the conversation ({_first_line(error)})") from None
        return text

    return render


class _Refused(Exception):
    """Raised by a template through raise_exception."""


# str's methods that widen a text by a number or a table, and what leads to bytes, whose methods
# are as many again.
_WIDENING = {"center", "ljust", "rjust", "zfill", "expandtabs", "translate", "maketrans"} | {
    "encode",
    "to_bytes",
}


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """`a ~ b`, by a function that is bounded; jinja2's own is not."""
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Sandbox(ImmutableSandboxedEnvironment):
    """What Hugging Face's templates rely on, less what makes text without bound."""

    intercepted_binops = frozenset(["+", "*", "**", "%", "//"])
    code_generator_class = _Generator

    @staticmethod
    def concat(parts: Iterable[str]) -> str:  # type: ignore[override]
        return _concat(parts)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols],
            optimized=False,  # folding constants would compute outside the limits
        )
        for name in ("center", "format", "indent", "wordwrap", "batch", "slice", "pprint"):
            self.filters.pop(name, None)
        for name in ("lipsum", "cycler", "joiner"):
            self.globals.pop(name, None)
        self.filters |= {"tojson": _to_json, "join": _join, "replace": _replace}
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def wrap_str_format(self, value: Any) -> None:
        if isinstance(getattr(value, "__self__", None), str) and "format" in value.__name__:
            raise SecurityError("format is not available to templates")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        wide = attr in _WIDENING or isinstance(obj, bytes | bytearray | memoryview)
        return not wide and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str) and obj.__name__ in ("join", "replace"):
            return _join(args[0], owner) if obj.__name__ == "join" else _replace(owner, *args)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            if isinstance(left, _SIZED) and isinstance(right, _SIZED):
                _refuse_size(len(left) + len(right))
            return super().call_binop(context, operator, left, right)
        for side in (left, right):
            if not isinstance(side, int | float) or abs(side) > MAX_NUMBER:
                raise SecurityError(f"the operator {operator} takes numbers up to {MAX_NUMBER}")
        return super().call_binop(context, operator, left, right)


class _StepLimit:
    """Counts the lines a template executes in this thread, and looks at the texts it holds.

    jinja2 bounds one range() but not nested loops, and `x ~ x` doubles a text each time.
    """

    def __enter__(self) -> None:
        self._steps = 0
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: Any, event: str, _: Any) -> Any:
        if "<template>" not in frame.f_code.co_filename:
            return None
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")
        for value in frame.f_locals.values():
            if isinstance(value, Namespace):
                _refuse_long(*object.__getattribute__(value, "_Namespace__attrs").values())
            else:
                _refuse_long(value)
        return self._trace


def _refuse_many_sums(environment: jinja2.Environment, source: str) -> None:
    tree = environment.parse(source)
    sums = sum(len(node.nodes) for node in tree.find_all(nodes.Concat))
    if sums + len(list(tree.find_all(nodes.Add))) > MAX_SUMS:
        raise SecurityError(f"it adds texts in more than {MAX_SUMS} places")


def _refuse_long(*values: Any) -> None:
    for value in values:
        if isinstance(value, _SIZED):
            _refuse_size(len(value))


def _refuse_size(size: int) -> None:
    if size > MAX_TEXT:
        raise SecurityError(_TOO_LONG)


def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """jinja2's join filter, bounded."""
    if attribute is not None:
        raise SecurityError("join takes no attribute here")
    return _concat([str(d) + str(v) for v in value])[len(str(d)) :]


def _replace(value: Any, old: str, new: str, count: int | None = None) -> str:
    """jinja2's replace filter, bounded."""
    text, old, new = str(value), str(old), str(new)
    if len(text) + text.count(old) * len(new) > MAX_TEXT:
        raise SecurityError(_TOO_LONG)
    return text.replace(old, new, -1 if count is None else count)


def _concat(parts: Iterable[str]) -> str:
    """What every output block, macro and join is put together with."""
    held, total = [], 0
    for part in parts:
        total += len(part)
        if total > MAX_TEXT:
            raise SecurityError(_TOO_LONG)
        held.append(part)
    return "".join(held)


def _refuse(message: object) -> None:
    raise _Refused(str(message))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    """Piece by piece: each tojson of a tojson doubles the backslashes."""
    indent = min(indent, 8) if indent else None
    return _concat(json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent).iterencode(value))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
