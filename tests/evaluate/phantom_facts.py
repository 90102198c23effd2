"""What a phantom exam's report states, from the exam's parameters and not from its words."""

from echovlm_jax.evaluate.facts import Fact
from echovlm_jax.phantom.exam import Exam

# Of every exam of an organ: the scene, which has no parameters. Then of those without, and of
# those with a focal lesion.
SCENE = {
    "breast": [("organ", "structure", "normal")],
    "gynaecology": [("organ", "margin", "clear")],
    "heart": [("valves", "structure", "normal")],
    "kidney": [("organ", "structure", "normal"), ("organ", "margin", "clear")],
    "liver": [("organ", "structure", "normal"), ("organ", "margin", "clear")],
    "thyroid": [],
    "vessel": [("organ", "structure", "normal")],
}
NO_LESION = ("lesion", "lesion", "any", False)
NO_EFFUSION = ("pericardium", "structure", "fluid", False)
DIFFUSE = {
    ("breast", "normal"): [
        *[("organ", "texture", "even"), ("ducts", "structure", "normal"), NO_LESION],
        ("lesion", "calcification", "any", False),
    ],
    ("breast", "ducts"): [("ducts", "structure", "wide"), ("ducts", "echo", "anechoic"), NO_LESION],
    ("gynaecology", "normal"): [
        *[("organ", "texture", "even"), ("endometrium", "structure", "normal")],
        ("ovaries", "structure", "normal"),
    ],
    ("gynaecology", "endometrium"): [
        *[("endometrium", "structure", "thick"), ("endometrium", "echo", "hyperechoic")],
        ("ovaries", "structure", "normal"),
    ],
    ("heart", "normal"): [
        *[("chambers", "structure", "normal"), ("contraction", "structure", "normal")],
        *[NO_EFFUSION, NO_LESION],
    ],
    ("heart", "effusion"): [
        *[("pericardium", "structure", "fluid"), ("pericardium", "echo", "anechoic")],
        *[("chambers", "structure", "normal"), ("contraction", "structure", "normal")],
    ],
    ("heart", "hypertrophy"): [
        *[("ventricle wall", "structure", "thick"), ("contraction", "structure", "normal")],
        NO_EFFUSION,
    ],
    ("heart", "dilated"): [
        *[("ventricle", "structure", "wide"), ("ventricle wall", "structure", "thin")],
        *[("contraction", "structure", "weak"), NO_EFFUSION],
    ],
    ("kidney", "normal"): [
        *[("cortex", "structure", "normal"), ("collecting system", "structure", "normal")],
        NO_LESION,
    ],
    ("kidney", "hydronephrosis"): [
        *[("collecting system", "structure", "wide"), ("collecting system", "echo", "anechoic")],
        NO_LESION,
    ],
    ("liver", "normal"): [
        *[("organ", "texture", "even"), ("vessels", "structure", "normal")],
        *[("diaphragm", "structure", "normal"), NO_LESION],
    ],
    ("liver", "fatty"): [
        *[("organ", "echo", "hyperechoic"), ("organ", "structure", "fading")],
        *[("vessels", "structure", "blurred"), ("diaphragm", "structure", "blurred"), NO_LESION],
    ],
    ("thyroid", "normal"): [("organ", "texture", "even"), NO_LESION],
    ("thyroid", "diffuse"): [
        *[("organ", "structure", "large"), ("organ", "echo", "hypoechoic")],
        *[("organ", "texture", "uneven"), NO_LESION],
    ],
    ("vessel", "normal"): [
        *[("wall", "structure", "normal"), ("lumen", "echo", "anechoic")],
        *[("lumen", "structure", "normal"), NO_LESION],
    ],
    ("vessel", "intima"): [
        *[("wall", "structure", "thick"), ("lumen", "echo", "anechoic")],
        *[("lumen", "structure", "normal"), NO_LESION],
    ],
    ("vessel", "occlusion"): [("lumen", "structure", "blocked")],
}
SIZED = {
    "ducts": "ducts",
    "endometrium": "endometrium",
    "effusion": "pericardium",
    "hypertrophy": "ventricle wall",
    "dilated": "ventricle",
    "hydronephrosis": "collecting system",
    "intima": "wall",
}
OTHERWISE = {
    "breast": [("ducts", "structure", "normal")],
    "gynaecology": [("endometrium", "structure", "normal")],
    "heart": [("contraction", "structure", "normal"), NO_EFFUSION],
    "kidney": [("collecting system", "structure", "normal")],
    "liver": [("vessels", "structure", "normal"), ("diaphragm", "structure", "normal")],
    "thyroid": [("around", "texture", "even")],
    "vessel": [("lumen", "structure", "normal")],
}
# An impression: the diagnosis and what its recommendation says of it.
BENIGN = {"cyst", "fibroadenoma", "ducts", "fibroid", "haemangioma", "benign"}
DIAGNOSES = {
    "normal": ["normal"],
    "suspicious": ["malignant"],
    "complex": ["malignant"],
    "ducts": ["duct ectasia"],
    "benign": [],
    "endometrium": ["thick endometrium"],
    "dilated": ["dilated ventricle"],
    "intima": ["thick intima", "atherosclerosis"],
    "soft": ["soft plaque", "atherosclerosis"],
    "calcified": ["calcified plaque", "atherosclerosis"],
}
PLACES = {"near wall": "anterior", "far wall": "posterior"}


def facts_of(exam: Exam) -> frozenset[Fact]:
    """The facts of a whole report, findings and impression."""
    said: list[tuple] = [("report", "organ", exam.organ), *SCENE[exam.organ]]
    if exam.lesion is None:
        said += DIFFUSE[exam.organ, exam.diagnosis]
        if exam.size:
            said.append((SIZED[exam.diagnosis], "size", (float(exam.size),)))
    else:
        said += [*_focal(exam), *OTHERWISE[exam.organ]]
    names = DIAGNOSES.get(exam.diagnosis, [exam.diagnosis])
    said += [("report", "diagnosis", name) for name in names]
    if exam.diagnosis in BENIGN:
        said.append(("report", "diagnosis", "benign"))
    if exam.diagnosis == "normal":
        said.append(("organ", "structure", "normal"))
    if (exam.organ, exam.diagnosis) == ("kidney", "mass"):
        said.append(("lesion", "composition", "solid"))
    return frozenset(Fact(*each) for each in said)


def _focal(exam: Exam) -> list[tuple]:
    lesion = exam.lesion
    assert lesion is not None
    said: list[tuple] = [("lesion", "lesion", "any"), ("lesion", "size", (float(exam.size),))]
    if lesion.echo == "mixed":
        said.append(("lesion", "composition", "mixed"))
    else:
        said.append(("lesion", "echo", lesion.echo))
    if lesion.place:
        place = PLACES.get(lesion.place, lesion.place.split()[0])
        said.append(("lesion", "place", place))
    posterior = "unchanged" if lesion.posterior == "none" else lesion.posterior
    said.append(("lesion", "posterior", posterior))
    if exam.diagnosis == "stone":
        return said
    said.append(("lesion", "shape", lesion.shape))
    if exam.organ == "vessel":
        return said
    said.append(("lesion", "margin", lesion.margin))
    if lesion.orientation:
        said.append(("lesion", "orientation", lesion.orientation))
    if exam.organ in ("breast", "thyroid", "gynaecology"):
        none = lesion.calcification == "none"
        kind = ("any", False) if none else (lesion.calcification,)
        said.append(("lesion", "calcification", *kind))
    return said
