"""Records checked: raw JSON to texts and image paths.

The official forms, with any number of turns, a system turn first where there is one (`forms.py`
reads these and what else people have):

    {"id": "1", "image": "a.png" or ["a.png", …],
     "conversations": [{"from": "human", "value": "<image>…"}, {"from": "gpt", "value": "…"}]}
    {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>…"}, …]}

and, in any, what is known besides: organ, patient_id, study_id, exam_id, synthetic, description
(a caption), reports [{language, findings, impression, caption, diagnosis,
questions [{question, answer, options}]}].
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from echovlm_jax.data.forms import file_key, media_paths, read_form, text_of
from echovlm_jax.data.json_list import DUPLICATE
from echovlm_jax.data.organs import organ_name
from echovlm_jax.data.quarantine import Refused
from echovlm_jax.data.record import LANGUAGES, Question, Record, Report, Turn, language_of
from echovlm_jax.data.sections import split_report
from echovlm_jax.errors import InputError
from echovlm_jax.patterns import Pattern
from echovlm_jax.processing.files import Outside, locate, shown

GROUPS = ("patient_id", "study_id", "exam_id")
MAX_IMAGES = 256  # files of one exam
_MARK = re.compile(r"<(?:image|video)>")
# How other programs write a mark. As a text it would be learned, and its picture moved elsewhere.
_OTHER_MARK = re.compile(
    r"(?!(?-i:<(?:image|video)>))(?:[<＜]|&lt;)\s*/?\s*(?:image|video|img)"
    r"(?:[ _-]?\d+|[ _-]?here|[ _-]?placeholder)?\s*/?\s*(?:[>＞]|&gt;)",
    re.IGNORECASE,
)
_CONTROL = re.compile(r"<\|\w+\|>")
_REPORT_TEXTS = ("findings", "impression", "caption", "diagnosis")


class Official(NamedTuple):
    record: Record  # without media, which are not read here
    images: tuple[str, ...]  # paths as they are written


def read_record(raw: Any, *, id: str, organ: str, source: str, group: str) -> Official:
    """Checks one entry of a file.

    Args:
      raw: the entry.
      id, source, group: those of the record.
      organ: default for a record that does not state its own.

    Raises:
      Refused: with the first fault found.
    """
    if not isinstance(raw, dict):
        raise Refused("not an object", f"found {type(raw).__name__}")
    _check_texts(raw)
    images, said = read_form(raw)
    turns = _turns(said)
    reports = _reports(raw, turns)
    if not turns and not reports:
        raise Refused("no text", "has neither conversations (or messages) nor reports")
    if not images and (key := file_key(raw)):
        raise Refused("not understood", f"{shown(key)[:60]} names a file; name it under images")
    if not images:
        # A conversation without images is one; a report without images would teach to make them up.
        if not turns:
            raise Refused("no images", "has reports, and names no image that they are about")
        reports = ()
    if len(images) > MAX_IMAGES:
        raise Refused("too many images", f"{len(images)} images; at most {MAX_IMAGES}")
    stated = raw.get("organ")
    if stated is not None and (not isinstance(stated, str) or not stated.strip()):
        raise Refused("wrong type", "organ must be a text")
    if stated is not None and (not stated.isprintable() or "<|" in stated):
        raise Refused("wrong type", "organ must be printable, and no token")
    for key in ("id", *GROUPS):
        if raw.get(key) is not None and _id_text(raw[key]) is None:
            raise Refused("wrong type", f"{key} must be a text or a whole number")
    synthetic = raw.get("synthetic", False)
    if not isinstance(synthetic, bool):
        raise Refused("wrong type", "synthetic must be true or false")
    return Official(
        Record(
            id=id,
            organ=organ_name(stated) if stated else organ,
            turns=turns,
            reports=reports,
            source=source,
            group=group,
            synthetic=synthetic,
        ),
        images,
    )


def record_id(raw: Any, number: int) -> str:
    """The id that an entry states; else its place in the file, as "#12"."""
    found = _id_text(raw.get("id")) if isinstance(raw, dict) else None
    return found if found and found.strip() else f"#{number}"


def _id_text(value: Any) -> str | None:
    """An id as text: a float that is whole is the number that a table with gaps made of it, and one
    that is no number such a gap (""). None for what is no id."""
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return str(int(value)) if value.is_integer() else None
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    return None


def group_ids(raw: Any) -> list[tuple[str, str]]:
    """Of its patient, study and exam what an entry itself names: (key, id)."""
    if not isinstance(raw, dict):
        return []
    stated = [(key, (_id_text(raw.get(key)) or "").strip()) for key in GROUPS]
    return [(key, value) for key, value in stated if value]


def pattern_groups(raw: Any, pattern: Pattern) -> list[str]:
    """What the pattern's first group finds in an entry's id; where it finds nothing, in the paths
    of its images, each of which may name another patient."""
    if not isinstance(raw, dict):
        return []
    id = _id_text(raw.get("id"))
    if id and (found := _first_group(pattern, id)):
        return [found]
    try:
        paths = media_paths(raw)[:MAX_IMAGES]
    except Refused:  # it will be refused when it is read
        return []
    return sorted({found for path in paths if (found := _first_group(pattern, path))})


def _first_group(pattern: Pattern, text: str) -> str:
    """Of `text` as a path that "/" separates, as of one file's two names; else of it as written."""
    plain = text.replace("\\", "/").removeprefix("./")
    match = pattern.find(plain, "search") or pattern.find(text, "search")
    return (match["1"] or "").strip() if match else ""


def inside(root: Path, path: str, *links: Path) -> Path:
    """The file that `path` names.

    Args:
      root: a folder, links resolved; `path` is relative to it, or absolute and inside it.
      *links: folders, links resolved, that links may lead to as well.

    Raises:
      Refused: it leads out, by a link too; or there is no such file.
    """
    try:
        return locate(path, root, *links)
    except Outside as error:
        raise Refused("path outside the folder", str(error)[:400]) from None
    except InputError:
        raise Refused("missing image", shown(path)[:300]) from None


def _check_texts(raw: Any) -> None:
    """Refuses, anywhere in an entry, a key that is there twice and a text that is no UTF-8."""
    left = [raw]  # not recursive: JSON may be nested more deeply than calls
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if DUPLICATE in value:
                raise Refused("duplicate key", "an object has a key twice; keep one of the two")
            left += value.keys()
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise Refused("not UTF-8", "a text holds bytes or escapes beyond UTF-8") from None


def _turns(said: Iterable[tuple[str, str]]) -> tuple[Turn, ...]:
    """The conversation without its image marks."""
    turns = []
    for n, (role, text) in enumerate(said, 1):
        if _CONTROL.search(text):
            raise Refused("control token", f"turn {n} holds a token of the chat template")
        if other := _OTHER_MARK.search(text):
            raise Refused(
                "image marks", f"turn {n}: {other[0]!r} is none; write <image> or <video>"
            )
        found = bool(_MARK.search(text))
        text = _plain(text)
        if found and role != "user":
            raise Refused("image marks", f"turn {n}: an image mark outside a user's turn")
        if not text and role == "assistant":
            raise Refused("empty answer", f"turn {n}: is empty")
        if not text and role == "user" and not found:
            raise Refused("empty question", f"turn {n}: is empty")
        turns.append(Turn(role, text))
    _check_order([turn.role for turn in turns])
    return tuple(turns)


def _check_order(roles: list[str]) -> None:
    if not roles:
        return
    rest = roles[1:] if roles[0] == "system" else roles
    if not rest or len(rest) % 2 or rest != ["user", "assistant"] * (len(rest) // 2):
        raise Refused("turns", f"the turns are {', '.join(roles[:8])}")


def _plain(text: str) -> str:
    """A text without image marks. Taking one out may make another, or a control token: none of
    either is left, and none is made."""
    text = _MARK.sub("", text).strip()
    if _MARK.search(text):
        raise Refused("image marks", "image marks inside each other")
    if _CONTROL.search(text):
        raise Refused("control token", "a token of the chat template, with an image mark inside")
    return text


def _text(value: Any, name: str) -> str:
    text = text_of(value, name)
    if _CONTROL.search(text):
        raise Refused("control token", f"{name} holds a token of the chat template")
    return text


def _reports(raw: dict[str, Any], turns: Iterable[Turn]) -> tuple[Report, ...]:
    """The reports stated, and filled into them what the description and the answers tell."""
    stated = raw.get("reports", [])
    if not isinstance(stated, list):
        raise Refused("wrong type", "reports must be a list")
    reports = [_report(value, n) for n, value in enumerate(stated, 1)]
    description = _text(raw.get("description") or "", "description").strip()
    if description:
        _fill(reports, Report(language_of(description), caption=description))
    for turn in turns:
        parts = split_report(turn.text) if turn.role == "assistant" else None
        if parts:
            found = Report(language_of(turn.text), findings=parts[0], impression=parts[1])
            _fill(reports, found)
    return tuple(reports)


def _fill(reports: list[Report], found: Report) -> None:
    """Puts what `found` tells where a report of its language tells nothing; adds one if none is."""
    told = {key: text for key in _REPORT_TEXTS if (text := getattr(found, key))}
    for n, report in enumerate(reports):
        if report.language == found.language:
            if not any(getattr(report, key) for key in told):
                reports[n] = dataclasses.replace(report, **told)
            return
    reports.append(found)


def _report(value: Any, n: int) -> Report:
    name = f"reports {n}"
    if not isinstance(value, dict) or value.get("language") not in LANGUAGES:
        raise Refused("wrong type", f"{name}: language must be one of {', '.join(LANGUAGES)}")
    texts = {key: _text(value.get(key) or "", f"{name}: {key}").strip() for key in _REPORT_TEXTS}
    questions = value.get("questions") or []
    if not isinstance(questions, list):
        raise Refused("wrong type", f"{name}: questions must be a list")
    asked = tuple(_question(question, name) for question in questions)
    if not asked and not any(texts.values()):
        raise Refused("no text", f"{name}: is empty")
    return Report(value["language"], questions=asked, **texts)


def _question(value: Any, name: str) -> Question:
    if not isinstance(value, dict):
        raise Refused("wrong type", f"{name}: a question must be an object")
    question = _text(value.get("question"), f"{name}: question").strip()
    answer = _text(value.get("answer"), f"{name}: answer").strip()
    listed = value.get("options") or []
    if not isinstance(listed, list):
        raise Refused("wrong type", f"{name}: options must be a list")
    options = tuple(_text(option, f"{name}: an option").strip() for option in listed)
    if not question:
        raise Refused("empty question", f"{name}: a question is empty")
    if not answer:
        raise Refused("empty answer", f"{name}: an answer is empty")
    if options and (answer not in options or len(set(options)) != len(options)):
        raise Refused("wrong type", f"{name}: an answer must be one of its options, each once")
    return Question(question, answer, options)
