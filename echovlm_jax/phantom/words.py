"""The vocabulary of phantom reports, each entry as (English, Chinese)."""

from __future__ import annotations

Pair = tuple[str, str]

ORGANS: dict[str, Pair] = {
    "breast": ("breast", "乳腺"),
    "gynaecology": ("uterus and ovaries", "子宫及附件"),
    "heart": ("heart", "心脏"),
    "kidney": ("kidney", "肾脏"),
    "liver": ("liver", "肝脏"),
    "thyroid": ("thyroid", "甲状腺"),
    "vessel": ("carotid artery", "颈动脉"),
}

DIAGNOSES: dict[tuple[str, str], Pair] = {
    ("breast", "normal"): ("normal breast", "正常乳腺"),
    ("breast", "cyst"): ("breast cyst", "乳腺囊肿"),
    ("breast", "fibroadenoma"): ("fibroadenoma", "乳腺纤维腺瘤"),
    ("breast", "suspicious"): ("malignant-looking breast mass", "乳腺恶性肿块可能"),
    ("breast", "ducts"): ("duct ectasia", "乳腺导管扩张"),
    ("gynaecology", "normal"): ("normal uterus and ovaries", "正常子宫及附件"),
    ("gynaecology", "fibroid"): ("uterine fibroid", "子宫肌瘤"),
    ("gynaecology", "cyst"): ("ovarian cyst", "卵巢囊肿"),
    ("gynaecology", "complex"): ("malignant-looking ovarian mass", "卵巢恶性肿块可能"),
    ("gynaecology", "endometrium"): ("thickened endometrium", "子宫内膜增厚"),
    ("heart", "normal"): ("normal heart", "正常心脏"),
    ("heart", "effusion"): ("pericardial effusion", "心包积液"),
    ("heart", "hypertrophy"): ("left ventricular hypertrophy", "左心室肥厚"),
    ("heart", "dilated"): ("dilated left ventricle", "左心室扩大"),
    ("heart", "mass"): ("atrial mass", "心房占位"),
    ("kidney", "normal"): ("normal kidney", "正常肾脏"),
    ("kidney", "cyst"): ("renal cyst", "肾囊肿"),
    ("kidney", "stone"): ("kidney stone", "肾结石"),
    ("kidney", "hydronephrosis"): ("hydronephrosis", "肾积水"),
    ("kidney", "mass"): ("solid renal mass", "肾实性肿块"),
    ("liver", "normal"): ("normal liver", "正常肝脏"),
    ("liver", "cyst"): ("liver cyst", "肝囊肿"),
    ("liver", "haemangioma"): ("haemangioma", "肝血管瘤"),
    ("liver", "suspicious"): ("malignant-looking liver mass", "肝恶性肿块可能"),
    ("liver", "fatty"): ("fatty liver", "脂肪肝"),
    ("thyroid", "normal"): ("normal thyroid", "正常甲状腺"),
    ("thyroid", "cyst"): ("thyroid cyst", "甲状腺囊肿"),
    ("thyroid", "benign"): ("benign thyroid nodule", "甲状腺良性结节"),
    ("thyroid", "suspicious"): ("malignant-looking thyroid nodule", "甲状腺恶性结节可能"),
    ("thyroid", "diffuse"): ("diffuse thyroid disease", "甲状腺弥漫性病变"),
    ("vessel", "normal"): ("normal carotid artery", "正常颈动脉"),
    ("vessel", "intima"): ("thickened intima", "颈动脉内中膜增厚"),
    ("vessel", "soft"): ("soft carotid plaque", "颈动脉软斑块"),
    ("vessel", "calcified"): ("calcified carotid plaque", "颈动脉钙化斑块"),
    ("vessel", "occlusion"): ("carotid occlusion", "颈动脉闭塞"),
}

# What to do about it; the impression is the diagnosis, its place and this.
ADVICE: dict[str, Pair] = {
    "normal": ("no abnormality is seen", "未见明显异常"),
    "cyst": ("benign, no treatment needed", "考虑良性，无需处理"),
    "fibroadenoma": ("probably benign, follow-up in six months", "考虑良性，建议六个月后复查"),
    "suspicious": ("biopsy is recommended", "建议穿刺活检"),
    "ducts": ("benign change, follow-up is recommended", "考虑良性改变，建议随访"),
    "fibroid": ("benign, follow-up in one year", "考虑良性，建议一年后复查"),
    "complex": ("further imaging is recommended", "建议进一步影像检查"),
    "endometrium": ("hysteroscopy is recommended", "建议宫腔镜检查"),
    "effusion": ("look for the cause", "建议查明病因"),
    "hypertrophy": ("check the blood pressure", "建议监测血压"),
    "dilated": ("with reduced function", "伴收缩功能减低"),
    "mass": ("further imaging is recommended", "建议进一步影像检查"),
    "stone": ("urological review is recommended", "建议泌尿外科就诊"),
    "hydronephrosis": ("look for an obstruction", "建议查明梗阻原因"),
    "haemangioma": ("benign, follow-up in one year", "考虑良性，建议一年后复查"),
    "fatty": ("diet and exercise are recommended", "建议控制饮食并锻炼"),
    "benign": ("probably benign, follow-up in one year", "考虑良性，建议一年后复查"),
    "diffuse": ("check the thyroid function", "建议检查甲状腺功能"),
    "intima": ("early atherosclerosis", "考虑早期动脉粥样硬化"),
    "soft": ("atherosclerosis, unstable plaque", "考虑动脉粥样硬化，不稳定斑块"),
    "calcified": ("atherosclerosis, stable plaque", "考虑动脉粥样硬化，稳定斑块"),
    "occlusion": ("urgent vascular review", "建议血管外科急诊"),
}

ATTRIBUTES: dict[str, dict[str, Pair]] = {
    "echo": {
        "anechoic": ("anechoic", "无回声"),
        "hypoechoic": ("hypoechoic", "低回声"),
        "isoechoic": ("isoechoic", "等回声"),
        "hyperechoic": ("hyperechoic", "高回声"),
        "mixed": ("mixed cystic and solid", "囊实混合回声"),
    },
    "shape": {
        "round": ("round", "圆形"),
        "oval": ("oval", "椭圆形"),
        "irregular": ("irregular", "不规则形"),
        "regular": ("regular", "规则形"),
    },
    "margin": {
        "clear": ("clear", "清晰"),
        "ill-defined": ("ill-defined", "模糊"),
        "spiculated": ("spiculated", "呈毛刺状"),
    },
    "posterior": {
        "none": ("unchanged", "无改变"),
        "enhancement": ("enhanced", "增强"),
        "shadow": ("shadowed", "伴声影"),
    },
    "calcification": {
        "none": ("none", "无钙化"),
        "punctate": ("punctate", "点状钙化"),
        "coarse": ("coarse", "粗大钙化"),
    },
    "orientation": {
        "wider": ("wider than tall", "纵横比小于1"),
        "taller": ("taller than wide", "纵横比大于1"),
    },
    "place": {
        "anterior wall": ("anterior wall of the uterus", "子宫前壁"),
        "posterior wall": ("posterior wall of the uterus", "子宫后壁"),
        "right ovary": ("right ovary", "右侧卵巢"),
        "left ovary": ("left ovary", "左侧卵巢"),
        "left atrium": ("left atrium", "左心房"),
        "right atrium": ("right atrium", "右心房"),
        "upper pole": ("upper pole", "肾上极"),
        "lower pole": ("lower pole", "肾下极"),
        "upper calyx": ("upper calyx", "肾上盏"),
        "middle calyx": ("middle calyx", "肾中盏"),
        "lower calyx": ("lower calyx", "肾下盏"),
        "near": ("superficial part of the liver", "肝脏浅部"),
        "deep": ("deep part of the liver", "肝脏深部"),
        "right lobe": ("right lobe", "甲状腺右叶"),
        "left lobe": ("left lobe", "甲状腺左叶"),
        "near wall": ("near wall", "血管前壁"),
        "far wall": ("far wall", "血管后壁"),
    },
}

# What a lesion is called before it has a diagnosis.
NOUNS: dict[tuple[str, str], Pair] = {
    ("kidney", "stone"): ("focus", "光团"),
    ("vessel", "soft"): ("plaque", "斑块"),
    ("vessel", "calcified"): ("plaque", "斑块"),
    ("thyroid", ""): ("nodule", "结节"),
    ("gynaecology", "fibroid"): ("nodule", "结节"),
    ("heart", ""): ("mass", "团块"),
    ("", ""): ("lesion", "病灶"),
}


def noun(organ: str, diagnosis: str) -> Pair:
    return NOUNS.get((organ, diagnosis)) or NOUNS.get((organ, "")) or NOUNS["", ""]
