"""A report's text and its two sections, findings and impression: joined, and told apart again."""

import re

# What the sections are called where we write them.
HEADINGS = {"zh": ("超声所见：", "超声提示："), "en": ("Findings: ", "Impression: ")}

# What they are called where we read them. The long names are taken for headings inside a line
# too ("… 。超声提示：…"); the short ones are words of any sentence, so only at a line's start.
_FINDINGS = r"(?:超声|检查|影像|图像|超声检查|超声影像)(?:所见|描述|表现)"
_FINDINGS_EN = r"(?:ultrasound|sonographic|us|imaging)\s+findings?"
_IMPRESSION = (
    r"(?:超声|影像|检查|超声检查)(?:提示|诊断(?:意见|结论)?|印象|结论|意见)|诊断(?:意见|提示|结论)"
)
_IMPRESSION_EN = r"(?:ultrasound|sonographic|us|imaging)\s+(?:impressions?|conclusions?|diagnosis)"
_SHORT_FINDINGS = r"所见|描述|findings?"
_SHORT_IMPRESSION = r"提示|印象|结论|诊断|impressions?|conclusions?|diagnosis"

_NUMBER = r"(?:[一二12][、.．]\s?)?"
_OPEN, _CLOSE = r"(?:[【\[(（「]|\*\*|#{1,6}\s)?", r"(?:[】\])）」]|\*\*)?"


def _heading(names: str) -> str:
    """A heading: perhaps numbered, bracketed or bold, then a colon or the line's end."""
    return (
        rf"{_NUMBER}{_OPEN}{_NUMBER}(?:{names}){_CLOSE}\s?(?:[:：]\s?(?:\*\*)?|(?=\n)|(?<=[】\]]))"
    )


_AT_START = r"(?:^[^\S\n]{0,8})"
_INSIDE = r"(?<=[。；;.!！?？\s])"
_MARK = re.compile(
    rf"{_AT_START}(?:(?P<f1>{_heading(f'{_FINDINGS}|{_FINDINGS_EN}|{_SHORT_FINDINGS}')})"
    rf"|(?P<i1>{_heading(f'{_IMPRESSION}|{_IMPRESSION_EN}|{_SHORT_IMPRESSION}')}))"
    rf"|{_INSIDE}(?:(?P<f2>{_NUMBER}{_OPEN}(?:{_FINDINGS}|{_FINDINGS_EN}){_CLOSE}\s?[:：])"
    rf"|(?P<i2>{_NUMBER}{_OPEN}(?:{_IMPRESSION}|{_IMPRESSION_EN}|impression){_CLOSE}\s?[:：]))",
    re.IGNORECASE | re.MULTILINE,
)
_TITLE = re.compile(
    r"\s*(?:[【\[(（#*\s]*(?:超声(?:检查|影像|诊断)?报告(?:单)?|(?:ultrasound|sonographic)?\s?report)"
    r"[】\])）*]*\s?[:：]?\s*\n)?",
    re.IGNORECASE,
)


def join_report(findings: str, impression: str, language: str) -> str:
    """A report's text: two headed sections, each on its line. `split_report` takes it apart."""
    first, second = HEADINGS[language]
    return f"{first}{findings.strip()}\n{second}{impression.strip()}"


def split_report(text: str) -> tuple[str, str] | None:
    """The findings and the impression of a report with headed sections, Chinese or English.

    The text begins with one of the two headings, after at most a title; the first heading of the
    other kind ends that section: 'Ultrasound findings: A. Ultrasound impression: B.' is
    ('A.', 'B.'). Headings may be numbered, bracketed or bold, and followed by a colon or a line's
    end.

    Returns:
      None where it is no such text: no heading at its beginning, a section that is missing or
      empty, or findings twice (several reports in one).
    """
    title = _TITLE.match(text)
    body = text[title.end() if title else 0 :]
    marks = [(m.start(), m.end(), m.lastgroup or "") for m in _MARK.finditer(body)]
    if not marks or marks[0][0] != 0:
        return None
    kind = marks[0][2][0]
    cut = next((mark for mark in marks if mark[2][0] != kind), None)
    findings_headings = sum(mark[2][0] == "f" for mark in marks)
    if cut is None or findings_headings != 1:
        return None
    first, second = body[marks[0][1] : cut[0]].strip(" \t\n;；*"), body[cut[1] :].strip(" \t\n*")
    if not first or not second:
        return None
    return (first, second) if kind == "f" else (second, first)
