"""Cases for the report: which exams to show, where two texts differ, and small pictures."""

import base64
import difflib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

MOST_CASES = 30  # in one report: at most a hundred small pictures
PER_ORGAN = 3
# Of a text, where differences are looked for: difflib takes their square, or worse.
MOST_TOKENS = 600
SIDE, VIEWS = 320, 4  # px of a thumbnail's longer side; pictures of one exam
_QUALITY = 62  # of JPEG: speckle is costly, and these are small

# What sacrebleu calls Chinese is split into characters; the rest into words and single signs.
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+(?:[.'’-][^\W_{_HAN}]+)*|[^\w\s]|_")


@dataclass(frozen=True)
class Case:
    """A case that is in no split: the model's answer to given images.

    Attributes:
      name: a title of a few words; no patient's data.
      images: uint8 RGB [H, W, 3], of a loop [T, H, W, 3].
      note: a remark for the reader, such as that the model never learned from its like.
      reference: the right answer; empty if unknown.
    """

    name: str
    images: Sequence[np.ndarray]
    question: str
    prediction: str
    note: str
    reference: str = ""


class Chosen(NamedTuple):
    """An exam to show."""

    organ: str
    rank: str  # "best", "median" or "worst" of its organ's exams; "only" where there is one
    score: float | None  # 0..1: mean token F1 of its reports; without any, share of right answers
    record: int
    samples: list[Mapping[str, Any]]  # its lines of predictions.jsonl, reports first


class Piece(NamedTuple):
    """A run of text, and whether the other text lacks it."""

    text: str
    marked: bool


def tokens(text: str) -> list[str]:
    """Han characters one by one, words of other scripts, signs one by one; no spaces."""
    return _TOKEN.findall(text)


def token_f1(reference: str, prediction: str) -> float:
    """2 · common / (both lengths), over multisets of tokens, case aside: 0..1; 1 for two empty."""
    a, b = (Counter(tokens(text.lower())) for text in (reference, prediction))
    both = a.total() + b.total()
    return 2 * (a & b).total() / both if both else 1.0


def marked(reference: str, prediction: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces that together are the texts; marked: not in the other, in that order.

    Only the first MOST_TOKENS tokens of each are compared; what is after them is not marked.
    """
    found = [list(_TOKEN.finditer(text))[:MOST_TOKENS] for text in (reference, prediction)]
    words = [[match.group().lower() for match in one] for one in found]
    blocks = difflib.SequenceMatcher(None, *words, autojunk=False).get_matching_blocks()
    out = []
    for side, text in enumerate((reference, prediction)):
        same = {block[side] + i for block in blocks for i in range(block.size)}
        out.append(_pieces(text, found[side], same))
    return out[0], out[1]


def _pieces(text: str, found: Sequence[re.Match[str]], same: set[int]) -> list[Piece]:
    """Neighbours of one kind are one piece; a space between two marked words is marked too."""
    out: list[Piece] = []
    at = 0
    for i, match in enumerate(found):
        mark = i not in same
        gap = text[at : match.start()]
        if out and out[-1].marked == mark:
            out[-1] = Piece(out[-1].text + gap + match.group(), mark)
        elif gap and not mark:
            out.append(Piece(gap + match.group(), mark))
        else:
            out += [Piece(gap, False)] * bool(gap) + [Piece(match.group(), mark)]
        at = match.end()
    return [*out, *[Piece(text[at:], False)] * bool(text[at:])]


def choose(predictions: Sequence[Mapping[str, Any]]) -> list[Chosen]:
    """Of each organ the exams with the best, the median and the worst score.

    Fewer of each where there are more than MOST_CASES / PER_ORGAN organs. The same predictions
    give the same cases: equal scores go by the exam's number.
    """
    exams: dict[str, dict[int, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in predictions:
        exams[str(line["organ"])][line["record"]].append(line)
    each = max(1, min(PER_ORGAN, MOST_CASES // max(len(exams), 1)))
    out = []
    for organ in sorted(exams)[:MOST_CASES]:
        scored = [(_score(samples), record) for record, samples in exams[organ].items()]
        scored.sort(key=lambda pair: (-1.0 if pair[0] is None else pair[0], -pair[1]))
        places = {len(scored) - 1: "best", 0: "worst", (len(scored) - 1) // 2: "median"}
        if len(scored) < 3:
            places = {len(scored) - 1: "best", 0: "worst"} if len(scored) == 2 else {0: "only"}
        order = sorted(places, key=lambda place: ("only best worst median").index(places[place]))
        for place in sorted(order[:each], reverse=True):
            score, record = scored[place]
            samples = sorted(exams[organ][record], key=lambda line: line["kind"] != "report")
            out.append(Chosen(organ, places[place], score, record, samples))
    return out


def _score(samples: Sequence[Mapping[str, Any]]) -> float | None:
    scores = [
        token_f1(line["reference"], line["prediction"])
        for line in samples
        if line["kind"] == "report"
    ] or [float(line["correct"]) for line in samples if line["correct"] is not None]
    return sum(scores) / len(scores) if scores else None


def thumbnails(images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """The first VIEWS images as JPEG data URIs (`src`) with `width`, `height` (px) and `frames`
    (0: an image; of a loop its middle frame is shown).

    Args:
      images: uint8 RGB [H, W, 3] or [T, H, W, 3].
    """
    out = []
    for pixels in images[:VIEWS]:
        frames = len(pixels) if pixels.ndim == 4 else 0
        picture = Image.fromarray(np.ascontiguousarray(pixels[frames // 2] if frames else pixels))
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        red, green, blue = np.moveaxis(np.asarray(picture), -1, 0)
        if np.array_equal(red, green) and np.array_equal(green, blue):
            picture = picture.convert("L")
        file = io.BytesIO()
        picture.save(file, "jpeg", quality=_QUALITY, optimize=True)
        source = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        out.append({"src": source, "width": picture.width, "height": picture.height})
        out[-1]["frames"] = frames
    return out
