"""What a linear probe sees: breast, thyroid, carotid artery. Lengths in mm."""

import numpy as np

from echovlm_jax.data.keys import mix
from echovlm_jax.phantom.acoustics import Probe, Tissue
from echovlm_jax.phantom.exam import Exam, View, between, stream
from echovlm_jax.phantom.shapes import (
    FLUID,
    add_calcification,
    add_lesion,
    band,
    ellipse,
    fill,
    outline,
    rough,
    tube,
    wave,
    wobbly,
)

THYROID_WIDTH = 58.0  # of the picture: both lobes and both carotids


def breast_probe(key: int, height: int, width: int) -> Probe:
    depth = between(stream(key, 1), 38, 42)
    return Probe(depth, depth * width / height, lateral=1.7, axial=1.0)


def paint_breast(tissue: Tissue, exam: Exam, view: View) -> None:
    """Skin, fat with Cooper's ligaments, gland with ducts, muscle, ribs."""
    draws, pose = stream(exam.key, 10), stream(view.key, 10)
    half = -float(tissue.x[0, 0])
    fat = between(draws, 7, 9) + wave(int(mix(exam.key, 11)), tissue.x, 24, 1.6)
    deep = between(draws, 25, 27)
    gland = deep + wave(int(mix(exam.key, 12)), tissue.x, 40, 1.2)
    front = between(draws, 5.5, 7)
    muscle, deep = gland + np.float32(front), deep + front
    z = tissue.z
    texture = rough(int(mix(view.key, 13)), tissue.echo.shape, (26, 12))
    fill(tissue, z < fat, -9 + 2 * texture)
    fill(tissue, z >= fat, 6 + 4 * texture)
    fill(tissue, z >= gland, -11 + 2 * texture)  # the fat behind the gland
    fibres = rough(int(mix(view.key, 14)), tissue.echo.shape, (70, 5))
    fill(tissue, z >= gland + np.float32(1.8), -8 + 9 * fibres)
    upper = band(tissue, 0, 12)
    for _ in range(5):  # Cooper's ligaments, from the gland up to the skin
        foot = between(draws, -half, half)
        line = tube(upper, [(foot, 10, 0.28), (foot + between(draws, -6, 6), 1.5, 0.22)])
        fill(upper, (line < 0) & (upper.z < fat), 5.0)
    for edge, level in ((fat, 8.0), (gland, 9.0), (muscle, 11.0)):
        outline(tissue, z - edge, 0.5, level)
    _ducts(tissue, exam)
    # Ribs, 19 mm apart: bright in front and black behind.
    lower = band(tissue, 24, tissue.step * len(z))
    lower.x = np.mod(tissue.x + np.float32(between(pose, 0, 19)), np.float32(19))
    rib = ellipse(lower, 9.5, deep + 2.8, 4.5, 2.2)
    fill(lower, rib < 0, -22.0, 4.0)
    outline(lower, rib + np.float32(0.3), 0.6, 12.0)
    fill(tissue, z < 1.8, 9.0)
    outline(tissue, z - np.float32(1.8), 0.4, -14.0)
    if exam.lesion is not None:
        x = between(draws, -0.25, 0.25) * half + between(pose, -3, 3)
        add_lesion(tissue, exam.lesion, exam.size, x, between(draws, 16, 18), 4.0)


def _ducts(tissue: Tissue, exam: Exam) -> None:
    """Ducts running towards the nipple: hairlines, or wide where the diagnosis says so."""
    tissue = band(tissue, 8, 28)
    draws = stream(exam.key, 15)
    wide = exam.diagnosis == "ducts"
    radius = exam.size / 2 if wide else 0.35
    half = -float(tissue.x[0, 0])
    for i in range(3):
        z = 12.5 + 5.2 * i + between(draws, -0.6, 0.6)
        x0 = between(draws, -0.85, -0.55) * half
        x1 = x0 + between(draws, 0.8, 1.2) * half
        points = [(x0, z + 1.5, radius * 0.5), ((x0 + x1) / 2, z, radius), (x1, z - 1.5, radius)]
        d = tube(tissue, points)
        if wide:
            outline(tissue, d - np.float32(0.3), 0.6, 13.0)
        fill(tissue, d < 0, FLUID if wide else -12.0, -0.4 if wide else 0.0)


def thyroid_probe(key: int, height: int, width: int) -> Probe:
    return Probe(THYROID_WIDTH * height / width, THYROID_WIDTH, lateral=1.8, axial=1.0)


def paint_thyroid(tissue: Tissue, exam: Exam, view: View) -> None:
    """Across the neck: trachea between two lobes, isthmus, carotids at the sides, strap muscles."""
    draws, pose = stream(exam.key, 20), stream(view.key, 20)
    cx, cz = between(pose, -1.5, 1.5), between(pose, 16.0, 18.0)
    shape = tissue.echo.shape
    texture = rough(int(mix(view.key, 21)), shape, (20, 20))
    fibres = rough(int(mix(view.key, 22)), shape, (60, 8))
    fill(tissue, tissue.z >= 0, -9 + 7 * fibres)  # muscles, in front and behind
    skin = 5.2 + wave(int(mix(exam.key, 23)), tissue.x, 50, 0.8)
    fill(tissue, tissue.z < skin, -3 + 3 * texture)
    outline(tissue, tissue.z - skin, 0.6, 8.0)
    fill(tissue, tissue.z < 1.6, 9.0)
    diffuse = exam.diagnosis == "diffuse"
    level = np.float32(-7.0 if diffuse else 5.0) + texture * np.float32(1.5)
    if diffuse:
        patches = rough(int(mix(exam.key, 24)), shape, (34, 34))
        level = level + patches * np.float32(9)
    wide, deep = (10.0, 11.0) if diffuse else (8.3, 9.0)
    lobes = [
        ellipse(tissue, cx + side * (6.6 + wide * 0.85), cz + 0.5, wide, deep, -0.18 * side)
        for side in (-1, 1)
    ]
    isthmus = ellipse(tissue, cx, cz - 6.8, 11.0, 3.0 if diffuse else 1.9)
    thyroid = np.minimum(np.minimum(*lobes), isthmus)
    fill(tissue, thyroid < 0, level)
    outline(tissue, thyroid - np.float32(0.2), 0.55, 11.0)
    air = ellipse(tissue, cx, cz + 2.2, 6.8, 7.0)
    rings = rough(int(mix(view.key, 25)), shape, (40, 6))
    fill(tissue, air < 0, -18 + 8 * rings, 2.0)
    outline(tissue, air, 1.3, 15.0)
    gullet = ellipse(tissue, cx + 9.0, cz + 9.5, 3.6, 2.5)
    fill(tissue, gullet < 0, -10.0)
    outline(tissue, gullet + np.float32(1.4), 0.8, 4.0)
    for side in (-1, 1):
        x = cx + side * (6.6 + 1.95 * wide + 2.8)
        carotid = ellipse(tissue, x, cz + between(draws, 2.5, 4.0), 3.3, 3.1)
        fill(tissue, carotid < 0, FLUID, -0.5)
        outline(tissue, carotid, 0.8, 11.0)
        vein = ellipse(tissue, x + side * 2.5, cz - 4.5, 4.2, 2.3)
        fill(tissue, vein < 0, FLUID, -0.3)
        outline(tissue, vein, 0.4, 4.0)
    if exam.lesion is not None:
        # As everybody shows it: the patient's right is on the left of the picture.
        side = -1 if exam.lesion.place == "right lobe" else 1
        x = cx + side * (6.6 + wide * 0.85) + between(draws, -0.6, 0.6)
        add_lesion(tissue, exam.lesion, exam.size, x, cz + between(draws, -0.5, 1.5), 5.0)


def vessel_probe(key: int, height: int, width: int) -> Probe:
    depth = between(stream(key, 1), 31, 35)
    return Probe(depth, depth * width / height, lateral=1.6, axial=0.9)


def paint_vessel(tissue: Tissue, exam: Exam, view: View) -> None:
    """A carotid artery: along (first), or across (second): wall of three layers, lumen, plaque."""
    draws, pose = stream(exam.key, 30), stream(view.key, 30)
    shape = tissue.echo.shape
    fibres = rough(int(mix(view.key, 31)), shape, (60, 5))
    texture = rough(int(mix(view.key, 32)), shape, (16, 14))
    fill(tissue, tissue.z >= 0, -5 + 6 * fibres + 3 * texture)
    fill(tissue, tissue.z < 4.5, -9 + 3 * texture)
    fill(tissue, tissue.z < 1.5, 8.0)
    outline(tissue, tissue.z - np.float32(4.5), 0.5, 8.0)
    outline(tissue, tissue.z - (11.0 + wave(int(mix(exam.key, 33)), tissue.x, 40, 1.0)), 0.5, 9.0)
    centre, radius = between(draws, 17.0, 18.5) + between(pose, -0.5, 0.5), between(draws, 3.4, 3.8)
    thick = float(exam.size) if exam.diagnosis == "intima" else 0.7
    half = -float(tissue.x[0, 0])
    if view.plane == "first":
        slope = between(pose, -0.05, 0.05)
        bulb = tissue.x * np.float32(1.0 / half)
        widening = np.clip(bulb - np.float32(0.35), 0, 1) * np.float32(1.6)
        off = tissue.z - np.float32(centre) - tissue.x * np.float32(slope)
        d = np.abs(off) - np.float32(radius) - widening
    else:
        slope, off = 0.0, tissue.z - np.float32(centre)
        d = ellipse(tissue, 0.0, centre, radius, radius)
    # From outside: adventitia (bright), media (dark), intima (bright); the lumen starts at `thick`.
    outline(tissue, d - np.float32(0.55), 1.1, 13.0)
    fill(tissue, (d < 0) & (d >= -thick), -12.0 if thick < 1 else -6.0)
    lumen = d < -thick
    fill(tissue, lumen, FLUID, -0.45)
    outline(tissue, d + np.float32(thick), 0.4, 9.0)
    if exam.diagnosis == "occlusion":
        clot = rough(int(mix(exam.key, 34)), shape, (24, 20))
        fill(tissue, lumen, -9 + 5 * clot, 0.0)
    if exam.lesion is not None:
        x = (
            (between(draws, -0.25, 0.25) * half + between(pose, -2, 2))
            if view.plane == "first"
            else 0.0
        )
        _plaque(tissue, exam, d, off, x, centre + slope * x, radius, view.plane == "first")


def _plaque(
    tissue: Tissue,
    exam: Exam,
    wall: np.ndarray,
    off: np.ndarray,
    x: float,
    centre: float,
    radius: float,
    along: bool,
) -> None:
    """A plaque of `exam.size` mm on the near or far wall."""
    lesion = exam.lesion
    assert lesion is not None
    sign = -1 if lesion.place == "near wall" else 1
    waves = ((3, 0.1), (5, 0.14), (7, 0.14)) if lesion.shape == "irregular" else ()
    length = between(stream(lesion.key), 5.0, 6.5) if along else 2.9
    d = wobbly(tissue, x, centre + sign * radius, length, exam.size, waves, lesion.key)
    inside = (d < 0) & (wall < 0) & (off * sign > 0)
    if lesion.echo == "hyperechoic":
        fill(tissue, inside, 17.0, 30.0 / exam.size)
        add_calcification(tissue, x, centre + sign * (radius - exam.size * 0.5), length * 0.45, 0.0)
    else:
        fill(tissue, inside, -8.0, 0.0)
        outline(tissue, np.where(wall < 0, d, np.float32(9)), 0.45, 3.0)
