"""What a free text asserts, denies or leaves open, in Chinese and English.

The rule behind all of it: where it is not plain whether a negation reaches a word, nothing is said
about that word. An answer that can't be read is counted; it is never guessed.
"""

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

AFFIRMED, DENIED, OPEN = "affirmed", "denied", "open"
EDGE = " \t\n.,:;!?。，、：；！？…\"'“”‘’()（）[]【】<>《》「」*_`~-—"
# A full stop inside a number and a dash inside a word end nothing.
_END = re.compile(
    r"(?:[,;:!?。…\n()\[\]【】]|\.(?!\d)|[—–]+|\s-+\s|\b(?:but|however|although|though|yet|whereas)\b"
    r"|但是?|然而|不过|而是|因为|所以)+"
)
_ASKS = re.compile(
    r"\b(?:whether|is it|are they|does it|if it)\b|是否(?!定)|是不是|(?<!绝)对不对|[吗么]$|还是"
)

# The answer is that there is none. What only describes a picture ("the margin is unclear") is none.
_FIND = (
    r"(?:tell|say|judge|determin|decide|know|answer|assess|confirm|verify|evaluat|interpret|provid"
    r"|assist|help|conclude|establish|diagnos|identify|comment|see (?:the|an?y?) (?:image|picture))"
)
_NOT = (
    r"(?:can ?not|can't|couldn't|could not|unable to|not able to|(?:im|not )possible to|hard to"
    r"|difficult to|do not|don't|did not|didn't)"
)
_REFUSALS = re.compile(
    rf"{_NOT} (?:\w+ ){{0,2}}{_FIND}"
    r"|\bnot (?:sure|certain|enough|clear (?:if|whether)|possible|determined|applicable)\b"
    r"|\b(?:unsure|undetermined|inconclusive|no idea|n/a|as an ai|unclear (?:if|whether))\b"
    r"|\buncertain\b(?! (?:\w+ )?(?:margin|border|origin|nature))"
    r"|^\W*(?:it(?:'s| is) )?(?:unclear|uncertain|insufficient|unknown)\b\W*$"
    r"|\binsufficient (?:\w+ )?(?:information|data|evidence|detail)"
    r"|\bno (?:\w+ )?(?:image|picture)s? (?:\w+ ){0,3}(?:provided|given|attached|visible|shown)"
    r"|\bplease (?:\w+ )?(?:provide|upload|share|send|attach)|\bneed more\b|\bwho knows\b"
    r"|(?:无法|不能|难以|不便|没办法|没法|未能|不可)[^,。;不]{0,8}"
    r"(?:判断|确定|回答|判定|识别|辨别|辨认|确认|作答|评估|得出|提供|给出|[做作]出|分辨|明确|诊断|查看|看到图|下结论)"
    r"|不确定|不知道|不好说|说不准|说不好|不得而知|存疑|待定|待查|看不清(?:图|楚图)|我(?:也)?不清楚|^\W*不清楚\W*$"
    r"|(?:信息|资料|证据|图像|依据)不足|没有足够|不足以|请(?:您|你|先|重新){0,2}(?:提供|上传|补充|发送)"
    r"|没有(?:看到|收到)?(?:图像|图片)"
)


# What is struck out, and what is thought aloud before the answer.
_WITHDRAWN = re.compile(r"~~.+?~~|<(del|think(?:ing)?)>.*?(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_ALL_BUT = re.compile(r"(?:any|every)thing but")  # here "but" begins no new thought


class Clause(NamedTuple):
    text: str
    asks: bool  # a question, which asserts nothing


def widths(text: str) -> str:
    """A text with full-width letters, digits and signs made plain, one kind of apostrophe, and
    without Markdown's marks of weight, LaTeX's of boxes and fonts, and what was withdrawn."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'").replace("‘", "'")
    text = _WITHDRAWN.sub(" ", text)
    text = re.sub(r"\\(?:boxed|fbox|text\w*|math\w+)\s*(?=\{)", "", text, flags=re.IGNORECASE)
    return re.sub(r"\*+|`+|__+|[{}$]", "", text)


def small(text: str) -> str:
    """ASCII letters made small: as long as the text, so that places in both are the same."""
    text = re.sub(r"[A-Z]+", lambda found: found.group().lower(), text)
    return _ALL_BUT.sub(lambda found: "not".ljust(len(found.group())), text)


def refuses(text: str) -> bool:
    """Whether a text says that it can't or won't answer."""
    return bool(_REFUSALS.search(" ".join(small(widths(text)).split())))


def hedges(text: str) -> bool:
    """Whether a text leaves something not excluded, beside whatever else it names."""
    return bool(_HEDGES.search(" ".join(small(widths(text)).split())))


def clauses(text: str) -> list[Clause]:
    """The pieces of a text between signs and words that begin a new thought, in small letters."""
    out: list[Clause] = []
    text = small(widths(text))
    for piece, sign in _pieces(text):
        asks = "?" in sign or bool(_ASKS.search(piece.strip()))
        if asks and out and piece.strip().startswith(("or ", "或")):
            out[-1] = Clause(out[-1].text, True)
        if piece.strip(EDGE):
            out.append(Clause(" ".join(piece.split()).strip(EDGE), asks))
    return out


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    for found in _END.finditer(text):
        yield text[at : found.start()], found.group()
        at = found.end()
    yield text[at:], ""


# What stands before or after a name and denies it, or leaves it open. Behind a name only what
# is about the name counts: "benign nodule without flow" and "良性结节未见血流" are benign.
_OUT = r"(?:exclud\w*|rul(?:es?|ed|ing) (?:\w+ )?out)"
_NOT_OUT = r"(?:不|不能|不可|无法|未|未能|没有|没|难以|尚不能)(?:完全|可以|以)?(?:排除|除外|否认)"
# Whatever it is that can't be excluded, an answer that says so has not decided.
_HEDGES = re.compile(
    r"(?:\bnot|n't|\bnever|\bcannot|\bunable to|\b(?:difficult|hard|impossible) to)"
    rf" (?:(?:yet|to|be|been|entirely|\w+ly|with \w+) ){{0,3}}{_OUT}\b"
    r"|\b(?:remains?|still) (?:a )?possib(?:le|ility)\b|(?<!able )\bto (?:exclude|rule out)\b"
    r"|(?:建议|需要?|须|请|进一步|穿刺|活检|复查|随访)[^,。;]{0,8}(?:排除|除外)"
    r"|(?:probability|likelihood|chance|risk|可能性?|概率|风险)[^\d,。;]{0,12}[0-4]?\d(?:\.\d+)?\s?%"
    r"|(?<![\d.])[0-4]?\d(?:\.\d+)?\s?%,? ?(?:\w+ )?(?:probability|likelihood|chance|risk|likely)"
    r"|(?<![\d.])(?:[0-4]?\d(?:\.\d+)?|50)\s?% ?(?:malignan|benign|[恶良]性)"
    r"|(?:malignan(?:t|cy)|benign|[恶良]性) ?[(:=]? ?(?:[0-4]?\d(?:\.\d+)?|50)\s?%"
    rf"|{_NOT_OUT}|不(?:排除|除外)|待(?:排|除外|鉴别)"
)
_IS = r"(?:is|are|was|were|does|do|can|could|would|should|has|have|seems|looks)"
# 不清, 不规则 … describe a picture and deny nothing.
_NOT_LOOKS = r"(?!清|如|规则|均|光|整|齐|明|平|对称|连续|典型|同|一|完整|厚|大)"
_OPEN_BEFORE = re.compile(
    rf"(?:\bnot\b|n't\b|cannot|unable to|difficult to|hard to|impossible to)[^,;]{{0,20}}\b{_OUT}"
    rf"|{_NOT_OUT}|\b(?:not|n't|never) (?:\w+ )?(?:non|not)\b"
    r"|(?:不是|并非|没有说)(?:没有|非|不)"
)
_DENIED_BEFORE = re.compile(
    r"\b(?:no|not|non|without|never|neither|nor|nothing|cannot|except|instead of"
    r"|other than|apart from|rather than|unlikely|against"
    r"|absence of|negative for|free of|less likely|least (?:likely|probable)|lacks?|far from"
    r"|low (?:probability|likelihood|risk|suspicion|chance) (?:of|for)|doubtful|r/o"
    rf"|(?:wrong|incorrect|inaccurate|mistake|error|mistaken|misleading) to|{_OUT})\b|n't\b"
    r"|不是|并非|而非|与其说?|非(?!常|典型|特异|均[质匀]|对称)|未见|未发现|未探及|未显示|未提示|未|没有|没"
    r"|无(?!回声|痛|症状|包膜|创)|排除|除外|除了|否认|否定|别选|勿选|[非未没除]$"
    rf"|不{_NOT_LOOKS}[^的,]{{0,3}}$"
    r"|(?:wrong|incorrect) (?:option|answer|one) is|错误的?(?:选项|答案|说法)?是"
    r"|不(?:太|大|应该?|该|能|会|可能?|再|予|宜)?"
    r"(?:选|是|考虑|支持|符合|像|提示|属于?|诊断|倾向|为|存在|认为|具备?|可能)"
)
_KIND = r"(?:可能性?|风险|概率|病变|病灶|结节|肿瘤|征象|选项|说法|项|的|诊断){0,3}"
_OPEN_AFTER = re.compile(
    rf"^\s*(?:\w+ ){{0,3}}(?:can ?not|can't|couldn't|not|to) (?:\w+ )?(?:be )?{_OUT}"
    rf"|^\s*(?:\w+ ){{0,2}}is (?:difficult|hard|impossible) to {_OUT}"
    rf"|^{_KIND}(?:尚|仍)?(?:{_NOT_OUT}|待(?:排|除外|查|定|鉴别)\w*)(?:可能)?$"
    rf"|^\s*{_IS}(?:n't| not) (?:\w+ )?(?:wrong|incorrect|false)\b"
)
_DENIED_AFTER = re.compile(
    rf"^\s*(?:\w+ ){{0,2}}(?:(?:{_IS}|be|been) (?:\w+ )?)?"
    rf"(?:{_OUT}|unlikely|wrong|incorrect|false|untrue|absent|less likely)\b"
    rf"|^\s*(?:\w+ ){{0,3}}{_IS}(?:n't| not)(?: (?:seen|present|likely|supported|found|correct"
    r"|right|true|accurate|evident|considered|it|so|an? (?:option|answer)"
    r"|the (?:\w+ )?(?:answer|option|choice|one)))?\s*$"
    rf"|^{_KIND}(?:可以?|已经?|被|完全|应该?|基本|暂|均|都|是|为){{0,3}}"
    r"(?:错误?的?|有误|不(?:太|大)?(?:正确|准确|对|符|成立|合适|妥|存在|可能)"
    r"|(?:可以?|应)?(?:排除|除外|否定|不支持|不考虑|不像|不是|未见)了?$"
    rf"|(?:较|很|极|比较)?(?:小|低)$|不大$|不明显$|(?:几乎|基本|近乎)?(?:为|是|等于)?零$|几乎没有|微乎其微|以外|之外|(?:依据|证据)不足|不{_NOT_LOOKS}[^,]{{0,3}}$)"
)
_SENTENCE = re.compile(
    r"[;!?。\n]|\.(?!\d)|\b(?:but|however|although|though|yet|whereas)\b|但|然而|而(?=是)|后(?=选)"
)
_VERDICT = re.compile(
    rf"\s*[:,(-]\s*(?:no|not|false|wrong|negative|{_OUT}|否|不是|不对|错误?|排除|阴性|无)"
    r"\s*(?:$|[,.;:!?。)\n])"
)


def status(text: str, start: int, end: int) -> str:
    """Whether a text AFFIRMED, DENIED or leaves OPEN what stands at text[start:end].

    Args:
      text: the result of `widths` and `small`.
    """
    before, rest = _SENTENCE.split(text[:start])[-1], text[end:].lstrip(")]】」\"'*")
    stop = _END.search(rest)
    after = (rest[: stop.start()] if stop else rest).rstrip(EDGE)
    asked = stop is not None and "?" in stop.group()
    *earlier, last = re.split(r"[,:]", before)
    if asked or _ASKS.search((last + text[start:end] + after).strip()):
        return OPEN
    # A negation ends at a comma, unless a list goes on over it: "no cyst, stone or mass".
    reach = before if earlier and re.search(r"\b(?:or|nor)\b", last + after) else last
    if _OPEN_BEFORE.search(reach) or _OPEN_AFTER.search(after):
        return OPEN
    if _DENIED_BEFORE.search(reach) or _DENIED_AFTER.search(after) or _VERDICT.match(rest):
        return DENIED
    return AFFIRMED
