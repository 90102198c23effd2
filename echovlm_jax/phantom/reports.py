"""Reports of phantom exams: each sentence follows from the parameters, two wordings each."""

from __future__ import annotations

from collections.abc import Sequence

from echovlm_jax.data.keys import number
from echovlm_jax.data.record import Report
from echovlm_jax.phantom.exam import Exam, Lesion
from echovlm_jax.phantom.questions import questions
from echovlm_jax.phantom.words import ADVICE, ATTRIBUTES, DIAGNOSES, ORGANS, Pair, noun

_WORDING = 4  # which numbers of an exam's key choose wordings

# What is normal in every exam of an organ. Two wordings in each language.
_SCENE: dict[str, tuple[Pair, Pair]] = {
    "breast": (
        ("The skin, the subcutaneous fat and the glandular layer are well shown.",
         "乳腺皮肤、皮下脂肪及腺体层显示清晰。"),
        ("Skin, fat and gland form distinct layers in front of the pectoral muscle.",
         "乳腺皮肤、脂肪、腺体及胸大肌层次清楚。"),
    ),
    "gynaecology": (
        ("The bladder is full and the uterus lies behind it with a smooth outline.",
         "膀胱充盈良好，其后方子宫轮廓光整。"),
        ("Behind the full bladder the uterus is seen with a smooth surface.",
         "充盈膀胱后方可见子宫，表面光滑。"),
    ),
    "heart": (
        ("The four chambers are shown from the apex, and the valves are thin.",
         "心尖四腔心切面显示清晰，瓣膜纤细。"),
        ("The apical four-chamber view shows atria and ventricles with thin valve leaflets.",
         "心尖四腔心切面可见心房、心室，瓣叶纤细。"),
    ),
    "kidney": (
        ("The kidney is of normal size with a smooth capsule.",
         "肾脏大小正常，包膜光滑。"),
        ("The kidney has a normal size and its outline is smooth.",
         "肾脏形态大小正常，轮廓光整。"),
    ),
    "liver": (
        ("The liver is of normal size with a smooth surface.",
         "肝脏大小正常，表面光滑。"),
        ("The liver has a normal size and a smooth capsule.",
         "肝脏形态大小正常，包膜光整。"),
    ),
    "thyroid": (
        ("The trachea lies in the middle, with a carotid artery on either side.",
         "气管居中，两侧颈动脉显示清晰。"),
        ("The trachea is central and both carotid arteries are clear.",
         "气管位置居中，双侧颈动脉清楚。"),
    ),
    "vessel": (
        ("The carotid artery has an even course and is shown in its length.",
         "颈动脉走行自然，长轴显示清晰。"),
        ("The carotid artery is displayed along its axis and runs evenly.",
         "颈动脉长轴切面显示清楚，走行正常。"),
    ),
}  # fmt: skip

# What there is where nothing is focal; {size} in mm.
_DIFFUSE: dict[tuple[str, str], Pair] = {
    ("breast", "normal"): (
        "The gland is evenly echogenic and its ducts are not dilated. No mass or calcification is"
        " seen.",
        "腺体回声均匀，导管未见扩张。未见肿块及钙化。",
    ),
    ("breast", "ducts"): (
        "Several ducts are dilated to about {size} mm and filled with anechoic fluid. No mass is"
        " seen.",
        "多支导管扩张，内径约{size} mm，内为无回声液体。未见肿块。",
    ),
    ("gynaecology", "normal"): (
        "The myometrium is even and the endometrium is thin. Both ovaries are normal and contain"
        " small follicles.",
        "肌层回声均匀，内膜不厚。双侧卵巢大小正常，内见小卵泡。",
    ),
    ("gynaecology", "endometrium"): (
        "The endometrium is thickened to about {size} mm and echogenic. Both ovaries are normal and"
        " contain small follicles.",
        "子宫内膜增厚，厚约{size} mm，回声增强。双侧卵巢大小正常，内见小卵泡。",
    ),
    ("heart", "normal"): (
        "The chambers and the walls are of normal size, and the left ventricle contracts well. No"
        " pericardial effusion or mass is seen.",
        "各房室大小及室壁厚度正常，左心室收缩良好。未见心包积液及占位。",
    ),
    ("heart", "effusion"): (
        "An anechoic band of about {size} mm is seen around the heart between the layers of the"
        " pericardium. The chambers are of normal size and the left ventricle contracts well.",
        "心包腔内可见环绕心脏的无回声带，宽约{size} mm。各房室大小正常，左心室收缩良好。",
    ),
    ("heart", "hypertrophy"): (
        "The walls of the left ventricle are thickened to about {size} mm and its cavity is small."
        " It contracts well. No pericardial effusion is seen.",
        "左心室壁增厚，厚约{size} mm，心腔变小，收缩良好。未见心包积液。",
    ),
    ("heart", "dilated"): (
        "The left ventricle is dilated to about {size} mm, with thin walls, and contracts poorly."
        " No pericardial effusion is seen.",
        "左心室扩大，内径约{size} mm，室壁变薄，收缩减弱。未见心包积液。",
    ),
    ("kidney", "normal"): (
        "Cortex and sinus are clearly separated and the collecting system is not dilated. No stone"
        " or mass is seen.",
        "皮髓质分界清晰，集合系统未见分离。未见结石及肿块。",
    ),
    ("kidney", "hydronephrosis"): (
        "The collecting system is dilated and anechoic, and the renal pelvis is about {size} mm"
        " deep. No stone or mass is seen.",
        "集合系统分离，内为无回声区，肾盂前后径约{size} mm。未见结石及肿块。",
    ),
    ("liver", "normal"): (
        "The parenchyma is fine and evenly echogenic. The vessels and the diaphragm are clear. No"
        " focal lesion is seen.",
        "肝实质回声细密均匀，血管及膈肌显示清晰。未见占位性病变。",
    ),
    ("liver", "fatty"): (
        "The parenchyma is bright in front and fades with depth. The vessels and the diaphragm are"
        " blurred. No focal lesion is seen.",
        "肝实质前场回声增强，后场回声衰减，血管及膈肌显示模糊。未见占位性病变。",
    ),
    ("thyroid", "normal"): (
        "Both lobes and the isthmus are of normal size with even echoes. No nodule is seen.",
        "双侧叶及峡部大小正常，回声均匀。未见结节。",
    ),
    ("thyroid", "diffuse"): (
        "Both lobes and the isthmus are enlarged, hypoechoic and uneven. No nodule is seen.",
        "双侧叶及峡部增大，回声减低且不均匀。未见结节。",
    ),
    ("vessel", "normal"): (
        "The intima is thin and smooth. The lumen is anechoic and wide open. No plaque is seen.",
        "内中膜薄而光滑，管腔内为无回声，管腔通畅。未见斑块。",
    ),
    ("vessel", "intima"): (
        "The intima and media are thickened to about {size} mm. The lumen is anechoic and open. No"
        " plaque is seen.",
        "内中膜增厚，厚约{size} mm，管腔内为无回声，管腔通畅。未见斑块。",
    ),
    ("vessel", "occlusion"): (
        "The lumen is filled with hypoechoic material all along. No open lumen is left.",
        "管腔内充满低回声，全程未见通畅管腔。",
    ),
}

# What else is normal where there is a focal lesion.
_OTHERWISE: dict[str, Pair] = {
    "breast": ("The ducts are not dilated.", "导管未见扩张。"),
    "gynaecology": ("The endometrium is thin.", "子宫内膜不厚。"),
    "heart": (
        "The left ventricle contracts well. No pericardial effusion is seen.",
        "左心室收缩良好。未见心包积液。",
    ),
    "kidney": ("The collecting system is not dilated.", "集合系统未见分离。"),
    "liver": ("The vessels and the diaphragm are clear.", "血管及膈肌显示清晰。"),
    "thyroid": ("The rest of the gland has even echoes.", "其余腺体回声均匀。"),
    "vessel": ("The rest of the lumen is open.", "其余管腔通畅。"),
}
_BEHIND: dict[str, Pair] = {
    "none": ("The echoes behind it are unchanged.", "后方回声无改变。"),
    "enhancement": ("The echoes behind it are enhanced.", "后方回声增强。"),
    "shadow": ("There is an acoustic shadow behind it.", "后方伴声影。"),
}
_CALCIUM: dict[str, Pair] = {
    "none": ("No calcification is seen.", "未见钙化。"),
    "punctate": ("It contains punctate calcifications.", "内见点状钙化。"),
    "coarse": ("It contains a coarse calcification.", "内见粗大钙化。"),
}


def reports(exam: Exam) -> tuple[Report, ...]:
    """What is written about an exam, in Chinese and in English."""
    return tuple(_report(exam, language) for language in ("zh", "en"))


def _report(exam: Exam, language: str) -> Report:
    at = 0 if language == "en" else 1
    return Report(
        language=language,
        findings=_findings(exam, at),
        impression=_impression(exam, at),
        caption=_caption(exam, at),
        diagnosis=DIAGNOSES[exam.organ, exam.diagnosis][at],
        questions=questions(exam, language),
    )


def _choose(exam: Exam, what: int, at: int, options: Sequence[str]) -> str:
    return options[number(exam.key, _WORDING, what, at) % len(options)]


def _findings(exam: Exam, at: int) -> str:
    scene = _choose(exam, 0, at, [pair[at] for pair in _SCENE[exam.organ]])
    if exam.lesion is None:
        diffuse = _DIFFUSE[exam.organ, exam.diagnosis][at].format(size=f"{exam.size:g}")
        return _join([scene, diffuse], at)
    focal = (
        _plaque(exam, exam.lesion, at) if exam.organ == "vessel" else _focal(exam, exam.lesion, at)
    )
    return _join([scene, *focal, _OTHERWISE[exam.organ][at]], at)


def _focal(exam: Exam, lesion: Lesion, at: int) -> list[str]:
    """Sentences on a lesion: what, where and how large; outline; what is behind and inside it."""
    words = {key: ATTRIBUTES[key][getattr(lesion, key)][at] for key in ("echo", "shape", "margin")}
    words |= {"noun": noun(exam.organ, exam.diagnosis)[at], "size": f"{exam.size:g}"}
    place = ATTRIBUTES["place"][lesion.place][at] if lesion.place else ("gland", "乳腺腺体内")[at]
    words["place"] = place
    words["a"] = "An" if words["echo"][0] in "aeiou" else "A"
    first = (
        (
            "{a} {echo} {noun} of about {size} mm is seen in the {place}.",
            "{a} {echo} {noun} is seen in the {place}, about {size} mm in size.",
        ),
        (
            "{place}可见一{echo}{noun}，大小约{size} mm。",
            "{place}见{echo}{noun}，大小约{size} mm。",
        ),
    )
    out = [_choose(exam, 1, at, first[at]).format(**words)]
    if lesion.echo == "hyperechoic" and lesion.calcification == "coarse":  # a stone
        return [*out, _BEHIND[lesion.posterior][at]]
    words["turned"] = ""
    if lesion.orientation:
        words["turned"] = (" and ", "，")[at] + ATTRIBUTES["orientation"][lesion.orientation][at]
    second = "It is {shape}{turned} with {margin} margins.", "呈{shape}{turned}，边界{margin}。"
    out.append(second[at].format(**words))
    out.append(_BEHIND[lesion.posterior][at])
    if exam.organ in ("breast", "thyroid", "gynaecology"):
        out.append(_CALCIUM[lesion.calcification][at])
    return out


def _plaque(exam: Exam, lesion: Lesion, at: int) -> list[str]:
    words = {key: ATTRIBUTES[key][getattr(lesion, key)][at] for key in ("echo", "shape", "place")}
    words |= {"size": f"{exam.size:g}", "a": "An" if words["echo"][0] in "aeiou" else "A"}
    first = (
        (
            "{a} {echo} plaque is seen on the {place}, about {size} mm thick.",
            "On the {place} there is a {echo} plaque about {size} mm thick.",
        ),
        ("{place}可见一{echo}斑块，厚约{size} mm。", "{place}见{echo}斑块，厚约{size} mm。"),
    )
    second = "Its surface is {shape}.", "斑块呈{shape}。"
    return [
        _choose(exam, 1, at, first[at]).format(**words),
        second[at].format(**words),
        _BEHIND[lesion.posterior][at],
    ]


def _impression(exam: Exam, at: int) -> str:
    """One wording only: what two exams conclude is the same exactly where the texts are."""
    name, advice = DIAGNOSES[exam.organ, exam.diagnosis][at], ADVICE[exam.diagnosis][at]
    name = name[0].upper() + name[1:]
    if exam.lesion is not None and exam.lesion.place:
        place = ATTRIBUTES["place"][exam.lesion.place][at]
        name = f"{name}, {place}" if at == 0 else f"{name}（{place}）"
    return f"{name}: {advice}." if at == 0 else f"{name}，{advice}。"


_SIGNS: dict[tuple[str, str], Pair] = {
    ("breast", "normal"): ("an evenly echogenic gland", "腺体回声均匀"),
    ("breast", "ducts"): ("ducts about {size} mm wide", "导管内径约{size} mm"),
    ("gynaecology", "normal"): (
        "a thin endometrium and small follicles",
        "内膜不厚，卵巢内见小卵泡",
    ),
    ("gynaecology", "endometrium"): (
        "an endometrium about {size} mm thick",
        "子宫内膜厚约{size} mm",
    ),
    ("heart", "normal"): ("four chambers of normal size", "各房室大小正常"),
    ("heart", "effusion"): (
        "an anechoic band of about {size} mm around it",
        "心包腔无回声带宽约{size} mm",
    ),
    ("heart", "hypertrophy"): (
        "walls of the left ventricle about {size} mm thick",
        "左心室壁厚约{size} mm",
    ),
    ("heart", "dilated"): ("a left ventricle about {size} mm wide", "左心室内径约{size} mm"),
    ("kidney", "normal"): ("a clear cortex and an even sinus", "皮质清晰，集合系统未见分离"),
    ("kidney", "hydronephrosis"): (
        "an anechoic pelvis about {size} mm deep",
        "肾盂无回声区约{size} mm",
    ),
    ("liver", "normal"): ("even parenchyma and clear vessels", "肝实质回声均匀，血管清晰"),
    ("liver", "fatty"): ("bright parenchyma that fades with depth", "肝实质回声增强，后场衰减"),
    ("thyroid", "normal"): ("lobes of normal size with even echoes", "双侧叶大小正常，回声均匀"),
    ("thyroid", "diffuse"): ("enlarged, uneven, hypoechoic lobes", "双侧叶增大，回声减低不均"),
    ("vessel", "normal"): ("a thin intima and an open lumen", "内中膜薄，管腔通畅"),
    ("vessel", "intima"): ("an intima about {size} mm thick", "内中膜厚约{size} mm"),
    ("vessel", "occlusion"): ("a lumen filled with echoes", "管腔内充满低回声"),
}


def _caption(exam: Exam, at: int) -> str:
    """One sentence on what is seen, without a diagnosis."""
    organ = ORGANS[exam.organ][at]
    if exam.lesion is None:
        seen = _SIGNS[exam.organ, exam.diagnosis][at].format(size=f"{exam.size:g}")
    else:
        echo = ATTRIBUTES["echo"][exam.lesion.echo][at]
        name = noun(exam.organ, exam.diagnosis)[at]
        place = (
            ATTRIBUTES["place"][exam.lesion.place][at]
            if exam.lesion.place
            else ("gland", "腺体内")[at]
        )
        if at == 0:
            article, where = (
                "an" if echo[0] in "aeiou" else "a",
                "on" if exam.organ == "vessel" else "in",
            )
            seen = f"{article} {echo} {name} of about {exam.size:g} mm {where} the {place}"
        else:
            seen = f"{place}可见{echo}{name}，约{exam.size:g} mm"
    return f"Ultrasound of the {organ} with {seen}." if at == 0 else f"{organ}超声图像，{seen}。"


def _join(sentences: Sequence[str], at: int) -> str:
    return (" " if at == 0 else "").join(sentences)
