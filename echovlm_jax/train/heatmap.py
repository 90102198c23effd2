"""The mixture as a picture: for each layer a table of organs by experts."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

CELL, GAP, LABEL, LINE = 18, 10, 92, 14  # pixels; a panel has two lines of text above it


def heatmap(loads: Float[np.ndarray, "L O E"], organs: Sequence[str]) -> Image.Image:
    """Draws which experts the organs' tokens go to.

    Args:
      loads: each organ's shares of choices over the experts: they sum to 1, or are
        not-a-number where an organ had no token (grey). An even load is white, more red, less blue.
      organs: their names.

    Returns:
      A picture with a row of panels, a panel a layer (at most eight panels in a row), a column an
      expert, by its number.
    """
    layers, count, experts = loads.shape
    across = min(layers, 8)
    down = -(-layers // across)
    panel = (experts * CELL + GAP, count * CELL + 2 * LINE + GAP)
    size = (LABEL + across * panel[0], down * panel[1] + GAP)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for layer in range(layers):
        x0 = LABEL + layer % across * panel[0]
        y0 = layer // across * panel[1] + 2 * LINE
        draw.text((x0, y0 - 2 * LINE), f"layer {layer}", fill="black")
        for e in range(experts):
            draw.text((x0 + e * CELL + 5, y0 - LINE), str(e), fill="black")
        for o in range(count):
            if layer % across == 0:
                draw.text((2, y0 + o * CELL + 2), organs[o][:14], fill="black")
            for e in range(experts):
                box = (x0 + e * CELL, y0 + o * CELL, x0 + (e + 1) * CELL - 2, y0 + o * CELL + 16)
                draw.rectangle(box, fill=_colour(float(loads[layer, o, e]), experts))
    return image


def _colour(share: float, experts: int) -> tuple[int, int, int]:
    """Blue below an even load, red above it, grey where there is none."""
    if not np.isfinite(share):
        return (225, 225, 225)
    even = 1 / experts
    if share <= even:
        part = 1 - share / even
        return (round(255 - 190 * part), round(255 - 140 * part), 255)
    part = (share - even) / (1 - even) if experts > 1 else 0.0
    return (255, round(255 - 190 * part), round(255 - 200 * part))
