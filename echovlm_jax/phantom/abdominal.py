"""What a curved probe sees: liver, kidney, uterus and ovaries. Lengths in mm."""

import math

import numpy as np

from echovlm_jax.data.keys import mix
from echovlm_jax.phantom.acoustics import Probe, Tissue
from echovlm_jax.phantom.exam import Exam, View, between, stream
from echovlm_jax.phantom.shapes import (
    FLUID,
    add_calcification,
    add_lesion,
    ellipse,
    fill,
    half_axes,
    outline,
    rough,
    tube,
    wave,
    wobbly,
)


def _curved(key: int, low: float, high: float) -> Probe:
    depth = between(stream(key, 1), low, high)
    return Probe(depth, half_angle=0.58, radius=45.0, lateral=1.2, axial=1.1, focus=0.55)


def liver_probe(key: int, height: int, width: int) -> Probe:
    return _curved(key, 138, 150)


def kidney_probe(key: int, height: int, width: int) -> Probe:
    return _curved(key, 105, 113)


def pelvis_probe(key: int, height: int, width: int) -> Probe:
    return _curved(key, 112, 120)


def _body_wall(tissue: Tissue, key: int, depth: float) -> None:
    """Skin, fat and muscle down to `depth`."""
    fibres = rough(key, tissue.echo.shape, (70, 8))
    fill(tissue, tissue.z < depth, -4 + 6 * fibres)
    fill(tissue, tissue.z < depth * 0.5, -8 + 4 * fibres)
    outline(tissue, tissue.z - np.float32(depth * 0.5), 1.2, 7.0)
    fill(tissue, tissue.z < 3, 7.0)


def paint_liver(tissue: Tissue, exam: Exam, view: View) -> None:
    """Fine even parenchyma, dark hepatic veins, portal branches with bright walls, diaphragm."""
    draws, pose = stream(exam.key, 40), stream(view.key, 40)
    fatty = exam.diagnosis == "fatty"
    texture = rough(int(mix(view.key, 41)), tissue.echo.shape, (14, 10))
    base = 9.0 if fatty else 0.0
    fill(tissue, tissue.z >= 0, base + texture * np.float32(1.2), 0.19 if fatty else 0.0)
    dx, dz = between(pose, -6, 6), between(pose, -4, 4)
    contrast = 9.0 if fatty else 30.0  # fat hides the vessels
    for x0, z0, x1, z1, width in (
        (18, 118, -30, 62, 4.6), (26, 116, 12, 50, 4.4), (34, 112, 52, 66, 3.8),
    ):  # fmt: skip
        x1, z1 = x1 + between(draws, -5, 5), z1 + between(draws, -5, 5)
        head = (x0 + dx, z0 + dz, width)
        bend = ((x0 + x1) / 2 + between(draws, -4, 4) + dx, (z0 + z1) / 2 + dz, width * 0.75)
        vein = tube(tissue, [head, bend, (x1 + dx, z1 + dz, width * 0.35)])
        fill(tissue, vein < 0, base - contrast)
    x0, z0 = -34 + between(draws, -6, 6) + dx, 88 + between(draws, -4, 4) + dz
    portal = tube(tissue, [(x0 - 22, z0 + 8, 5), (x0, z0, 4.4), (x0 + 16, z0 - 20, 2.6)])
    if not fatty:
        outline(tissue, portal - np.float32(1.0), 2.0, 11.0)
    fill(tissue, portal < 0, base - contrast)
    if exam.lesion is not None:
        near = exam.lesion.place == "near"
        x = between(draws, -8, 8) + dx
        z = (between(draws, 40, 46) if near else between(draws, 88, 94)) + dz
        add_lesion(tissue, exam.lesion, exam.size, x, z, base)
    # The diaphragm: a bright arc; behind it lung, the liver's faint mirror image.
    arc = -ellipse(tissue, -6 + dx, 50 + dz, 96, 76)
    fill(tissue, arc < 0, -17 + texture * np.float32(3))
    outline(tissue, arc, 2.6, 4.0 if fatty else 17.0)
    _body_wall(tissue, int(mix(view.key, 42)), 16 + between(draws, -2, 2))
    outline(tissue, tissue.z - np.float32(17), 1.2, 10.0)


def paint_kidney(tissue: Tissue, exam: Exam, view: View) -> None:
    """A bean with capsule, cortex, dark pyramids, bright sinus; liver above it."""
    draws, pose = stream(exam.key, 50), stream(view.key, 50)
    shape = tissue.echo.shape
    texture = rough(int(mix(view.key, 51)), shape, (24, 20))
    along = view.plane == "first"
    cx, cz = between(pose, -3, 3), 58 + between(pose, -3, 3)
    a, b = (51.0 + between(draws, -3, 3), 24.0 + between(draws, -1, 1)) if along else (29.0, 25.0)
    if not along:  # the cut goes through what the report is about
        cx = cx + 2
    turn = between(draws, -0.08, 0.12) if along else 0.0
    fill(tissue, tissue.z >= 0, 1 + 5 * texture)  # fat around
    upper = tissue.z < 40 + wave(int(mix(exam.key, 52)), tissue.x, 120, 3)
    fill(tissue, upper, -1 + 1.5 * texture)
    outline(tissue, tissue.z - np.float32(cz + 36), 5.0, 11.0)  # the muscle behind
    fill(tissue, tissue.z > cz + 38, -9 + 4 * texture)
    kidney = ellipse(tissue, cx, cz, a, b, turn)
    fill(tissue, kidney < 0, -8 + 1.5 * texture)
    outline(tissue, kidney - np.float32(0.8), 1.8, 12.0)
    for i in range(7):  # pyramids around the sinus
        angle = math.pi * (0.06 + i / 3.5) + between(draws, -0.08, 0.08)
        x, z = 0.66 * a * math.cos(angle), 0.66 * b * math.sin(angle)
        size = 5.2 if along else 4.0
        fill(tissue, ellipse(tissue, cx + x, cz + z, size, size * 0.8) < 0, -17.0)
    sinus = wobbly(tissue, cx, cz, 0.52 * a, 0.4 * b, ((3, 0.08), (7, 0.12)), exam.key)
    fill(tissue, sinus < 0, 9 + 3 * texture)
    if exam.diagnosis == "hydronephrosis":
        _wide_pelvis(tissue, exam, cx, cz, a)
    if exam.lesion is not None:
        _kidney_lesion(tissue, exam, cx, cz, a if along else 0.0, b)
    _body_wall(tissue, int(mix(view.key, 53)), 15 + between(draws, -2, 2))


def _wide_pelvis(tissue: Tissue, exam: Exam, cx: float, cz: float, a: float) -> None:
    """Urine in the pelvis, so many mm deep, and in the calyces that open into it."""
    half = exam.size / 2
    d = ellipse(tissue, cx, cz, 0.4 * a, half)
    reach = 0.55 * half + 4
    for x, z in ((-0.42, -0.8), (-0.5, 0.5), (0.0, -1.0), (0.42, -0.8), (0.5, 0.5)):
        stem = [(cx + 0.5 * x * a, cz, 0.3 * half), (cx + x * a, cz + z * reach, 0.36 * half)]
        d = np.minimum(d, tube(tissue, stem))
    outline(tissue, d - np.float32(0.8), 1.6, 11.0)
    fill(tissue, d < 0, FLUID, -0.25)


def _kidney_lesion(tissue: Tissue, exam: Exam, cx: float, cz: float, a: float, b: float) -> None:
    lesion, draws = exam.lesion, stream(exam.key, 54)
    assert lesion is not None
    # Along the kidney, the upper pole is on the left of the picture.
    side = {"upper": -1, "middle": 0, "lower": 1}[lesion.place.split()[0]]
    if exam.diagnosis == "stone":
        add_calcification(
            tissue, cx + 0.38 * side * a, cz + between(draws, -2, 2), exam.size / 2, 4.0
        )
    else:
        x, z = cx + side * 0.66 * a, cz + between(draws, -0.35, -0.1) * b
        add_lesion(tissue, lesion, exam.size, x, z, 3.0 if lesion.echo == "hyperechoic" else -5.0)
        if lesion.echo != "anechoic" and lesion.margin == "clear":
            outline(tissue, ellipse(tissue, x, z, *half_axes(exam.size, lesion)), 1.4, 6.0)


def paint_pelvis(tissue: Tissue, exam: Exam, view: View) -> None:
    """Full bladder, uterus with endometrium behind it, an ovary with follicles on either side."""
    draws, pose = stream(exam.key, 60), stream(view.key, 60)
    shape = tissue.echo.shape
    texture = rough(int(mix(view.key, 61)), shape, (16, 16))
    cx, cz = between(pose, -4, 4), 66 + between(pose, -2, 2)
    fill(tissue, tissue.z >= 0, -2 + 6 * texture)
    gas = rough(int(mix(view.key, 62)), shape, (9, 11))
    fill(tissue, (tissue.z > cz + 24) & (gas > 0.25), 10.0, 0.35)  # bowel
    bladder = wobbly(tissue, cx, 31, between(draws, 42, 48), 12.5, ((2, 0.05), (3, 0.05)), exam.key)
    fill(tissue, bladder < 0, FLUID, -0.22)
    outline(tissue, bladder - np.float32(0.9), 1.8, 9.0)
    a, b = (27.0, 20.0) if view.plane == "first" else (24.0, 21.0)
    uterus = wobbly(
        tissue, cx, cz, a + between(draws, -2, 2), b, ((2, 0.04), (3, 0.05)), exam.key + 1
    )
    fill(tissue, uterus < 0, -4 + 2 * texture)
    outline(tissue, uterus - np.float32(0.5), 1.4, 8.0)
    _endometrium(tissue, exam, cx, cz)
    masses = exam.lesion is not None and exam.lesion.place.endswith("ovary")
    for side, name in ((-1, "right ovary"), (1, "left ovary")):  # right is on the left
        x, z = cx + side * (44 + between(draws, -2, 2)), cz + between(draws, -6, 2)
        if masses and exam.lesion is not None and exam.lesion.place == name:
            add_lesion(tissue, exam.lesion, exam.size, x + side * 2, z, -1.0)
        else:
            _ovary(tissue, exam.key + side, x, z)
    if exam.lesion is not None and not masses:
        sign = -1 if exam.lesion.place == "anterior wall" else 1
        x = cx + between(draws, -9, 9)
        add_lesion(tissue, exam.lesion, exam.size, x, cz + sign * (4 + 0.3 * exam.size), -2.0)
    _body_wall(tissue, int(mix(view.key, 63)), 15 + between(draws, -2, 1))


def _endometrium(tissue: Tissue, exam: Exam, cx: float, cz: float) -> None:
    thick = exam.size if exam.diagnosis == "endometrium" else between(stream(exam.key, 64), 5, 7)
    lining = ellipse(tissue, cx, cz, 16.0, thick / 2)
    fill(tissue, lining < 0, 9.0)
    outline(tissue, lining - np.float32(1.2), 2.4, -14.0)


def _ovary(tissue: Tissue, key: int, cx: float, cz: float) -> None:
    draws = stream(key, 65)
    ovary = ellipse(tissue, cx, cz, 13.0, 9.5)
    fill(tissue, ovary < 0, -6.0)
    outline(tissue, ovary - np.float32(0.5), 1.2, 7.0)
    for u, v in ((-7, -1), (-1, -4), (6, -1), (1, 4.2)):
        r = between(draws, 2.0, 3.2)
        fill(tissue, ellipse(tissue, cx + u, cz + v, r, r) < 0, FLUID, -0.2)
