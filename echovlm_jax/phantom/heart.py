"""The heart in the apical four-chamber view, beating. Lengths in mm."""

import math
from typing import NamedTuple

import numpy as np

from echovlm_jax.data.keys import mix
from echovlm_jax.phantom.acoustics import Probe, Tissue
from echovlm_jax.phantom.exam import Exam, View, between, stream
from echovlm_jax.phantom.shapes import FLUID, add_lesion, ellipse, fill, outline, rough, tube

RING = 100.0  # depth of the plane of the valves at the end of filling
NORMAL_SQUEEZE = 0.33  # of its width, at the end of emptying
FAN = 0.72  # radians: half the angle of the fan


class Chambers(NamedTuple):
    """Sizes at the end of filling."""

    wall: float  # of the left ventricle
    left: float  # the left ventricle's half width
    length: float  # its half length
    squeeze: float  # the share of its width that it loses in systole


def chambers(exam: Exam) -> Chambers:
    if exam.diagnosis == "hypertrophy":
        return Chambers(float(exam.size), 15.0, 34.0, 0.36)
    if exam.diagnosis == "dilated":
        return Chambers(7.0, exam.size / 2, 39.0, 0.08)
    return Chambers(9.0, 22.0, 36.0, NORMAL_SQUEEZE)


def heart_probe(key: int, height: int, width: int) -> Probe:
    depth = between(stream(key, 1), 158, 168)
    return Probe(depth, half_angle=FAN, radius=6.0, lateral=1.4, axial=1.3, focus=0.6)


def paint_heart(tissue: Tissue, exam: Exam, view: View, phase: float) -> None:
    """Apex on top, the left chambers on the right of the picture.

    Args:
      phase: 0 = the end of filling, 0.5 = the end of emptying; periodic in 1.
    """
    draws, pose = stream(exam.key, 70), stream(view.key, 70)
    shape = tissue.echo.shape
    texture = rough(int(mix(view.key, 71)), shape, (20, 16))
    heart = chambers(exam)
    dx, dz = between(pose, -3, 3), between(pose, -3, 3)
    if view.plane == "second":  # the same cut, from a little nearer the apex
        dz -= 6
    empty = 0.5 - 0.5 * math.cos(2 * math.pi * phase)
    squeeze = 1 - heart.squeeze * empty
    ring = (
        RING + dz - 10 * (heart.squeeze / NORMAL_SQUEEZE) * empty
    )  # comes towards the apex in systole
    septum = dx + 3.0 - 0.55 * (heart.left - 22) - 0.8 * (heart.wall - 9)
    fill(tissue, tissue.z >= 0, -13 + 8 * texture)  # lung and what else is around
    right, turn = 16.0, -0.13  # both ventricles lean towards the apex
    lv_x = septum + heart.wall * 0.5 + heart.left * 0.9
    rv_x = septum - heart.wall * 0.5 - right * 0.9
    middle = (rv_x - right + lv_x + heart.left) / 2
    half = (lv_x + heart.left - rv_x + right) / 2 + heart.wall
    gap = float(exam.size) if exam.diagnosis == "effusion" else 0.0
    sac = ellipse(tissue, middle, 86 + dz, half, 71)
    outer_sac = ellipse(tissue, middle, 86 + dz, half + gap, 71 + 0.6 * gap)
    fill(tissue, outer_sac < 0, FLUID if gap else 2.0)
    fill(tissue, sac < 0, 3 + 3 * texture)
    outline(tissue, outer_sac, 2.6, 14.0)
    if gap:
        outline(tissue, sac, 1.6, 8.0)
    # The wall is thick in systole: the cavity shrinks inside it.
    a, long = heart.left * squeeze, (ring - (RING + dz - 2 * heart.length)) / 2
    lv = ellipse(tissue, lv_x - 3, ring - long, a, long, turn)
    rv = ellipse(tissue, rv_x + 3, ring - 27, right * (0.5 + 0.5 * squeeze), 27, -turn)
    atria = 1 + 0.12 * (empty - 0.5)
    la_x, ra_x = lv_x + 1, rv_x - 1
    la = ellipse(tissue, la_x, ring + 23, 20 * atria, 20 * atria)
    ra = ellipse(tissue, ra_x, ring + 23, 17 * atria, 19 * atria)
    for cavity in (lv, rv, la, ra):
        fill(tissue, cavity < 0, FLUID, 0.0)
        outline(tissue, cavity - np.float32(0.5), 1.4, 8.0)
    _valves(tissue, (lv_x, a * 0.8), (rv_x, right * 0.8), ring, 1 - empty)
    if exam.lesion is not None:
        x = la_x - 2 if exam.lesion.place == "left atrium" else ra_x + 2
        add_lesion(tissue, exam.lesion, exam.size, x, ring + 22 + between(draws, -2, 2), 0.0)
    fill(tissue, tissue.z < 10, 4 + 6 * texture)
    outline(tissue, tissue.z - np.float32(10), 1.6, 8.0)
    _follow(tissue, lv_x, ring, squeeze)


def _valves(
    tissue: Tissue, left: tuple[float, float], right: tuple[float, float], ring: float, open_: float
) -> None:
    """Two leaflets a valve, meeting in the ring's plane or hanging into the ventricle."""
    for centre, half in (left, right):
        half = min(half, 19.0)
        for side in (-1, 1):
            tip = (centre + side * half * (0.08 + 0.62 * open_), ring - 3 - 13 * open_, 0.9)
            leaflet = tube(tissue, [(centre + side * half, ring, 1.2), tip])
            fill(tissue, leaflet < 0, 9.0)


def _follow(tissue: Tissue, lv_x: float, ring: float, squeeze: float) -> None:
    """Scatterers go with the muscle: those beside the left ventricle move towards its middle."""
    rows, columns = tissue.echo.shape
    if squeeze == 1:
        return
    x, z = tissue.x - np.float32(lv_x), tissue.z
    r = np.sqrt(x * x + np.float32(1e-3))
    move = np.clip(1 - (r - 20) * np.float32(1 / 40), 0, 1) * np.float32((1 / squeeze - 1) * 0.7)
    across = np.float32(columns / 2) * x * move / (np.float32(FAN) * (z + 6))
    column = np.clip(np.arange(columns) + across.astype(np.int64), 0, columns - 1)
    down = np.clip(z / np.float32(ring), 0, 1) * np.float32((RING - ring) / tissue.step * 0.7)
    row = np.clip(np.arange(rows)[:, None] + down.astype(np.int64), 0, rows - 1)
    tissue.scatterers = row, column
