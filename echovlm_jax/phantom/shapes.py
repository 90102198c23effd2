"""Shapes that tissue is made of: signed distances, layers, tubes, soft noise, lesions.

Distances are in mm, negative inside, and right near the edge only, which is all that is needed.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from echovlm_jax.data.keys import mix, uniform
from echovlm_jax.phantom.acoustics import Tissue
from echovlm_jax.phantom.exam import Lesion, between, stream

FLUID = -60.0  # dB: nothing scatters; what shows is the amplifier's noise
POSTERIOR = {"none": 0.0, "enhancement": -10.0, "shadow": 20.0}  # dB lost on the way through


def fill(
    tissue: Tissue, inside: np.ndarray, echo: float | np.ndarray, loss: float | None = None
) -> None:
    """Makes a region of one tissue. A loss of None leaves what is there."""
    np.copyto(
        tissue.echo, np.float32(echo) if isinstance(echo, float | int) else echo, where=inside
    )
    if loss is not None:
        np.copyto(tissue.loss, np.float32(loss), where=inside)


def band(tissue: Tissue, top: float, bottom: float) -> Tissue:
    """The tissue between two depths, under parallel beams: painting it paints the whole."""
    rows = slice(max(int(top / tissue.step), 0), max(int(bottom / tissue.step), 0))
    return Tissue(tissue.x, tissue.z[rows], tissue.step, tissue.echo[rows], tissue.loss[rows])


def outline(tissue: Tissue, distance: np.ndarray, width: float, echo: float) -> None:
    """A bright (or dark) edge of so many mm along distance 0."""
    fill(tissue, np.abs(distance) < width / 2, echo)


def rough(key: int, shape: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """Soft noise in [-1, 1], float32 [S, L], with so many cells down and across."""
    rows, columns = cells[0] + 1, cells[1] + 1
    grid = (uniform(mix(key, np.arange(rows * columns))) * 2 - 1).astype(np.float32)
    out = grid.reshape(rows, columns)
    for axis, (size, count) in enumerate(zip(shape, cells, strict=True)):
        at = (np.arange(size) + 0.5) * (count / size)
        low = at.astype(np.int64)
        t = (at - low).astype(np.float32)
        t = t * t * (3 - 2 * t)
        t = t[:, None] if axis == 0 else t
        a, b = np.take(out, low, axis), np.take(out, low + 1, axis)
        out = a + (b - a) * t
    return out


def wave(key: int, x: np.ndarray, length: float, height: float) -> np.ndarray:
    """A gentle undulation over x (mm), of about that wavelength and height: shape of x."""
    draws = stream(key)
    out = np.zeros(x.shape)
    for share, part in ((1.0, 0.6), (0.45, 0.4)):
        turns = 2 * math.pi * next(draws)
        out += (
            part * height * np.sin(x.astype(np.float64) * (2 * math.pi / (length * share)) + turns)
        )
    return out.astype(np.float32)


def ellipse(
    tissue: Tissue, cx: float, cz: float, a: float, b: float, turn: float = 0.0
) -> np.ndarray:
    """Signed distance to an ellipse of half axes a (across) and b, turned by radians."""
    x, z = tissue.x - np.float32(cx), tissue.z - np.float32(cz)
    if turn:
        c, s = np.float32(math.cos(turn)), np.float32(math.sin(turn))
        x, z = x * c + z * s, z * c - x * s
    x, z = x * np.float32(1 / a), z * np.float32(1 / b)
    return (np.sqrt(x * x + z * z) - 1) * np.float32(min(a, b))


def tube(tissue: Tissue, points: Sequence[tuple[float, float, float]]) -> np.ndarray:
    """Signed distance to a vessel through points (x, z, radius)."""
    best: np.ndarray | None = None
    for (x0, z0, r0), (x1, z1, r1) in itertools.pairwise(points):
        dx, dz = x1 - x0, z1 - z0
        x, z = tissue.x - np.float32(x0), tissue.z - np.float32(z0)
        length = dx * dx + dz * dz
        t = np.clip(x * np.float32(dx / length) + z * np.float32(dz / length), 0, 1)
        x, z = x - t * np.float32(dx), z - t * np.float32(dz)
        d = np.sqrt(x * x + z * z) - (np.float32(r0) + t * np.float32(r1 - r0))
        best = d if best is None else np.minimum(best, d)
    assert best is not None
    return best


def wobbly(
    tissue: Tissue,
    cx: float,
    cz: float,
    a: float,
    b: float,
    waves: Sequence[tuple[int, float]],
    key: int,
) -> np.ndarray:
    """Signed distance to an ellipse whose radius varies by (times round, share) waves."""
    u, v = (
        (tissue.x - np.float32(cx)) * np.float32(1 / a),
        (tissue.z - np.float32(cz)) * np.float32(1 / b),
    )
    r = np.sqrt(u * u + v * v) + np.float32(1e-6)
    c1, s1 = u / r, v / r
    c, s, turns = c1, s1, 1
    radius = np.ones_like(r)
    draws = stream(key)
    for times, share in waves:
        while turns < times:  # cos and sin of one more angle, without any call of them
            c, s, turns = c * c1 - s * s1, s * c1 + c * s1, turns + 1
        phase = 2 * math.pi * next(draws)
        radius += c * np.float32(share * math.cos(phase)) + s * np.float32(share * math.sin(phase))
    return (r / radius - 1) * np.float32(min(a, b))


_WAVES = {
    "round": (),
    "oval": (),
    "regular": (),
    "irregular": ((2, 0.1), (3, 0.16), (5, 0.1)),
}
_SPIKES = ((2, 0.06), (4, 0.1), (9, 0.15), (11, 0.1))
_SPECKS = ((-0.15, -0.45), (0.45, 0.1), (-0.45, 0.15), (0.1, 0.5), (0.05, 0.0))


def half_axes(size: float, lesion: Lesion) -> tuple[float, float]:
    """Half axes across and down, of a lesion whose longest diameter is `size`."""
    ratio = {"round": 0.94, "irregular": 0.84}.get(lesion.shape, 0.66)
    if lesion.orientation:
        ratio = 0.9 if lesion.shape == "round" else 0.66
    long, short = size / 2, size / 2 * ratio
    return (short, long) if lesion.orientation == "taller" else (long, short)


def add_lesion(
    tissue: Tissue, lesion: Lesion, size: float, cx: float, cz: float, around: float
) -> None:
    """Puts a lesion of `size` mm at (cx, cz) into tissue of `around` dB."""
    a, b = half_axes(size, lesion)
    waves = _SPIKES if lesion.margin == "spiculated" else _WAVES[lesion.shape]
    d = ellipse(tissue, cx, cz, a, b)
    if waves:
        d = wobbly(tissue, cx, cz, a, b, waves, lesion.key)
    inside = d < 0
    through = POSTERIOR[lesion.posterior] / (2 * b)
    echo = {
        "anechoic": FLUID, "hypoechoic": around - 16.0, "isoechoic": around + 2.0,
        "hyperechoic": around + 11.0, "mixed": around + 5.0,
    }[lesion.echo]  # fmt: skip
    if lesion.margin == "clear":
        fill(tissue, inside, echo, through)
    else:  # fades over a part of its radius
        soft = np.float32(1 / ((0.2 if lesion.margin == "spiculated" else 0.35) * min(a, b)))
        share = np.clip(np.float32(0.5) - d * soft, 0, 1)
        tissue.echo += (np.float32(echo) - tissue.echo) * share
        fill(tissue, inside, tissue.echo, through)
    edge = max(0.045 * size, 1.5 * tissue.step)
    if lesion.echo == "anechoic":
        outline(tissue, d - np.float32(edge / 2), edge, around + 7.0)
    elif lesion.echo in ("isoechoic", "hyperechoic") and lesion.orientation:
        outline(tissue, d, 2 * edge, around - 14.0)  # the halo of a benign nodule
    elif lesion.shape == "irregular":
        texture = rough(lesion.key, tissue.echo.shape, (24, 24))
        fill(tissue, inside, tissue.echo + texture * np.float32(5))
    if lesion.echo == "mixed":
        _cavities(tissue, lesion, a, b, cx, cz)
    if lesion.calcification == "punctate":
        for u, v in _SPECKS:
            dot = max(0.02 * size, 0.8 * tissue.step)
            fill(tissue, ellipse(tissue, cx + u * a, cz + v * b, dot, dot) < 0, around + 21.0)
    elif lesion.calcification == "coarse":
        add_calcification(tissue, cx, cz - 0.1 * b, 0.42 * a, around)


def _cavities(tissue: Tissue, lesion: Lesion, a: float, b: float, cx: float, cz: float) -> None:
    """Fluid parts of a mixed mass."""
    draws = stream(lesion.key, 1)
    for u, v, r in ((-0.35, -0.1, 0.33), (0.35, 0.15, 0.38), (0.0, 0.5, 0.2)):
        x, z = cx + u * a + between(draws, -1, 1) * 0.08 * a, cz + v * b
        fill(tissue, ellipse(tissue, x, z, r * a, r * b) < 0, FLUID)


def add_calcification(tissue: Tissue, cx: float, cz: float, half: float, around: float) -> None:
    """A bright cap with a shadow behind: `half` mm to either side of (cx, cz)."""
    cap = ellipse(tissue, cx, cz, half, max(0.5 * half, 1.6 * tissue.step)) < 0
    thick = 2 * max(0.5 * half, 1.6 * tissue.step)
    fill(tissue, cap, around + 24.0, 32.0 / thick)
