"""Messages to the prompt's text: the checkpoint's own template, or Qwen2-VL's where it has none.

A checkpoint's template is a program by a stranger. It runs in a process of its own
(`chat_sandbox`), under limits of time and memory.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from echovlm_jax.child import Child
from echovlm_jax.errors import InputError
from echovlm_jax.processing import chat_sandbox
from echovlm_jax.processing.files import read_json, read_json_if_there, read_text, shown
from echovlm_jax.processing.tokenizer import special_token_text
from echovlm_jax.storage.files import as_path

IMAGE_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO_MARK = "<|vision_start|><|video_pad|><|vision_end|>"
DEFAULT_SYSTEM = "You are a helpful assistant."

MAX_TEMPLATE_BYTES = 128 * 2**10
MAX_TEXT = 2 * 2**20  # characters of a rendered prompt, or of any text the template makes
MAX_SECONDS = 5  # of the processor's time, to render one conversation
MAX_MEMORY = 2**30  # bytes of address space, Python's own 50 MB among them
_MAX_REPLY = 12 * MAX_TEXT + 1000  # bytes: JSON writes a character in at most twelve

_LOOKS_CONTROL = re.compile(r"<(?=\|\w{1,40}\|>)")

Message = Mapping[str, Any]


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
    folder = as_path(folder)
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
      name: its name in errors.
      special: values of bos_token, eos_token, …

    Raises:
      InputError: here for a template that does not compile, from the function for one that fails,
        refuses the conversation, or exceeds the limits.
    """
    if len(source) > MAX_TEMPLATE_BYTES:
        raise InputError(f"{name}: is larger than {MAX_TEMPLATE_BYTES} bytes")
    told = {"paths": sys.path, "source": source, "seconds": MAX_SECONDS}
    told |= {"bytes": MAX_MEMORY, "characters": MAX_TEXT}
    sandbox = Child(chat_sandbox.__file__, told, _MAX_REPLY)
    _check(name, sandbox.ask(None))

    def render(messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return _check(name, sandbox.ask(dict(special or {}, **given)))

    return render


def _check(name: str, reply: dict[str, Any] | None) -> str:
    """The text of the sandbox's reply."""
    if reply is None:
        raise InputError(
            f"{name}: fails on the conversation (it takes more than {MAX_SECONDS} seconds or more"
            " memory than a template may)"
        )
    if "invalid" in reply:
        raise InputError(f"{name}: is not a valid jinja2 template ({reply['invalid']})")
    if "refuses" in reply:
        raise InputError(f"{name}: refuses the conversation ({reply['refuses']})")
    if "fails" in reply:
        raise InputError(f"{name}: fails on the conversation ({reply['fails']})")
    return str(reply.get("text", ""))
