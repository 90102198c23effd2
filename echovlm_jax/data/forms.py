"""The forms that people keep records in, read as one: media, and turns with marks for them.

LLaVA's conversations, LLaMA-Factory's and OpenAI's messages, ms-swift's query and response, Qwen's
lists of content. What means something else for training than we would make of it (tools, rejected
answers, weights) is refused; any other key that is not known is counted by name.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from echovlm_jax.data.quarantine import Refused

IMAGES, VIDEOS = ("image", "images"), ("video", "videos")
SYSTEMS = ("system", "system_prompt")
# A question's and its answer's keys; "history" holds the turns before. Beside a conversation they
# are known for nothing: they are counted as other keys are.
_PAIRS = (
    *(("query", "response"), ("question", "answer"), ("prompt", "response")),
    *(("prompt", "completion"), ("instruction", "output")),
)
_TALKS = re.compile(r"(?:conversations?|conversatons|messages)(?:_\w+)?")
_ROLES = {
    **{"system": "system", "human": "user", "user": "user"},
    **{"gpt": "assistant", "assistant": "assistant"},
}
# What changes the meaning of a record, or of a turn, unless it is empty.
_MEANING = {
    *("tools", "tool_calls", "tool_call_id", "functions", "function_call", "audio", "audios"),
    *("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images"),
    *("kto_tag", "weight", "weights", "sample_weight", "loss", "loss_weight", "loss_scale"),
    *("objects", "bbox", "reward", "rewards", "preference"),
}
# Whether a turn is learned from; here what is empty is false and says no.
_LEARNED = {"train", "training", "trainable", "train_on_turn"}
_KNOWN = {
    *("id", "organ", "patient_id", "study_id", "exam_id", "synthetic", "description", "reports"),
    *(*IMAGES, *VIDEOS, *SYSTEMS),
}
_TURN_NAMES = (("from", "value"), ("role", "content"))
_REPORT_KEYS = {"language", "findings", "impression", "caption", "diagnosis", "questions"}
_PARTS = {  # kinds of an entry in a list of content: what it is, and where it may name a file
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("video", "video_url", "input_video"), "video"),
}
_FILE_KEYS = {
    "image": ("image", "image_url", "path", "url"),
    "video": ("video", "video_url", "path", "url"),
}
_MARK = re.compile(r"<(image|video)>")
_FILE_NAME = re.compile(
    r"\.(?:png|jpe?g|dcm|dicom|bmp|tiff?|webp|gif|jp2|avi|mp4|mov|nii(?:\.gz)?|mh[ad])\s*\Z",
    re.IGNORECASE,
)
_REMOTE = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]+:)?//|data:", re.IGNORECASE)


class Form(NamedTuple):
    """A record's media, as their marks come, and its turns as (role, text with marks)."""

    media: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]


def conversations_of(raw: Any) -> list[tuple[str, Any]]:
    """The records that one entry of a file holds: (what its id ends with, the entry with one
    conversation alone). More than one where an entry has several conversations under names of
    their own, as conversations_zh and conversations_en, or as {"zh": […], "en": […]}."""
    talks = [key for key in raw if _TALKS.fullmatch(key)] if isinstance(raw, dict) else []
    found: list[tuple[str, Any]] = []
    for key in talks:
        value = raw[key]
        if isinstance(value, dict):
            found += [(f"/{key}/{name}", talk) for name, talk in value.items()]
        elif isinstance(value, list) and value and isinstance(value[0], list):
            found += [(f"/{key}/{n}", talk) for n, talk in enumerate(value, 1)]
        elif value is not None:
            found.append((f"/{key}", value))
    forms = {key.split("_")[0] for key in talks}
    if len(forms) != 1 or not found or not all(_is_talk(talk) for _, talk in found):
        return [("", raw)]  # one, or none that can be used: reading it says so
    [form], several = forms, len(found) > 1
    rest = {key: value for key, value in raw.items() if key not in talks}
    return [(name if several else "", rest | {form: talk}) for name, talk in found]


def _is_talk(value: Any) -> bool:
    names = {"from", "role", *_ROLES}
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, dict) and not names.isdisjoint(v) for v in value)
    )


def read_form(raw: Mapping[str, Any]) -> Form:
    """What one record (of `conversations_of`) says and shows. Raises Refused."""
    _refuse_meaning(raw, "")
    listed = {
        kind: _listed(raw, keys, kind) for kind, keys in (("image", IMAGES), ("video", VIDEOS))
    }
    inline: list[tuple[str, str]] = []
    turns = [(role, _content(value, name, inline)) for role, value, name in _turns(raw)]
    stated = [raw[key] for key in SYSTEMS if raw.get(key) not in (None, "")]
    if stated:
        if len(stated) > 1 or not isinstance(stated[0], str):
            raise Refused("wrong type", "system must be one text")
        if turns and turns[0][0] == "system" and turns[0][1].strip() != stated[0].strip():
            raise Refused("turns", "two system prompts that differ; keep one")
        if turns and turns[0][0] != "system":
            turns.insert(0, ("system", stated[0]))
    marks = [kind for role, text in turns for kind in _MARK.findall(text) if role == "user"]
    return Form(_in_order(marks, listed, inline), tuple(turns))


def media_paths(raw: Any) -> tuple[str, ...]:
    """The files that an entry names, in whatever form. Raises Refused."""
    return read_form(raw).media if isinstance(raw, dict) else ()


def file_key(raw: Mapping[str, Any]) -> str | None:
    """A key that nobody reads and whose value names a picture, as "image_path": "a.png"."""
    for key in unknown_keys(raw):
        named = raw.get(key)
        for name in named if isinstance(named, list) else [named]:
            if isinstance(name, str) and _FILE_NAME.search(name):
                return key
    return None


def unknown_keys(raw: Any) -> Iterator[str]:
    """The names of what an entry says and nobody reads; further in as "turn.KEY", "content.KEY",
    "image.KEY", "report.KEY" and "question.KEY"."""
    if not isinstance(raw, dict):
        return
    talks = [key for key in raw if _TALKS.fullmatch(key)]
    pairs = [] if talks else [*_pairs(raw)[:1], ("history", "input")]
    pair_keys = {key for pair in pairs for key in pair}
    yield from _others(raw, _KNOWN | {*talks} | pair_keys, "")
    for key in talks:
        turns = list(raw[key].values()) if isinstance(raw[key], dict) else raw[key]
        for turn in _flat(turns):
            role, text = next((names for names in _TURN_NAMES if names[0] in turn), ("", ""))
            yield from _others(turn, {role, text} if role else set(_ROLES), "turn.")
            for content in [turn.get(text)] if role else turn.values():
                yield from _unknown_content(content)
    for key in pair_keys:
        yield from _unknown_content(raw.get(key))
    for kind, keys in (("image", IMAGES), ("video", VIDEOS)):
        for item in _flat([raw.get(key) for key in keys]):
            yield from _others(item, {*_FILE_KEYS[kind], "bytes"}, "image.")
    for report in _flat(raw.get("reports")):
        yield from _others(report, _REPORT_KEYS, "report.")
        for question in _flat(report.get("questions")):
            yield from _others(question, {"question", "answer", "options"}, "question.")


def _unknown_content(content: Any) -> Iterator[str]:
    for entry in _flat(content):
        kind = _kind(entry)
        files = {*_FILE_KEYS[kind], "bytes"} if kind in _FILE_KEYS else {"text"}
        yield from _others(entry, {"type", *files}, "content.")
        for key in files:
            if isinstance(inner := entry.get(key), dict):
                yield from _others(inner, {"url", "path", "bytes"}, "image.")


def _flat(value: Any) -> Iterator[dict[str, Any]]:
    """The objects in a list, or in the lists in it."""
    left = list(value) if isinstance(value, list) else [value]
    while left:
        item = left.pop(0)
        if isinstance(item, dict):
            yield item
        elif isinstance(item, list):
            left = [*item, *left]


def _others(entry: Mapping[str, Any], known: set[str], prefix: str) -> Iterator[str]:
    for key, value in entry.items():
        if key not in known and (value is False or not _is_empty(value)):  # false says something
            yield prefix + key


def _kind(entry: Mapping[str, Any]) -> str | None:
    """The kind of an entry of a list of content: "text", "image" or "video"."""
    stated = entry.get("type")
    if stated is None:
        stated = next((key for key in ("image_url", "image", "video", "text") if key in entry), "")
    return _PARTS.get(str(stated))


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {}) or value is False


def _refuse_meaning(entry: Mapping[str, Any], where: str) -> None:
    for key in entry:
        value = entry[key]
        if key in ("loss", "weight", "weights", "sample_weight", "loss_weight", "loss_scale"):
            plain = value is None or (isinstance(value, int | float) and value == 1)
        elif key in _LEARNED:
            plain = value is None or value is True or value == 1
        else:
            plain = key not in _MEANING or _is_empty(value)
        if not plain:
            raise Refused("not understood", f"{where}{key} changes what is learned; take it out")


def _listed(raw: Mapping[str, Any], keys: tuple[str, ...], kind: str) -> list[str]:
    """The files under one of two keys: one, or a list of them."""
    given = [raw[key] for key in keys if raw.get(key) is not None]
    if len(given) > 1:
        raise Refused("wrong type", f"has both {' and '.join(keys)}; keep one")
    if not given:
        return []
    return [_file(item, kind) for item in (given[0] if isinstance(given[0], list) else given)]


def _file(value: Any, kind: str) -> str:
    """A file's path: a text, or an object that holds one."""
    if isinstance(value, dict):
        if value.get("bytes"):
            raise Refused(
                "not understood", f"{kind} holds the bytes themselves; give a file's path"
            )
        named = [value[key] for key in _FILE_KEYS[kind] if value.get(key) not in (None, "")]
        value = named[0] if len(named) == 1 else None
        if isinstance(value, dict):
            value = value.get("url")
    if not isinstance(value, str):
        raise Refused("wrong type", f"{kind} must be a path or a list of paths")
    if value.lower().startswith("file://"):
        value = value[len("file://") :]
    elif _REMOTE.match(value):
        raise Refused("not understood", f"{kind} is no file but an address or its data; save it")
    return value


def _turns(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """(role, content, name for messages) of each turn."""
    talks = [key for key in raw if _TALKS.fullmatch(key) and raw[key] is not None]
    pairs = [] if talks else _pairs(raw)
    if len(talks) + len(pairs) > 1:
        names = [*talks, *(f"{a} and {b}" for a, b in pairs)]
        raise Refused("wrong type", f"has {' beside '.join(names)}; keep one conversation")
    if pairs:
        yield from _history(raw.get("history"))
        asked, answer = pairs[0]
        question = raw[asked]
        if not _is_empty(more := raw.get("input")):
            question = f"{text_of(question, asked)}\n{text_of(more, 'input')}"
        if any(not _is_empty(raw.get(key)) for key in ("options", "choices")):
            raise Refused("not understood", "options beside a question; write them into its text")
        yield "user", question, asked
        yield "assistant", raw[answer], answer
    for form in talks:
        if not isinstance(raw[form], list) or not all(isinstance(e, dict) for e in raw[form]):
            raise Refused("wrong type", f"{form} must be a list of objects")
        for n, entry in enumerate(raw[form], 1):
            yield from _turn(entry, f"{form} {n}")


def _pairs(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [pair for pair in _PAIRS if all(raw.get(key) is not None for key in pair)]


def _turn(entry: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any, str]]:
    _refuse_meaning(entry, f"{name}: ")
    for role_key, text_key in _TURN_NAMES:
        if role_key in entry:
            role = _ROLES.get(str(entry[role_key]).casefold())
            if role is None:
                raise Refused("turns", f"{name}: its {role_key!r} is no known role")
            yield role, entry.get(text_key), f"{name}: {text_key}"
            return
    said = [key for key in entry if key in _ROLES]  # {"human": …, "assistant": …}
    if not said:
        raise Refused("turns", f"{name}: has no role")
    for key in sorted(said, key=lambda key: ("system", "user", "assistant").index(_ROLES[key])):
        yield _ROLES[key], entry[key], f"{name}: {key}"


def _history(history: Any) -> Iterator[tuple[str, Any, str]]:
    pairs = [] if history is None else history
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in pairs
    ):
        raise Refused("wrong type", "history must be a list of [question, answer]")
    for n, (question, answer) in enumerate(pairs, 1):
        yield "user", question, f"history {n}: question"
        yield "assistant", answer, f"history {n}: answer"


def _content(value: Any, name: str, inline: list[tuple[str, str]]) -> str:
    """A turn's text; a list of entries, as chat programs write it, becomes one with marks. The
    files that entries name are added to `inline`, each with its kind."""
    if not isinstance(value, list):
        return text_of(value, name)
    if sum(isinstance(entry, str) for entry in value) > 1:
        raise Refused("wrong type", f"{name} is several texts; keep one")
    parts = []
    for entry in value:
        if isinstance(entry, str):
            entry = {"text": entry}
        if not isinstance(entry, dict):
            raise Refused("wrong type", f"{name} must be a text or a list of objects")
        kind = _kind(entry)
        if kind is None:
            kind = str(entry.get("type"))[:60]
            raise Refused("not understood", f"{name}: an entry of the type {kind!r}")
        if kind == "text":
            parts.append(text_of(entry.get("text"), name))
            continue
        if any(entry.get(key) for key in (*_FILE_KEYS[kind], "bytes")):
            inline.append((kind, _file(entry, kind)))
        parts.append(f"<{kind}>")
    return "".join(parts)


def text_of(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Refused("wrong type", f"{name} must be a text")
    return value


def _in_order(
    marks: list[str], listed: Mapping[str, list[str]], inline: list[tuple[str, str]]
) -> tuple[str, ...]:
    """The media in the order of their marks. Without any mark they come first, as they are listed.

    A mark of either kind may stand for a file of either list where one list is empty.
    """
    images, videos = listed["image"], listed["video"]
    if inline and (images or videos):
        if [path for _, path in inline] != images + videos:
            raise Refused("image marks", "files are named both in the turns and beside them")
        inline = []
    if inline:
        if len(inline) != len(marks):
            raise Refused("image marks", f"{len(marks)} marks for {len(inline)} images")
        return tuple(path for _, path in inline)
    total = len(images) + len(videos)
    if marks and len(marks) != total:
        raise Refused("image marks", f"{len(marks)} marks for {total} images")
    if not marks or not images or not videos:
        return tuple(images + videos)
    if marks.count("video") != len(videos):
        raise Refused("image marks", f"{marks.count('video')} video marks for {len(videos)} videos")
    left = {"image": iter(images), "video": iter(videos)}
    return tuple(next(left[kind]) for kind in marks)
