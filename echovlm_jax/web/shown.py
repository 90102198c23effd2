"""What the page shows, as HTML; every text in it is escaped."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from echovlm_jax.evaluate.mixture import KINDS, Read
from echovlm_jax.web.exam import Exam, as_address, tiles

NOTICE = (
    '<p id="notice" role="note"><strong>Not a medical device.</strong> For research only: not for'
    " diagnosis or treatment. Files stay on the machine that runs this page.</p>"
)
CSS = """
#notice { position: fixed; top: 0; left: 0; right: 0; z-index: 1000; margin: 0; padding: 8px 16px;
  background: #7a1f00; color: #fff; font-size: 14px; line-height: 1.35; text-align: center; }
.gradio-container { padding-top: 64px !important; max-width: 1180px !important; margin: 0 auto; }
.status { margin: 0; padding: 8px 12px; border-radius: 6px; overflow-wrap: anywhere;
  background: var(--background-fill-secondary); }
.status.alert { background: #fde8e4; color: #7a1f00; font-weight: 600; }
.exam { display: flex; flex-wrap: wrap; gap: 8px; margin: 0; padding: 0; list-style: none; }
.exam li { margin: 0; max-width: 100%; }
.exam img { height: 120px; max-width: 100%; object-fit: contain; border-radius: 4px; margin: 0;
  display: inline-block; }
.exam small, .routing caption { color: var(--body-text-color-subdued); }
.scroll { overflow: auto; max-height: 30rem; }
.routing { border-collapse: collapse; font-size: 13px; }
.routing caption { text-align: left; padding-bottom: 6px; }
.routing th, .routing td { padding: 3px 6px; text-align: right; min-width: 2.2em; }
.routing tbody th { text-align: left; font-weight: 500; white-space: pre; position: sticky; left: 0;
  max-width: 9em; overflow: hidden; text-overflow: ellipsis; background: var(--background-fill-primary); }
.routing thead th { position: sticky; top: 0; background: var(--background-fill-primary); }
:focus-visible { outline: 3px solid #0b5cad !important; outline-offset: 2px; }
"""
ALL_LAYERS = "all layers"


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
        what += f", {len(picture)} frames of a loop" if picture.ndim == 4 else ""
        images = "".join(f'<img src="{tile}" alt="picture {what}">' for tile in tiles(picture))
        items.append(f"<li>{images}<br><small>{what}</small></li>")
    lines = "".join(status(line, alert=True) for line in exam.warnings)
    return f'{lines}<ul class="exam">{"".join(items)}</ul>'


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
        f'<div class="scroll" tabindex="0" role="region" aria-label="routing"><table class="routing">'
        f"<caption>{escape(caption)}</caption>"
        f'<thead><tr><th scope="col">token</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(share: float) -> str:
    colour = f"rgb({255 - 215 * share:.0f},{255 - 155 * share:.0f},{255 - 75 * share:.0f})"
    ink = "#fff" if share > 0.6 else "#111"
    return f'<td style="background:{colour};color:{ink}">{100 * share:.0f}</td>'
