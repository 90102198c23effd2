"""What the page shows, as HTML; every text in it is escaped."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from echovlm_jax.evaluate.mixture import KINDS, Read
from echovlm_jax.generate.likeliest import Answer
from echovlm_jax.web.exam import Exam, as_address, tiles

NOTICE = (
    '<p id="notice" role="note"><strong>Not a medical device.</strong> For research only: not for'
    " diagnosis or treatment. Files stay on the machine that runs this page.</p>"
)
ALL_LAYERS = "all layers"
_RARE = 0.005  # an answer below it is not named


def status(line: str, alert: bool = False) -> str:
    """One line about what is going on, that screen readers say."""
    kind, role = ("status alert", "alert") if alert else ("status", "status")
    return f'<p class="{kind}" role="{role}">{escape(line)}</p>'


def exam_html(exam: Exam) -> str:
    """The pictures of an exam and what to warn of."""
    items = []
    for number, picture in enumerate(exam.pictures, 1):
        height, width = picture.shape[-3:-1]
        what = f"{number}: {width} × {height}"
        what += f", {len(picture)} frames taken of a loop" if picture.ndim == 4 else ""
        images = "".join(f'<img src="{tile}" alt="picture {what}">' for tile in tiles(picture))
        items.append(f"<li>{images}<br><small>{what}</small></li>")
    lines = "".join(status(line, alert=True) for line in exam.warnings)
    return f'{lines}<ul class="exam">{"".join(items)}</ul>'


def diagnoses_html(found: Sequence[Answer]) -> str:
    """Diagnoses with their probabilities as bars, the likeliest first; rare ones are summed up."""
    kept = [one for n, one in enumerate(found) if n == 0 or one.probability >= _RARE]
    rows = [("", one.text or "no text", one.probability) for one in kept]
    rows.append(("rest", "other answers", max(0.0, 1 - sum(one.probability for one in kept))))
    body = "".join(
        f'<tr class="{kind}"><th scope="row">{escape(text)}'
        f'<i style="width:{100 * share:.1f}%"></i></th><td>{100 * share:.0f} %</td></tr>'
        for kind, text, share in rows
    )
    return f'<table class="diagnoses"><tbody>{body}</tbody></table>'


def pictures_html(images: Sequence[Image.Image]) -> str:
    """Pictures side by side, in which red is what an answer depends on."""
    items = "".join(
        f'<li><img src="{as_address(image, image.height)}" alt="picture {number}, what the answer'
        ' depends on in red"></li>'
        for number, image in enumerate(images, 1)
    )
    return (
        "<p>Red: without this part the answer becomes less likely. It is no proof of a reason.</p>"
        f'<ul class="exam">{items}</ul>'
    )


def layers_of(model: Any) -> list[str]:
    """What may be chosen of `routing_html`."""
    return [ALL_LAYERS, *(f"layer {n}" for n in range(model.config.text.num_layers))]


def routing_html(read: Read, tokenizer: Any, experts: int, layer: str) -> str:
    """Which experts answered, as a table: a row for each kind of token and each of the answer's.

    Args:
      read: what `read_answer` gave.
      tokenizer: the model's.
      experts: how many a layer has.
      layer: one of `layers_of`.
    """
    chosen = read.expert if layer == ALL_LAYERS else read.expert[[int(layer.split()[1])]]
    # [T, E]: of the choices that a token made in these layers.
    share = (chosen[..., None] == np.arange(experts)).mean(axis=(0, 2))
    rows = []
    for kind, name in enumerate(KINDS):
        own = read.kind == kind
        if own.any():
            rows.append((f"{name}, {own.sum()} tokens", share[own].mean(axis=0)))
    for at in np.flatnonzero(read.kind == KINDS.index("answer")):
        text = tokenizer.decode([int(read.tokens[at])])
        rows.append((text if text.strip() else "␣", share[at]))
    head = "".join(f'<th scope="col">{expert}</th>' for expert in range(experts))
    body = "".join(
        f'<tr><th scope="row" title="{escape(name)}">{escape(name)}</th>'
        + "".join(_cell(float(value)) for value in values)
        + "</tr>"
        for name, values in rows
    )
    weight = float(read.coefficient.mean())
    caption = (
        f"Choices of each token among the experts, in % ({layer}). The mixture's weight beside the"
        f" dense path: {weight:.2f}."
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="routing">'
        f'<p>{escape(caption)}</p><table class="routing">'
        f'<thead><tr><th scope="col">token</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(share: float) -> str:
    colour = f"rgb({255 - 215 * share:.0f},{255 - 155 * share:.0f},{255 - 75 * share:.0f})"
    ink = "#fff" if share > 0.6 else "#111"
    return f'<td style="background:{colour};color:{ink}">{100 * share:.0f}</td>'
