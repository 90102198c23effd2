"""The vocabulary of phantom reports and questions, from `words.json`: (English, Chinese) each."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Pair = Sequence[str]

_WORDS: dict[str, Any] = json.loads(Path(__file__).with_name("words.json").read_text("utf-8"))
ORGANS: dict[str, Pair] = _WORDS["organs"]
DIAGNOSES: dict[str, dict[str, Pair]] = _WORDS["diagnoses"]  # by organ
# The recommendation; an impression is the diagnosis, its place and this.
ADVICE: dict[str, Pair] = _WORDS["advice"]
ATTRIBUTES: dict[str, dict[str, Pair]] = _WORDS["attributes"]
# Normal parts of every exam of an organ, two wordings; and those beside a focal lesion.
SCENES: dict[str, Sequence[Pair]] = _WORDS["scenes"]
OTHERWISE: dict[str, Pair] = _WORDS["otherwise"]
# Findings of an exam without a focal lesion, by organ and diagnosis, and their short form for a
# caption; {size} in mm.
DIFFUSE: dict[str, dict[str, Pair]] = _WORDS["diffuse"]
SIGNS: dict[str, dict[str, Pair]] = _WORDS["signs"]
BEHIND: dict[str, Pair] = _WORDS["behind"]
CALCIUM: dict[str, Pair] = _WORDS["calcium"]
QUESTIONS: dict[str, Sequence[Pair]] = _WORDS["questions"]  # two wordings of each


def noun(organ: str, diagnosis: str) -> Pair:
    """The name of a lesion before it has a diagnosis."""
    nouns = _WORDS["nouns"]
    return nouns.get(organ, {}).get(diagnosis) or nouns.get(organ, {}).get("") or nouns[""][""]
