"""Plans as a picture: what fills a chip's memory, and where its end is."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from echovlm_jax.plan.report import GIB

_LEFT, _BAR, _LINE, _WIDTH = 150, 22, 16, 620  # px
# Of one family for each kind of array: a plan has at most four of them and the temporaries.
_COLOURS = ((38, 92, 166), (46, 134, 87), (176, 110, 30), (120, 70, 150), (90, 90, 90))
_OTHER, _END = (170, 170, 170), (200, 30, 30)


def parts(result: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """What lies in a chip's memory at the peak: (kind, group, bytes), the largest of a kind first.

    The compiler's peak less all parameters and the optimizer's state is `temporaries`; a program
    that doesn't fit may have no peak, and then no temporaries.

    Args:
      result: what `plan` gave.
    """
    found = [
        (kind, group, size)
        for kind, groups in result["parameter_bytes_per_chip"].items()
        for group, size in sorted(groups.items(), key=lambda item: -item[1])
    ]
    if peak := result["hbm_per_chip"].get("peak"):
        rest = int(peak) - sum(size for _, _, size in found)
        found += [("temporaries", "", rest)] if rest > 0 else []
    return found


def memory_picture(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Image.Image:
    """Draws a bar for each plan: a kind of array a colour, a group of parameters a piece of it.

    The red line is a chip's memory. A group's name is in its piece where there is room; below each
    bar stand the kinds and their sizes.

    Args:
      results: what `plan` gave, one or more.
      names: a name for each.
    """
    all_parts = [parts(result) for result in results]
    ends = [
        max(sum(size for _, _, size in found), result["hbm_capacity"])
        for found, result in zip(all_parts, results, strict=True)
    ]
    scale = _WIDTH / max(ends)
    height = len(results) * (_BAR + 3 * _LINE) + _LINE
    image = Image.new("RGB", (_LEFT + _WIDTH + 20, height), "white")
    draw = ImageDraw.Draw(image)
    for number, (result, name) in enumerate(zip(results, names, strict=True)):
        top = _LINE + number * (_BAR + 3 * _LINE)
        fits = "fits" if result["fits"] else "DOES NOT FIT"
        draw.text((4, top + 4), f"{name[:22]}", fill="black")
        draw.text((4, top + _BAR + 2), fits, fill="black" if result["fits"] else _END)
        _bar(draw, top, all_parts[number], result["hbm_capacity"], scale)
    return image


def _bar(
    draw: ImageDraw.ImageDraw,
    top: int,
    found: Sequence[tuple[str, str, int]],
    capacity: int,
    scale: float,
) -> None:
    kinds = list(dict.fromkeys(kind for kind, _, _ in found))
    at, label = float(_LEFT), _LEFT
    for kind in kinds:
        colour = _OTHER if kind == "temporaries" else _COLOURS[kinds.index(kind) % len(_COLOURS)]
        total = 0
        pieces = [(group, size) for name, group, size in found if name == kind]
        for number, (group, size) in enumerate(pieces):
            lighter = tuple(min(255, c + 22 * (number % 4)) for c in colour)
            draw.rectangle((at, top, at + size * scale, top + _BAR), fill=lighter)
            if draw.textlength(group) + 4 < size * scale:
                draw.text((at + 3, top + 5), group, fill="white")
            at, total = at + size * scale, total + size
        text = f"{kind} {total / GIB:.2f}"
        draw.text((label, top + _BAR + 2), text, fill=colour)
        label += 8 + int(draw.textlength(text))
    end = _LEFT + capacity * scale
    draw.line((end, top - 4, end, top + _BAR + 4), fill=_END, width=2)
    text = f"{capacity / GIB:.2f} GiB"
    draw.text((end - draw.textlength(text), top - _LINE + 1), text, fill=_END)
