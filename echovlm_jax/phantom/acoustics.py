"""From tissue to grey values: scatterers, point-spread function, attenuation, log compression.

A tissue is a map of how strongly each point scatters and how much sound is lost on the way. Each
sample of each beam holds one random scatterer of complex amplitude; blurred with the pulse (along
the beam) and the beam's width (across, narrowest in the focus), it is fully developed speckle: its
envelope is Rayleigh-distributed (Wagner, Smith, Sandrik and Lopez 1983).

Bytes are to be the same on every machine and with every numpy: the random numbers are sums of a
hash's bytes, levels go through tables, and float32 arrays see additions, products, divisions and
square roots only, which IEEE 754 leaves no choice about.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from echovlm_jax.data.keys import mix

DYNAMIC_RANGE = 62.0  # dB from black to white
MID_GREY = 118.0  # the mean grey of tissue of 0 dB
NOISE_FLOOR = -36.0  # dB at the probe: the amplifier's noise, which the time gain raises with depth


@dataclass
class Tissue:
    """What the beams meet. S samples along each of L beams.

    Attributes:
      x: lateral position, mm, right positive: [S, L], or [1, L] where beams are parallel.
      z: depth below the probe's face, mm: [S, L] or [S, 1].
      step: mm between samples.
      echo: scattering strength in dB; 0 is mid grey. [S, L]
      loss: dB a mm beyond what the time gain makes up for; negative behind fluid. [S, L]
      scatterers: where a scatterer of the tissue at rest is now, as (row, column) of each
        sample, for tissue that moves; None: at rest.
    """

    x: np.ndarray
    z: np.ndarray
    step: float
    echo: np.ndarray
    loss: np.ndarray
    scatterers: tuple[np.ndarray, np.ndarray] | None = None


class Probe(NamedTuple):
    """Parallel beams (half_angle 0) or a fan. Lengths in mm, half_angle in radians."""

    depth: float
    width: float = 0.0  # of parallel beams
    half_angle: float = 0.0
    radius: float = 0.0  # of a fan's curved face
    lateral: float = 1.6  # half width of the beam in the focus, in beams (standard deviation)
    axial: float = 1.1  # of the pulse, in samples
    focus: float = 0.5  # as a share of the depth


def empty_tissue(probe: Probe, height: int, width: int) -> Tissue:
    """Uniform tissue under a probe, sampled as a picture of height x width px needs it."""
    samples = height
    step = probe.depth / samples
    r = (np.arange(samples) + 0.5) * step
    if not probe.half_angle:
        x = ((np.arange(width) + 0.5) / width - 0.5) * probe.width
        shape = (samples, width)
        positions = x[None, :], r[:, None]
    else:
        angles = _angles(probe, _beams(width))
        sine = np.array([math.sin(a) for a in angles])
        cosine = np.array([math.cos(a) for a in angles])
        far = (r + probe.radius)[:, None]
        shape = (samples, len(angles))
        positions = far * sine, far * cosine - probe.radius
    x, z = (p.astype(np.float32) for p in positions)
    return Tissue(x, z, step, np.zeros(shape, np.float32), np.zeros(shape, np.float32))


def _beams(width: int) -> int:
    return max(96, width * 5 // 8)


def _angles(probe: Probe, beams: int) -> list[float]:
    return [((i + 0.5) / beams * 2 - 1) * probe.half_angle for i in range(beams)]


def scatterers(key: int, shape: tuple[int, int]) -> np.ndarray:
    """Complex amplitudes with mean square 1: float32 [2, S, L], real and imaginary parts.

    Each part is the sum of four bytes of a hash: near enough to a normal distribution before the
    blur, which adds dozens of them, and exact.
    """
    bits = mix(key, np.arange(shape[0] * shape[1]))
    pairs = np.uint64(0x00FF00FF00FF00FF)
    sums = (bits & pairs) + (bits >> np.uint64(8) & pairs)  # four sums of two bytes
    sums = (sums & np.uint64(0x0000FFFF0000FFFF)) + (
        sums >> np.uint64(16) & np.uint64(0x0000FFFF0000FFFF)
    )
    parts = np.stack([sums & np.uint64(0xFFFF), sums >> np.uint64(32)])
    # Four bytes have mean 510 and variance 4 (256² - 1) / 12; half of the power each.
    scale = np.float32(1 / math.sqrt(2 * 4 * (256**2 - 1) / 12))
    return ((parts.astype(np.float32) - 510) * scale).reshape(2, *shape)


def blur(field: np.ndarray, axial: float, lateral: np.ndarray) -> np.ndarray:
    """Convolves with Gaussians, along beams and across; keeps the mean square of white noise.

    Args:
      field: float32 [..., S, L].
      axial: standard deviation in samples.
      lateral: the same across beams, in beams, for each depth: [S].
    """
    taps = _gaussian(axial)
    reach = len(taps) // 2
    padded = np.pad(field, ((0, 0),) * (field.ndim - 2) + ((reach, reach), (0, 0)), mode="reflect")
    rows = field.shape[-2]
    out = padded[..., reach : reach + rows, :] * taps[reach]
    for i in range(reach):  # symmetric: one product for two taps
        out += (
            padded[..., i : i + rows, :] + padded[..., 2 * reach - i : 2 * reach - i + rows, :]
        ) * taps[i]
    weights = _gaussians(lateral)
    reach, columns = weights.shape[0] - 1, field.shape[-1]
    padded = np.pad(out, ((0, 0),) * (field.ndim - 1) + ((reach, reach),), mode="reflect")
    out = out * weights[0]
    for i in range(1, reach + 1):
        out += (
            padded[..., reach - i : reach - i + columns]
            + padded[..., reach + i : reach + i + columns]
        ) * weights[i]
    return out


def _gaussian(sigma: float) -> np.ndarray:
    reach = max(1, math.ceil(2.5 * sigma))
    taps = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-reach, reach + 1)]
    norm = math.sqrt(math.fsum(t * t for t in taps))
    return np.array([t / norm for t in taps], np.float32)


def _gaussians(sigmas: np.ndarray) -> np.ndarray:
    """Half kernels for each depth: [reach + 1, S, 1], the middle tap first."""
    reach = max(1, math.ceil(2.2 * float(sigmas.max())))
    ratio = np.arange(reach + 1)[:, None] / sigmas
    taps = np.exp(-0.5 * ratio * ratio)
    power = taps[0] * taps[0]
    for tap in taps[1:]:
        power = power + 2 * tap * tap
    return (taps / np.sqrt(power)).astype(np.float32)[..., None]


_TABLE_STEP = 0.125  # dB
_TABLE_LOW = -96.0


@functools.cache
def _amplitudes() -> np.ndarray:
    count = int(160 / _TABLE_STEP)
    return np.array([10 ** ((_TABLE_LOW + i * _TABLE_STEP) / 20) for i in range(count)], np.float32)


def amplitude(level: np.ndarray) -> np.ndarray:
    """10^(dB / 20) in steps of an eighth of a dB, from -96 to 64 dB: float32."""
    table = _amplitudes()
    index = ((level - np.float32(_TABLE_LOW)) * np.float32(1 / _TABLE_STEP)).astype(np.int32)
    return table[np.clip(index, 0, len(table) - 1)]


@functools.cache
def _mantissas() -> np.ndarray:
    return np.array([10 * math.log10(1 + (i + 0.5) / 2048) for i in range(2048)], np.float32)


def decibels(power: np.ndarray) -> np.ndarray:
    """10 log10 of positive float32 numbers, to 0.002 dB: exponent and mantissa by table."""
    bits = power.view(np.int32)
    octaves = (bits >> 23) - 127
    return octaves * np.float32(10 * math.log10(2)) + _mantissas()[bits >> 12 & 2047]


def beam_levels(tissue: Tissue, probe: Probe, key: int) -> np.ndarray:
    """What the machine shows of each sample, in dB before the window: float32 [S, L].

    The mean level of uniform tissue of e dB is e, at any depth.
    """
    rows, columns = tissue.echo.shape
    level = tissue.echo - np.cumsum(tissue.loss, axis=0) * np.float32(tissue.step)
    field = scatterers(key, (rows, columns))
    depth = (np.arange(rows) + 0.5) / rows
    lateral = probe.lateral * (1 + 1.2 * (depth - probe.focus) * (depth - probe.focus) / 0.25)
    noise = field[:, ::-1, ::-1]  # as random as a second field, and free
    if tissue.scatterers is not None:
        field = field[:, tissue.scatterers[0], tissue.scatterers[1]]
    signal = blur(field * amplitude(level), probe.axial, lateral)
    floor = amplitude((NOISE_FLOOR + 12 * depth).astype(np.float32))[:, None]
    signal += noise * floor
    power = signal[0] * signal[0] + signal[1] * signal[1] + np.float32(1e-9)
    return decibels(power) + np.float32(2.507)  # the mean log of a Rayleigh power is 2.507 dB low


def to_grey(level: np.ndarray, gain: float) -> np.ndarray:
    """dB to grey values 0…255, float32: a straight line within the dynamic range."""
    scale = np.float32(255 / DYNAMIC_RANGE)
    return np.clip((level + np.float32(gain)) * scale + np.float32(MID_GREY), 0, 255)


class Scan(NamedTuple):
    """Where each pixel of a picture [H, W] lies among the beams."""

    index: np.ndarray  # int32 [N]: flat index of the upper left of four neighbours
    down: np.ndarray  # float32 [N]: share of the lower two
    right: np.ndarray  # float32 [N]: share of the right two
    inside: np.ndarray  # int32 [N]: which pixels these are, flat
    scale: float  # px a mm
    top: float  # px of depth 0 in the middle beam


@functools.lru_cache(maxsize=8)
def scan_table(probe: Probe, height: int, width: int) -> Scan:
    """The scan conversion of a fan for a picture of height x width px."""
    samples, beams = height, _beams(width)
    sine, rise = math.sin(probe.half_angle), probe.radius * (1 - math.cos(probe.half_angle))
    half = (probe.radius + probe.depth) * sine
    scale = min(width / (2 * half), height / (probe.depth + rise))
    top = (height - (probe.depth + rise) * scale) / 2 + rise * scale
    x = ((np.arange(width) + 0.5) - width / 2) / scale
    z = ((np.arange(height) + 0.5) - top) / scale + probe.radius
    far = np.sqrt(x * x + (z * z)[:, None])
    row = (far - probe.radius) / probe.depth * samples - 0.5
    angle = np.arctan2(np.broadcast_to(x, far.shape), z[:, None])
    column = (angle / probe.half_angle + 1) / 2 * beams - 0.5
    inside = np.flatnonzero(
        (row >= 0) & (row < samples - 1) & (column >= 0) & (column < beams - 1)
    ).astype(np.int32)
    # To 1/1024 of a sample, so that an arctan's last bit, which machines differ in, is gone.
    row, column = (np.round(p.ravel()[inside] * 1024) / 1024 for p in (row, column))
    r0, c0 = row.astype(np.int32), column.astype(np.int32)
    index = (np.minimum(r0, samples - 2) * beams + np.minimum(c0, beams - 2)).astype(np.int32)
    return Scan(
        index, (row - r0).astype(np.float32), (column - c0).astype(np.float32), inside, scale, top
    )


def scan_convert(grey: np.ndarray, scan: Scan, height: int, width: int) -> np.ndarray:
    """Beams [S, L] to a picture [H, W], bilinear; black outside the fan."""
    flat, beams = grey.ravel(), grey.shape[1]
    upper, lower = flat[scan.index], flat[scan.index + beams]
    upper += (flat[scan.index + 1] - upper) * scan.right
    lower += (flat[scan.index + (beams + 1)] - lower) * scan.right
    out = np.zeros(height * width, np.float32)
    out[scan.inside] = upper + (lower - upper) * scan.down
    return out.reshape(height, width)
