"""Yes or no, read from a free text.

A clause gives a verdict by a word ("correct", "错误"), turned round by each negation that governs
the word. A negation that may or may not govern it makes the clause say nothing. Verdicts come in
two strengths: what judges ("yes", "the statement is false", "描述正确"), and what may only
describe
the picture ("no mismatch", "一致"), which is heard where nothing stronger is said. Verdicts that
contradict each other are none.
"""

import json
import re
from pathlib import Path
from typing import Any

from echovlm_jax.evaluate.negation import clauses, refuses, widths

YES, NO = "yes", "no"
_STRONG, _WEAK = 0, 1
Verdict = tuple[int, bool]  # strength, and whether it is yes

_TABLES: dict[str, Any] = json.loads(Path(__file__).with_name("judgement.json").read_text("utf-8"))


def _words(name: str) -> dict[str, bool]:
    """Each word of a table with its two columns: word → whether it is a yes."""
    return {word: kind == "yes" for kind in ("yes", "no") for word in _TABLES[name][kind]}


# English. Adjectives count where they are predicates: neither "right lobe" nor "the true lumen".
# ("ture": as questions of public sets spell it, and so the models that learn from them.)
_ADJECTIVES = _words("adjectives")
_STANDING = {  # in any place: (strength, value)
    word: (_STRONG if kind.startswith("strong") else _WEAK, kind.endswith("yes"))
    for kind, listed in _TABLES["standing"].items()
    for word in listed
}
_NOT, _SUBJECTS = set(_TABLES["not"]), set(_TABLES["subjects"])
_OPINIONS, _VERBS = set(_TABLES["opinions"]), set(_TABLES["verbs"])
_BEFORE_RIGHT = _VERBS | set(_TABLES["before_right"])
_UNSURE, _STATEMENTS = set(_TABLES["unsure"]), set(_TABLES["statements"])
# What may follow a predicate, or the "no" that answers.
_AFTER, _AFTER_NO = set(_TABLES["after"]), set(_TABLES["after_no"])
_CLAIMS = re.compile(
    r"\b(?:statement|description|answer|claim|report|caption|conclusion|assertion|sentence)"
    r" (?:that|says|saying|stating|of$)"
)
_IDIOMS = re.compile(
    r"\b(?:there(?:'s| is) )?(?:no|without(?: an?| any)?|beyond(?: an?| any)?) (?:doubt|question)\b"
    r"|\bno (?:problem|worries)\b|\bnot only\b|\bundoubtedly\b"
    r"|\b(?:true|ture|yes|right|correct)\s*(?:or|/)\s*(?:false|no|wrong|incorrect|not)\b"
    r"|毫无疑问|毫无疑义|毫无异议|无疑|是或否|是/否|对或错|对还是错|正确或错误|正确还是错误"
)

_CONDITION = re.compile(r"\bif\b|\bunless\b|\bprovided that\b|如果|假如|假设|除非|的话")
_QUOTED = re.compile(r"[\"“「『][^\"“”「」『』]{1,500}[\"”」』]")

# Chinese.
_WHOLE = _words("whole")
_WORDS = re.compile(
    r"(?P<strong_yes>正确|准确|属实|无误|真实(?!情况)|成立|(?<![比核配针面校应相])对(?=的?$))"
    r"|(?P<strong_no>有误|错误|不实|失实|虚假|错(?![构位综落觉杂过]))"
    r"|(?P<weak_yes>一致(?!性)|相符|吻合|匹配(?!度)|对应|相合|对得上|没问题|无问题"
    r"|符合(?=$|实际|事实|图|影像|描述|所见|报告|上述|该|此))"
    r"|(?P<weak_no>(?<=有)(?:问题|出入|偏差|差异|矛盾)|不妥|不当|不符(?!合)|对不上)"
)
_FILLER = re.compile(
    r"(?:并|也|都|完全|太|很|够|十分|怎么|大|能够?|会|是|算|存在|明显|任何|什么|有|发现|见|看出|看到"
    r"|那么|全|尽|丝毫|相|互|出现|以|说)$"
)
_NEGATOR = re.compile(r"(?:不(?:太|大)?可能|并非|没有|没|不|无|未|非|欠)$")
_FAR = re.compile(r"不认为|不觉得|不同意|不能说|不能认为|并非|并?不是|谈不上|说不上|算不上|很?难说")
_ANY = re.compile(r"[不没无未]|非(?!常)")
_PARTLY = re.compile(
    r"谁说|难道|岂|怎么[可会能]|部分|(?<![不太大])可能|也许|或许|未必|不一定|不见得|一半"
)
# "The correct description is …" says nothing about the one that was asked about.
_TITLE = re.compile(
    r"正确的?(?:答案|描述|说法|表述|诊断|选项|结论|报告)(?:(?:应该?|应当)?[是为]|应)"
    r"|^正确的(?:应该?|应当)?[是为]|^正确的?(?:答案|描述|说法|表述|诊断|选项|结论|报告)$"
)
_LEAD = re.compile(
    r"(?:(?:正确|最终)的?)?(?:答案|回答|结论|判断|结果)(?:应该?|应当)?(?:[是为](?!否(?!定)\w)|(?=\s*:))\s*:?"
)
_END_WORDS = re.compile(r"[的呀啊哦呢了吧啦哈]+$")


def judgement(text: str) -> str | None:
    """YES or NO, or None where a text says neither, both, or that it can't say."""
    text = widths(text)
    if refuses(text) or _CONDITION.search(text.casefold()):
        return None
    found: set[Verdict] = set()
    for clause in clauses(_LEAD.sub(" ", _QUOTED.sub(_unquoted, text))):
        if not clause.asks:
            found |= _verdicts(_IDIOMS.sub(" ", clause.text))
    for strength in (_STRONG, _WEAK):
        said = {yes for level, yes in found if level == strength}
        if said:
            return None if len(said) > 1 else YES if said.pop() else NO
    return None


def _unquoted(found: re.Match[str]) -> str:
    """One quoted word is an answer; a quoted sentence is what the answer is about."""
    inside = found.group()[1:-1].strip()
    whole = found.group() == found.string.strip(" .。!")
    return inside if whole or re.fullmatch(r"[a-zA-Z]+|[^\x00-\x7f]{1,4}", inside) else "it"


def _verdicts(clause: str) -> set[Verdict]:
    return _english(clause) | _chinese(clause)


def _english(clause: str) -> set[Verdict]:
    clause = re.sub(r"\b(\w+?)n't\b", r"\1 not", clause.replace("cannot", "can not"))
    if re.fullmatch(r"(?:hardly|unlikely)|.*\bdoubt (?:it|this|that)", clause):
        return {(_STRONG, False)}
    clause = re.sub(r"\b(it|that|this|he|there|what|nothing)'s\b", r"\1 is", clause)
    words = re.findall(r"[a-z]+(?:['-][a-z]+)*|[^\s\x00-\x7f]+|\d[\d.]*", clause)
    found: set[Verdict] = set()
    judged = [i for i, word in enumerate(words) if word in _ADJECTIVES and _is_predicate(words, i)]
    if len(judged) > 1 and words[judged[0] + 1] in ("that", "to"):
        return found  # "it is false that the statement is wrong": one verdict about another
    for i, word in enumerate(words):
        if word == "no" and (i + 1 == len(words) or words[i + 1] in _AFTER_NO):
            found.add((_STRONG, False))
        elif i in judged:
            found |= _turned(words, i, _STRONG, _ADJECTIVES[word])
        elif word in _STANDING:
            found |= _turned(words, i, *_STANDING[word])
        elif word == "consistent" and words[i + 1 : i + 3] in ([], ["with", "the"], ["with", "it"]):
            found |= _turned(words, i, _WEAK, True)
    if not found and re.search(
        r"\bnot(?: at all| really| so| quite| the case| think so)?$", clause
    ):
        found.add((_STRONG, False))  # "it is not"
    elif re.search(r"\bi think so$|\bcertainly$|\bof course$|\bdefinitely$|\babsolutely$", clause):
        found |= set() if _NOT.intersection(words) else {(_STRONG, True)}
    return found


def _is_predicate(words: list[str], i: int) -> bool:
    before = words[i - 1] if i else ""
    after = words[i + 1] if i + 1 < len(words) else ""
    if before == "the" or (words[i] == "right" and before and before not in _BEFORE_RIGHT):
        return False
    return not after or after in _AFTER or after in _STATEMENTS


def _turned(words: list[str], i: int, strength: int, value: bool) -> set[Verdict]:
    """The verdict of words[i] after the negations before it; none where they may not reach it."""
    verbs = 0
    for j in range(i - 1, -1, -1):
        word = words[j]
        if word in _UNSURE:
            return set()
        if word in _VERBS:
            verbs += 1
        elif not word.isascii():
            value ^= bool(_FAR.search(word) or _NEGATOR.search(word))
        elif word in _NOT and not (word == "no" and words[j + 1] in _AFTER_NO):
            if word in _SUBJECTS and _CLAIMS.search(" ".join(words[:j])):
                return set()  # it belongs to what is claimed
            opinion = words[j + 1] in _OPINIONS
            if verbs > (opinion or word in _SUBJECTS or j == 0):
                return set()
            value = not value
            if word == "nor":  # "neither" before it has been heard
                break
    return {(strength, value)}


def _chinese(clause: str) -> set[Verdict]:
    clause = _TITLE.sub("", re.sub(r"(?<=[^\x00-\x7f]) (?=[^\x00-\x7f])", "", clause).strip())
    whole = _END_WORDS.sub("", clause)
    whole = re.sub(
        r"^(?:我(?:认为|觉得|判断|回答))?(?:应该?|大概|当然|显然|绝对|确实|恐怕)?(?=.)", "", whole
    )
    if (value := _WHOLE.get(whole)) is not None:
        return {(_STRONG, value)}
    found: set[Verdict] = set()
    for match in _WORDS.finditer(clause):
        strength, _, value = (match.lastgroup or "").partition("_")
        rest, yes = clause[: match.start()], value == "yes"
        if _PARTLY.search(rest):
            continue
        while found_word := _NEGATOR.search(rest) or _FILLER.search(rest):
            yes ^= found_word.re is _NEGATOR
            rest = rest[: found_word.start()]
        far = len(_FAR.findall(rest))
        if _ANY.search(_FAR.sub("", rest)):
            continue
        found.add((_STRONG if strength == "strong" else _WEAK, yes ^ bool(far % 2)))
    if clause.startswith(("是的", "对的", "没错")):
        found.add((_STRONG, True))
    if clause.startswith("不是的"):
        found.add((_STRONG, False))
    return found
