"""A report's two sections, joined and taken apart."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echovlm_jax.data.record import LANGUAGES
from echovlm_jax.data.sections import join_report, split_report

WORDS = st.lists(
    st.sampled_from(["肝脏", "回声均匀。", "node", "12 mm", "提示", "(a)", "-", "findings"]),
    min_size=1,
).map(" ".join)


@given(WORDS, WORDS, st.sampled_from(LANGUAGES))
def test_what_is_joined_comes_apart_as_it_was(findings, impression, language):
    assert split_report(join_report(findings, impression, language)) == (findings, impression)


@pytest.mark.parametrize(
    "text, sections",
    [
        ("超声所见：甲。\n超声提示：乙。", ("甲。", "乙。")),
        ("检查所见: 甲，提示：不是标题。\n诊断意见：\n1.乙", ("甲，提示：不是标题。", "1.乙")),
        ("【超声所见】\n甲\n【超声提示】乙", ("甲", "乙")),
        ("一、超声所见：甲。二、超声提示：乙。", ("甲。", "乙。")),
        ("超声检查报告\n超声描述：甲；诊断结论：乙", ("甲", "乙")),
        ("Ultrasound findings: A 3.2 cm; Ultrasound impression: B.", ("A 3.2 cm", "B.")),
        ("**Findings:** a b\n**Impression:** c", ("a b", "c")),
        ("## Findings\na\n## IMPRESSION\nb", ("a", "b")),
        ("Ultrasound Report\n  FINDINGS:\n a\n\n  Conclusion:\n b", ("a", "b")),
        ("Impression: b\nFindings: a", ("a", "b")),
        ("Findings: a\nImpression: b\nDiagnosis: c", ("a", "b\nDiagnosis: c")),
    ],
)
def test_headings_in_use(text, sections):
    assert split_report(text) == sections


@pytest.mark.parametrize(
    "text",
    [
        "",
        "肝脏大小正常，提示：脂肪肝",  # no report with headings, a sentence
        "见下。超声所见：甲\n超声提示：乙",
        "超声所见：\n超声提示：乙",
        "超声所见：甲\n超声提示：",
        "超声所见：甲",
        "Findings of note: a\nImpression: b",
        "Findings: a\nImpression: b\nFindings: c\nImpression: d",
    ],
)
def test_other_texts_are_left_alone(text):
    assert split_report(text) is None


@given(st.text(st.sampled_from("超声所见提示：: \n【】*#一、。;Findings"), max_size=300))
def test_any_text_gives_two_sections_or_none(text):
    found = split_report(text)
    assert found is None or all(section and section in text for section in found)


def test_captions_of_real_records_are_no_reports(public_data):
    for path in sorted((public_data / "echovlm_public").glob("*.json")):
        for record in json.loads(path.read_text("utf-8")):
            assert split_report(record["description"]) is None
