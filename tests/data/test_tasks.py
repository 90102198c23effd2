"""Conversations made from records: what is asked, what is answered, and how often."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from echovlm_jax.data.record import Medium, Question, Record, Report, Turn
from echovlm_jax.data.sections import split_report
from echovlm_jax.data.tasks import TASKS, compose, mix_for
from echovlm_jax.errors import InputError

LETTERS = "ABCDEFG"


def report(language, number, **changes):
    made = Report(
        language,
        findings=f"findings {language} {number}",
        impression=f"impression {language} {number}",
        caption=f"caption {language} {number}",
        diagnosis=f"label {number % 3}",
        questions=(
            Question(f"how large, {language}?", f"{number} mm"),
            Question(f"which shape, {language}?", "oval", ("round", "oval", "oval ", "irregular")),
        ),
    )
    return replace(made, **changes)


def exam(number, **changes):
    made = Record(
        f"exam {number}",
        "liver",
        media=(Medium(0, 300, 400),),
        reports=(report("zh", number), report("en", number)),
        group=f"patient {number}",
    )
    return replace(made, **changes)


EXAMS = [exam(n) for n in range(1, 30)]
OURS = exam(0)


def other(n):
    return EXAMS[n % len(EXAMS)]


def only(task):
    return {name: float(name == task) for name in TASKS}


def made(task, keys=range(400), record=OURS, others=other):
    return [compose(record, key, only(task), others) for key in keys]


def test_same_key_same_conversation_and_another_key_another():
    weights = mix_for("full")
    first = [compose(OURS, key, weights, other) for key in range(300)]
    assert first == [compose(OURS, np.uint64(key), weights, other) for key in range(300)]
    assert len(set(first)) > 250
    assert {composed.language for composed in first} == {"zh", "en"}


def test_task_shares_are_the_weights():
    weights = mix_for("full", {"conversation": 0})
    counts = Counter(compose(OURS, key, weights, other).task for key in range(4000))
    total = sum(weights.values())
    for task in TASKS:
        share = weights[task] / total
        assert abs(counts[task] / 4000 - share) < 4 * (share / 4000) ** 0.5 + 1e-9


@pytest.mark.parametrize("task", ["findings", "impression", "caption", "diagnosis"])
def test_single_texts_are_answered_as_the_report_has_them(task):
    for composed in made(task, range(50)):
        assert composed.task == task
        ours = report(composed.language, 0)
        assert composed.turns[-1] == Turn("assistant", getattr(ours, task))
        roles = [turn.role for turn in composed.turns]
        assert roles in (["user", "assistant"], ["system", "user", "assistant"])


def test_a_report_has_both_sections_under_headings_of_its_language():
    for composed in made("report", range(50)):
        answer = composed.turns[-1].text
        ours = report(composed.language, 0)
        assert split_report(answer) == (ours.findings, ours.impression)
        assert answer.startswith("超声所见" if composed.language == "zh" else "Findings")


def test_a_conversation_is_used_as_it_is():
    turns = (Turn("system", "s"), Turn("user", "q"), Turn("assistant", "肝脏正常"))
    composed = compose(exam(0, turns=turns), 3, only("conversation"), other)
    assert composed == ("conversation", "zh", turns)
    english = (Turn("user", "q"), Turn("assistant", "Normal liver."))
    assert compose(exam(0, turns=english), 3, only("conversation"), other).language == "en"


def options_of(text):
    return dict(re.findall(r"^([A-G])\. (.*)$", text, re.MULTILINE))


@pytest.mark.parametrize("task", ["choice", "choice_restate"])
def test_choices_have_one_right_answer_and_others_of_the_organ(task):
    places, fields = Counter(), set()
    for composed in made(task, range(1000)):
        question, answer = composed.turns[-2].text, composed.turns[-1].text
        options = options_of(question)
        letter = answer if task == "choice" else answer[0]
        right = options[letter]
        if task == "choice_restate":
            assert answer == f"{letter}. {right}"
        assert len(set(options.values())) == len(options)
        if "which shape" in question:
            assert sorted(options.values()) == ["irregular", "oval", "round"] and right == "oval"
            continue
        ours = report(composed.language, 0)
        field = next(f for f in TASKS if getattr(ours, f, None) == right)
        theirs = {getattr(report(composed.language, n), field) for n in range(1, 30)}
        assert set(options.values()) - {right} <= theirs - {right}
        fields.add(field)
        if field != "diagnosis":  # there are but three labels
            assert len(options) == 4
            places[letter] += 1
    assert fields == {"findings", "caption", "impression", "diagnosis"}
    total = sum(places.values())
    assert total > 350
    for letter in "ABCD":
        assert abs(places[letter] / total - 0.25) < 4 * (0.25 * 0.75 / total) ** 0.5


def test_judgements_are_half_true_and_the_false_ones_are_of_another_exam():
    answers = Counter()
    for composed in made("judge", range(1500)):
        statement = composed.turns[-2].text.split("\n")[-1]
        true = statement in (
            *(getattr(report(composed.language, 0), f) for f in ("findings", "caption")),
            *(getattr(report(composed.language, 0), f) for f in ("impression", "diagnosis")),
        )
        yes, no = ("是", "否") if composed.language == "zh" else ("Yes", "No")
        assert composed.turns[-1].text == (yes if true else no)
        answers[true] += 1
    assert abs(answers[True] / 1500 - 0.5) < 4 * 0.5 / 1500**0.5


def test_own_questions_keep_their_answers():
    seen = set()
    for composed in made("question", range(300)):
        question, answer = composed.turns[-2].text, composed.turns[-1].text
        seen.add(answer)
        if answer == "oval":
            assert sorted(options_of(question).values()) == ["irregular", "oval", "round"]
        else:
            assert answer == "0 mm" and "how large" in question and not options_of(question)
    assert seen == {"oval", "0 mm"}


def test_no_option_is_an_exam_of_the_same_patient_or_with_the_same_conclusion():
    mine = report("en", 0, questions=())
    record = exam(0, reports=(mine,))
    same_patient = exam(5, group="patient 0", reports=(report("en", 5),))
    equally_true = exam(6, reports=(replace(mine, findings="another way to say it"),))
    other_language = exam(7, reports=(report("zh", 7),))
    for unusable in (same_patient, equally_true, other_language, record):
        for task in ("choice", "judge"):
            composed = compose(record, 1, only(task), lambda n, found=unusable: found)
            assert composed.task not in ("choice", "choice_restate", "judge")
    usable = exam(8, reports=(report("en", 8),))
    assert compose(record, 1, only("judge"), lambda n: usable).task == "judge"


def test_without_other_exams_the_record_still_teaches_something():
    for task in TASKS:
        composed = compose(OURS, 9, only(task), lambda n: None)
        assert composed.turns[-1].text and composed.task not in ("judge", "conversation")
    captioned = Record("c", "liver", reports=(Report("zh", caption="肝脏回声均匀。"),))
    assert compose(captioned, 0, only("report"), lambda n: None).task == "caption"


@pytest.mark.parametrize(
    "record",
    [
        Record("empty", "liver"),
        Record("blank", "liver", reports=(Report("zh", findings=" \n"),)),
        Record("asks", "liver", turns=(Turn("user", "q"), Turn("assistant", " "))),
        Record("open", "liver", reports=(Report("zh", questions=(Question("q", " "),)),)),
    ],
)
def test_a_record_without_texts_is_refused(record):
    with pytest.raises(InputError, match=f"'{record.id}' has no text"):
        compose(record, 0, mix_for("full"), lambda n: OURS)


def test_stages_have_mixes_that_weights_change():
    assert set(mix_for("full")) == set(TASKS) and min(mix_for("full").values()) > 0
    assert mix_for("alignment")["choice"] == 0 < mix_for("alignment")["report"]
    assert mix_for("alignment", {"choice": 2})["choice"] == 2.0
    for stage, weights, words in [
        ("pretraining", None, "stage 'pretraining' is unknown"),
        ("full", {"reports": 1}, "task_weights.reports: no such task"),
        ("full", {"report": -1}, "task_weights.report must"),
        ("full", {"report": float("nan")}, "task_weights.report must"),
        ("full", {"report": "1"}, "task_weights.report must"),
        ("alignment", dict.fromkeys(TASKS, 0), "all tasks have weight 0"),
    ]:
        with pytest.raises(InputError, match=words):
            mix_for(stage, weights)
