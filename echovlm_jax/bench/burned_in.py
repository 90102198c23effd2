"""How much of the text that is drawn into phantoms `processing.burned_in` finds, and what it takes
for text that is none."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from echovlm_jax.data.record import ORGANS
from echovlm_jax.errors import InputError
from echovlm_jax.phantom.exam import make_exam
from echovlm_jax.phantom.render import HEADER, RULER, render
from echovlm_jax.processing.burned_in import Box, blacken, engine, found

CAPS = (8, 10, 14, 20, 28, 40)  # px: the height of a capital letter
INKS = {"white": (255, 255, 255), "yellow": (255, 220, 60), "grey": (170, 170, 170)}
PLACES = ("on black", "over speckle")
CONTRAST = 3.0  # what WCAG 2.2 asks of large text (1.4.3)
_FONTS = ("/usr/share/fonts", "/usr/local/share/fonts")
_LATIN = (
    "DejaVuSans.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif-Bold.ttf",
    "LiberationSans-Regular.ttf",
)
_CHINESE = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc")
_SIZES = ((240, 320), (480, 640), (600, 800), (768, 1024))  # px, of the scan
_BORDER = (64, 96)  # px of black around it, above and below, left and right
_SURNAMES = ("SMITH", "Nguyen", "Garcia", "KOWALSKI", "Okafor", "Ivanova", "Rossi", "JENSEN")
_ACCENTED = ("MÜLLER", "José Núñez", "Dvořák", "Łukasz", "GONÇALVES", "Åsa Björk", "Zoë", "Đặng")
_GIVEN = ("John", "Maria", "ANNA", "Li", "Pierre", "Olga", "Wei", "Tunde")
_CHARACTERS = (
    "王李张刘陈杨赵黄周吴欧阳徐孙马朱胡林郭何高罗伟芳娜敏静丽强磊军洋勇艳杰涛明超秀兰霞平刚桂英"
)


class Text(NamedTuple):
    """A text that was drawn."""

    kind: str
    cap: int
    ink: str  # and what it is on
    legible: bool  # `CONTRAST` at least between its ink and what it is on, on average
    drawn: np.ndarray  # bool [H, W]: its strokes


def bench_burned_in(
    images: int = 24, *, seed: int = 0, fonts: Sequence[str | Path] = _FONTS
) -> dict[str, Any]:
    """Draws two texts into each of so many phantoms, one on the black around the scan and one over
    speckle, and looks for them; and looks at half as many without any, and with a scale.

    Args:
      images: number of phantoms with text.
      seed: number that everything follows from.
      fonts: folders of fonts; Pillow's own is always there. Without a Chinese one, no Chinese.

    Returns:
      texts; found, the share of them of whose strokes at least half are in a box; hidden, that of
      whose strokes 95 % are black where these boxes are masked; by_legible, by_cap, by_kind and
      by_ink, of each the same; false_alarms: of plain phantoms, and of those with a scale, the
      share with a box; seconds (of one core, median of the images); fonts, engine.

    Raises:
      InputError: the OCR packages are not installed.
    """
    if images < 1:
        raise InputError(f"images must be at least 1, found {images}")
    using, chances = engine(), np.random.default_rng(seed)
    latin, chinese = ["", *_find(fonts, _LATIN)], _find(fonts, _CHINESE)
    rows: list[tuple[Text, bool, bool]] = []
    seconds: list[float] = []
    for n in range(images):
        picture, scan = _screen(seed, n)
        texts = []
        for m, place in enumerate(PLACES):
            cap = CAPS[(n + 3 * m) % len(CAPS)]
            texts.append(_write(picture, scan, (place, cap), (latin, chinese), chances))
        start = time.process_time()
        boxes = found(picture)
        seconds.append(time.process_time() - start)
        black = (blacken(picture[None], boxes)[0] == 0).all(axis=-1)
        inside = np.zeros(picture.shape[:2], bool)
        for box in boxes:
            inside[box.top : box.bottom, box.left : box.right] = True
        for text in texts:
            strokes = text.drawn
            rows.append(
                (text, bool(inside[strokes].mean() >= 0.5), bool(black[strokes].mean() >= 0.95))
            )
    alarms = {"plain": 0, "scale": 0}
    clean = max(1, images // 2)
    for kind in alarms:
        for n in range(clean):
            picture, scan = _screen(seed, images + n)
            if kind == "scale":
                _scale(picture, scan, latin, chances)
            alarms[kind] += bool(found(picture))
    return {
        "what": "text drawn into phantoms, found by OCR",
        "images": images,
        "seed": seed,
        **_shares(rows),
        "by_legible": _by(rows, "legible"),
        "by_cap": _by(rows, "cap"),
        "by_kind": _by(rows, "kind"),
        "by_ink": _by(rows, "ink"),
        "false_alarms": {kind: count / clean for kind, count in alarms.items()},
        "clean_images": clean,
        "seconds": float(np.median(seconds)),
        "fonts": [Path(font).name if font else "Pillow's" for font in (*latin, *chinese)],
        "engine": using,
    }


def _find(folders: Sequence[str | Path], names: Sequence[str]) -> list[str]:
    """The fonts of these names that are in the folders."""
    there = {path.name: str(path) for folder in folders for path in Path(folder).rglob("*.tt[fc]")}
    return [there[name] for name in names if name in there]


def _screen(seed: int, n: int) -> tuple[np.ndarray, Box]:
    """Phantom `n` without its label, on the black of a machine's screen; and where its scan is."""
    height, width = _SIZES[n % len(_SIZES)]
    exam = make_exam(seed * 10**6 + n, ORGANS[n % len(ORGANS)], cine=0.0)
    view = exam.views[0]._replace(frames=0, height=height + HEADER, width=width + RULER)
    scan = render(exam, view)[HEADER:, :width]
    above, left = _BORDER
    picture = np.pad(scan, ((above, above), (left, left), (0, 0)))
    return picture, Box(above, above + height, left, left + width)


def _write(
    picture: np.ndarray,
    scan: Box,
    how: tuple[str, int],
    fonts: tuple[list[str], list[str]],
    chances: np.random.Generator,
) -> Text:
    """Draws a text into the picture, in place."""
    (place, cap), (latin, chinese) = how, fonts
    kind = str(chances.choice(["latin", "accented", "id", "date", *["chinese"] * bool(chinese)]))
    text = _words(kind, chances)
    font = _font(str(chances.choice(chinese if kind == "chinese" else latin)), cap)
    while font.getbbox(text)[2] > picture.shape[1] - 16:
        text = text[:-1].strip()
    x0, y0, x1, y1 = font.getbbox(text)
    height, width = int(y1 - y0), int(x1 - x0)
    top, left = _corner(picture, scan, height, width, chances)
    if place == "over speckle":
        top, left = _brightest(picture, scan, height, width, chances)
    alpha = Image.new("L", (picture.shape[1], picture.shape[0]))
    ImageDraw.Draw(alpha).text((left - x0, top - y0), text, fill=255, font=font)
    strokes = np.asarray(alpha)
    ink = str(chances.choice(list(INKS)))
    ground = picture[top : top + height, left : left + width].reshape(-1, 3)
    legible = _contrast(np.array(INKS[ink]), ground) >= CONTRAST
    share = strokes[..., None] / np.float32(255)
    picture[:] = np.round(picture * (1 - share) + np.array(INKS[ink]) * share)
    return Text(kind, cap, f"{ink} {place}", legible, strokes > 128)


def _contrast(ink: np.ndarray, ground: np.ndarray) -> float:
    """WCAG's contrast ratio of a colour (uint8 [3]) and the mean of others ([N, 3])."""

    def luminance(colours: np.ndarray) -> np.ndarray:
        x = colours / 255
        linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
        return linear @ np.array([0.2126, 0.7152, 0.0722]) + 0.05

    of = sorted((float(luminance(ink)), float(luminance(ground).mean())))
    return of[1] / of[0]


def _words(kind: str, chances: np.random.Generator) -> str:
    def one(of: Sequence[str]) -> str:
        return str(chances.choice(list(of)))

    day, month, year = (int(chances.integers(*ends)) for ends in ((1, 29), (1, 13), (1930, 2020)))
    number = "".join(one("0123456789") for _ in range(int(chances.integers(6, 10))))
    forms = {
        "latin": ("{0}, {1}", "{1} {0}", "{0}^{1}"),
        "accented": ("{2}", "{2}, {1}"),
        "chinese": ("{3}", "{3} {4}"),
        "id": ("ID {5}", "MRN: {5}", "{5}", "P-{5}"),
        "date": ("{6:02}/{7:02}/{8}", "{8}-{7:02}-{6:02}", "{6:02}.{7:02}.{8}", "{8}{7:02}{6:02}"),
    }
    name = "".join(one(_CHARACTERS) for _ in range(int(chances.integers(2, 4))))
    words = (one(_SURNAMES), one(_GIVEN), one(_ACCENTED), name, f"{year}年{month}月{day}日", number)
    return one(forms[kind]).format(*words, day, month, year)


def _font(path: str, cap: int) -> Any:
    """Of which a capital letter is `cap` px high."""

    def make(size: float) -> Any:
        return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)

    _, top, _, bottom = make(200).getbbox("H")
    return make(200 * cap / (bottom - top))


def _corner(
    picture: np.ndarray, scan: Box, height: int, width: int, chances: np.random.Generator
) -> tuple[int, int]:
    """(top, left) of a text in one of the picture's corners, on the black."""
    bottom, right = picture.shape[0] - height - 4, picture.shape[1] - width - 4
    return int(chances.choice([4, bottom])), int(chances.choice([4, right]))


def _brightest(
    picture: np.ndarray, scan: Box, height: int, width: int, chances: np.random.Generator
) -> tuple[int, int]:
    """(top, left) of a text in the scan, where of ten places there is most speckle."""
    tries = []
    for _ in range(10):
        top = int(chances.integers(scan.top, max(scan.top + 1, scan.bottom - height)))
        left = int(chances.integers(scan.left, max(scan.left + 1, scan.right - width)))
        left = max(4, min(left, picture.shape[1] - width - 4))
        tries.append(
            (float((picture[top : top + height, left : left + width] > 20).mean()), top, left)
        )
    return max(tries)[1:]


def _scale(
    picture: np.ndarray, scan: Box, latin: Sequence[str], chances: np.random.Generator
) -> None:
    """Draws what machines draw beside a scan and what names nobody, in place: depth marks with
    numbers, a bar of greys, settings in units, a mark of orientation."""
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    font = _font(str(chances.choice(list(latin))), int(chances.choice([8, 10, 12, 14])))
    depth, step = int(chances.choice([4, 8, 12, 16, 20])), int(chances.choice([1, 2, 5]))
    for mark in range(0, depth + 1):
        y = scan.top + (scan.bottom - scan.top - 1) * mark // depth
        draw.line((scan.right + 4, y, scan.right + 9, y), fill=(200, 200, 200))
        if mark % step == 0:
            draw.text((scan.right + 14, y - 6), str(mark), fill=(220, 220, 220), font=font)
    for y in range(128):
        level = 255 - 2 * y
        draw.line((8, scan.top + y, 20, scan.top + y), fill=(level, level, level))
    settings = [f"{depth} cm", "3.5 MHz", "MI 1.2", "TIS 0.4", "56 fps", "65 dB", "100%"]
    x = 8
    for n, setting in enumerate(settings[: 2 + int(chances.integers(5))]):
        draw.text((x, 6 + n % 2 * 24), setting, fill=(220, 220, 220), font=font)
        x += (n % 2) * 130
    draw.text((scan.left + 8, scan.top - 20), "P", fill=(80, 200, 255), font=font)
    picture[:] = np.asarray(canvas)


def _by(rows: list[tuple[Text, bool, bool]], field: str) -> dict[str, Any]:
    values = list(dict.fromkeys(getattr(text, field) for text, _, _ in rows))
    return {
        str(value): _shares([row for row in rows if getattr(row[0], field) == value])
        for value in (sorted(values) if field == "cap" else values)
    }


def _shares(rows: list[tuple[Text, bool, bool]]) -> dict[str, Any]:
    _, seen, black = zip(*rows, strict=True)
    return {
        "texts": len(rows),
        "found": float(np.mean(seen)),
        "hidden": float(np.mean(black)),
    }
