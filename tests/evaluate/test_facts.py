"""What a report states: against the phantom's parameters, real reports read by hand, properties."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest

from echovlm_jax.data.record import ORGANS
from echovlm_jax.data.sections import join_report
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate import facts as rules
from echovlm_jax.evaluate.fact_metrics import (
    FACT_METRICS,
    compare_facts,
    facts_by_attribute,
    score_facts,
)
from echovlm_jax.evaluate.facts import ATTRIBUTES, Fact, read_facts
from echovlm_jax.phantom.exam import make_exam
from echovlm_jax.phantom.reports import reports
from tests.evaluate.phantom_facts import facts_of

TABLE = json.loads(Path(rules.__file__).with_suffix(".json").read_text("utf-8"))
LABELS = json.loads(Path(__file__).with_name("facts_labels.json").read_text("utf-8"))
EXAMS = [make_exam(key, organ) for key in range(100) for organ in ORGANS]


def written(exam, language):
    report = next(report for report in reports(exam) if report.language == language)
    return join_report(report.findings, report.impression, language)


def said(text, language):
    """Facts as the label sheet writes them."""
    return {_label(fact) for fact in read_facts(text, language).facts}


def _label(fact):
    value = fact.value
    if isinstance(value, tuple):
        value = "x".join(f"{side:g}" for side in value)
    return f"{'' if fact.present else 'not '}{fact.subject}/{fact.attribute}/{value}"


@pytest.mark.parametrize("language", ["zh", "en"])
def test_phantom_reports_state_their_parameters(language):
    both = wanted = stated = 0
    for exam in EXAMS:
        expected, found = facts_of(exam), read_facts(written(exam, language), language)
        both += len(expected & found.facts)
        wanted, stated = wanted + len(expected), stated + len(found.facts)
        assert (found.contradictions, found.repeated) == (0, 0)
        # The scene of half the organs says nothing that can be compared.
        assert found.unread <= 3 < found.clauses
    assert 200 * both / (wanted + stated) >= 99


def test_all_parameters_occur():
    stated = {fact.attribute for exam in EXAMS for fact in facts_of(exam)}
    assert stated == set(ATTRIBUTES) - {"flow", "category"}


@pytest.mark.parametrize("language", ["zh", "en"])
def test_another_exam_of_the_organ_has_other_facts(language):
    scores = []
    for organ in ORGANS:
        texts = [written(exam, language) for exam in EXAMS if exam.organ == organ]
        scores.append(score_facts(texts, texts[1:] + texts[:1], language)["facts_f1"])
    assert max(scores) < 80


@pytest.mark.parametrize("sample", ["first", "second"])
def test_real_reports_are_read_as_by_hand(public_data, sample):
    """Agreement: statements that both make, in those that either makes."""
    texts = {
        f"{path.stem}/{record['id']}": record["conversations"][-1]["value"]
        for path in (public_data / "echovlm_public").glob("*.json")
        for record in json.loads(path.read_text("utf-8"))
    }
    assert len(LABELS[sample]) == {"first": 200, "second": 72}[sample]
    either = both = 0
    for line in LABELS[sample]:
        read, by_hand = said(texts[line["id"]], "zh"), set(line["facts"])
        either, both = either + len(read | by_hand), both + len(read & by_hand)
    assert both / either >= {"first": 0.95, "second": 0.90}[sample]


def test_the_sheets_are_of_different_reports_and_of_facts_that_exist():
    ids = [line["id"] for sample in ("first", "second") for line in LABELS[sample]]
    assert len(ids) == len(set(ids))
    for fact in {
        fact for sample in ("first", "second") for x in LABELS[sample] for fact in x["facts"]
    }:
        subject, attribute, value = fact.removeprefix("not ").split("/")
        assert subject in {*TABLE["subjects"], "report"} and attribute in ATTRIBUTES
        known = TABLE["attributes"].get(attribute, {}).get("values")
        assert known is None or value in known


def test_the_table_is_whole():
    for name, of in TABLE["attributes"].items():
        assert set(of["of"]) <= {*TABLE["subjects"], "report"}, name
        values = set(of["values"])
        for part in (of.get("opposite", {}).items(), *of.get("exclusive", ())):
            assert {
                word for pair in part for word in ([pair] if isinstance(pair, str) else pair)
            } <= values
        for language in ("en", "zh"):
            assert all(words[language] for words in of["values"].values())
            # A name is needed where a term says so.
            named = any(
                t.startswith("~") for words in of["values"].values() for t in words[language]
            )
            assert not named or name == "structure" or of["names"][language]
    for part in ("organs", "subjects"):
        assert all(of[language] for of in TABLE[part].values() for language in ("en", "zh"))
    assert set(TABLE["organs"]) == set(ORGANS)


@pytest.mark.parametrize(
    ("language", "text", "facts"),
    [
        ("en", "No calcification.", "not lesion/calcification/any"),
        ("en", "Calcification is not seen.", "not lesion/calcification/any"),
        ("en", "Calcification is absent.", "not lesion/calcification/any"),
        ("en", "without calcification", "not lesion/calcification/any"),
        ("en", "Calcifications are seen", "lesion/calcification/any"),
        ("en", "Calcification cannot be excluded.", ""),
        ("en", "Is there calcification?", ""),
        (
            "en",
            "No nodule, mass or shadowing.",
            "not lesion/lesion/any not lesion/posterior/shadow",
        ),
        ("en", "The ducts are not dilated.", "ducts/structure/normal"),
        ("en", "The ducts are dilated.", "ducts/structure/wide"),
        ("zh", "未见钙化", "not lesion/calcification/any"),
        ("zh", "无明显钙化", "not lesion/calcification/any"),
        ("zh", "未探及钙化", "not lesion/calcification/any"),
        ("zh", "钙化未见", "not lesion/calcification/any"),
        ("zh", "内见钙化", "lesion/calcification/any"),
        ("zh", "不能排除钙化", ""),
        ("zh", "是否有钙化？", ""),
        ("zh", "未见结节及钙化", "not lesion/lesion/any not lesion/calcification/any"),
        ("zh", "未见钙化，血流信号丰富", "not lesion/calcification/any lesion/flow/any"),
        ("zh", "导管未见扩张", "ducts/structure/normal"),
        ("zh", "导管扩张", "ducts/structure/wide"),
        ("zh", "未见无回声结节", "not lesion/lesion/any"),
    ],
)
def test_negation_reaches_its_clause(language, text, facts):
    assert said(text, language) == set(re.findall(r"(?:not )?[^ ]+", facts))


@pytest.mark.parametrize(
    ("language", "text", "value"),
    [
        ("en", "A nodule of 12 mm", (12.0,)),
        ("en", "A nodule of 1.2 cm", (12.0,)),
        ("en", "A nodule of 0.8 x 1.2 cm", (12.0, 8.0)),
        ("en", "A 12mm x 8mm x 5 mm nodule", (12.0, 8.0, 5.0)),
        ("en", "A nodule, 35 by 20 millimetres", (35.0, 20.0)),
        ("zh", "结节大小约1.2×0.8cm", (12.0, 8.0)),
        ("zh", "结节大小约12毫米*8毫米", (12.0, 8.0)),
        ("zh", "结节约１．２厘米", (12.0,)),
        ("en", "A nodule of 2 cm2", None),
        ("en", "A nodule with flow of 30 cm/s", None),
        ("en", "A nodule of 3 ml", None),
        ("en", "Nodule 4", None),
    ],
)
def test_sizes_are_read_in_millimetres(language, text, value):
    found = [fact for fact in read_facts(text, language).facts if fact.attribute == "size"]
    assert found == ([Fact("lesion", "size", value)] if value else [])


@pytest.mark.parametrize(
    ("wanted", "stated", "same"),
    [
        ((12.0,), (12.9,), True),
        ((12.0,), (13.2,), False),
        ((12.0, 8.0), (12.5,), True),
        ((12.0, 8.0), (12.5, 5.0), False),
        ((1.4,), (1.6,), False),
    ],
)
def test_sizes_agree_within_a_tenth(wanted, stated, same):
    one, other = Fact("lesion", "size", wanted), Fact("lesion", "size", stated)
    assert compare_facts([one], [other]) == ({other} if same else set())
    assert not compare_facts([one], [other._replace(subject="ducts")])


def test_a_size_is_met_once():
    near = [Fact("lesion", "size", (12.0,)), Fact("lesion", "size", (12.1,))]
    assert len(compare_facts([Fact("lesion", "size", (12.2,))], near)) == 1


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_report_against_itself_and_without_a_sentence(language):
    end = "。" if language == "zh" else ". "
    shorter = 0
    for exam in EXAMS[:70]:
        text = written(exam, language)
        itself = score_facts([text], [text], language)
        assert itself["facts_f1"] == itself["facts_precision"] == itself["facts_recall"] == 100
        assert itself["hallucinated_per_report"] == 0
        sentences = text.split(end)
        # The last sentence of the findings is of nothing that another one goes on with.
        cut = next(n for n, sentence in enumerate(sentences) if "\n" in sentence) - 1
        less = end.join(sentences[:cut] + sentences[cut + 1 :])
        found = score_facts([text], [less], language)
        assert found["facts_precision"] == 100
        shorter += found["facts_recall"] < 100
    assert shorter > 60


@pytest.mark.parametrize(
    ("language", "before", "clauses"),
    [
        (
            "zh",
            "右叶见一结节",
            ["边界清晰", "形态不规则", "内部回声均匀", "未见钙化", "大小约12 mm"],
        ),
        (
            "en",
            "A nodule is seen",
            ["with clear margins", "irregular in shape", "12 mm", "no shadowing"],
        ),
    ],
)
def test_the_order_of_clauses_does_not_matter(language, before, clauses):
    found = {
        read_facts(", ".join([before, *order]), language).facts
        for order in itertools.permutations(clauses)
    }
    assert len(found) == 1 and len(found.pop()) >= len(clauses)


@pytest.mark.parametrize(
    ("language", "text", "contradictions", "repeated"),
    [
        ("en", "The margin is clear. The margin is ill-defined.", 1, 0),
        ("en", "A nodule is seen. No focal lesion is seen.", 1, 0),
        ("en", "Punctate calcification is seen. No calcification.", 1, 0),
        ("en", "Two nodules, one with clear margins, one with ill-defined margins.", 0, 0),
        ("en", "The margin is clear, partly ill-defined.", 0, 0),
        ("en", "The duct is dilated and the duct is dilated.", 0, 1),
        ("zh", "结节边界清晰，边界模糊。", 1, 0),
        ("zh", "结节边界清晰，部分边界模糊。", 0, 0),
        ("zh", "见低回声结节。未见占位性病变。", 1, 0),
        ("zh", "见结节，边界清晰，形态规则，边界清晰。", 0, 1),
        ("zh", "所见：子宫内膜增厚。\n提示：子宫内膜增厚。", 0, 0),
    ],
)
def test_contradictions_and_repeats_are_counted(language, text, contradictions, repeated):
    found = read_facts(text, language)
    assert (found.contradictions, found.repeated) == (contradictions, repeated)


@pytest.mark.parametrize(
    ("language", "text", "fact"),
    [
        ("en", "A nodule lies beside a duct. It is hypoechoic.", "lesion/echo/hypoechoic"),
        ("en", "The duct is dilated, about 3 mm.", "ducts/size/3"),
        ("en", "The vessels and the diaphragm are blurred.", "vessels/structure/blurred"),
        ("en", "A mass is seen. The surrounding tissue is normal.", "around/structure/normal"),
        ("en", "It is irregular with clear margins.", "organ/shape/irregular"),
        ("zh", "结节位于导管旁，呈低回声", "lesion/echo/hypoechoic"),
        ("zh", "见结节，周围组织回声均匀，未见异常", "around/structure/normal"),
        ("zh", "低回声结节伴后方强回声增强", "lesion/posterior/enhancement"),
        ("zh", "肝实质回声均匀，未见占位，边界清晰", "organ/margin/clear"),
    ],
)
def test_a_statement_is_of_what_the_clause_names(language, text, fact):
    found = said(text, language)
    attribute = fact.split("/")[1]
    same = {one for one in found if one.split("/")[1] == attribute}
    assert fact in same and len({one.split("/")[2] for one in same}) == 1


def test_what_no_rule_reads_is_counted():
    found = read_facts("A nodule is seen. The weather is fine. Follow-up is recommended.", "en")
    assert (found.clauses, found.unread) == (2, 1)
    assert read_facts("", "zh") == (frozenset(), 0, 0, 0, 0)


def test_the_metrics_count_statements():
    references = ["A hypoechoic nodule with clear margins.", "No nodule is seen."]
    predictions = ["A hypoechoic nodule with ill-defined margins and shadowing, 12 mm.", ""]
    found = score_facts(references, predictions, "en", seed=1)
    assert set(FACT_METRICS) <= set(found)
    # Wanted: lesion, echo, margin; no lesion. Stated: lesion, echo, margin, shadow, size.
    assert found["facts_precision"] == 40 and found["facts_recall"] == 50
    assert found["facts_f1"] == pytest.approx(200 * 2 / 9)
    assert found["hallucinated_per_report"] == 1.5
    assert found["facts_unread"] == found["facts_unread_reference"] == 0
    low, high = found["intervals"]["facts_f1"]
    assert low <= found["facts_f1"] <= high
    parts = found["facts_by_attribute"]
    assert parts["lesion"]["wanted"] == 2 and parts["lesion"]["stated"] == 1
    assert parts["echo"]["f1"] == 100 and parts["margin"]["f1"] == 0
    assert set(parts) == {"lesion", "echo", "margin", "posterior", "size"}
    assert rules.RULES in found["signature"]["facts"]


def test_nothing_to_score_and_unknown_languages():
    assert score_facts([], [], "zh")["facts_f1"] is None
    assert facts_by_attribute([], [], "en") == {}
    with pytest.raises(InputError, match="language 'fr' is unknown"):
        score_facts(["a"], ["b"], "fr")


def _every_term(language):
    found = [TABLE[part][language] for part in ("ignored", "partial", "several", "aside")]
    found += [of[language] for part in ("organs", "subjects") for of in TABLE[part].values()]
    for of in TABLE["attributes"].values():
        found += [words[language] for words in of["values"].values()]
    return [term.lstrip("~").replace("…", "") for terms in found for term in terms]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_any_text_is_read(language):
    draw = random.Random(7)
    terms = _every_term(language)
    odd = [
        *",.;:!?()\n、。，×",
        "12",
        "1.2 cm",
        "mm",
        "不",
        "未见",
        "no ",
        "not ",
        "\ud800",
        "\0",
        "İ",
    ]
    for _ in range(400):
        pieces = draw.choices([*terms, *odd * 8], k=draw.randrange(1, 40))
        found = read_facts(draw.choice(["", " "]).join(pieces), language)
        assert 0 <= found.unread <= found.clauses
        assert all(fact.attribute in ATTRIBUTES for fact in found.facts)


@pytest.mark.parametrize(
    "piece", ["不", "见一", "no mass, ", "1.2×", "1", " ", "and the ", "a-", "("]
)
@pytest.mark.parametrize("language", ["zh", "en"])
def test_long_texts_end(language, piece):
    """Time that grows faster than the text would not end here."""
    assert read_facts(piece * (20_000 // len(piece)), language).clauses >= 0
