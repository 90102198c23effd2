"""What answers are read as, and the accuracy and F1 that follow."""

import numpy as np
import pytest

from echovlm_jax.data.dataset import open_dataset
from echovlm_jax.evaluate import answers
from echovlm_jax.evaluate.answers import NO, YES, choice, diagnosis, judgement, options_of, plain
from echovlm_jax.evaluate.bootstrap import estimate, mean_of
from echovlm_jax.evaluate.samples import make_samples

OPTIONS = {"A": "hypoechoic nodule", "B": "anechoic cyst", "C": "cyst"}
ZH = {"A": "无回声", "B": "低回声", "C": "极低回声"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("Ｂ", "B"),
        ("(B)", "B"),
        ("【B】。", "B"),
        ("B. anechoic cyst", "B"),
        ("B anechoic cyst", "B"),
        ("B、随便", "B"),
        ("B: because it is dark", "B"),
        ("The answer is B.", "B"),
        ("Answer: Ｂ", "B"),
        ("答案：B", "B"),
        ("正确答案是B。", "B"),
        ("选B", "B"),
        ("I would go with B here", "B"),
        ("anechoic cyst", "B"),
        ("Anechoic  cyst.", "B"),
        ("It shows an anechoic cyst", "B"),  # "cyst" lies inside the longer option
        ("a cyst", "C"),
        ("A cyst is seen", "C"),  # an article, no letter
        ("A hypoechoic nodule", "A"),
        ("A. cyst", "A"),  # the letter comes before the text
        ("cystic", None),
        ("A or B", None),
        ("hypoechoic nodule with an anechoic cyst", None),
        ("D", None),
        ("Because", None),
        ("", None),
        ("🙂", None),
    ],
)
def test_choices(text, letter):
    assert choice(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("低回声", "B"),
        ("极低回声", "C"),
        ("病灶呈极低回声。", "C"),
        ("病灶呈低回声", "B"),
        ("Ａ．无回声", "A"),
        ("应选Ｃ", "C"),
        ("无回声或低回声", None),
    ],
)
def test_chinese_choices(text, letter):
    assert choice(text, ZH) == letter


def test_an_option_that_leaves_a_thing_open_can_be_chosen():
    options = {"A": "benign", "B": "malignancy cannot be excluded"}
    assert choice("B, malignancy cannot be excluded here", options) == "B"
    assert choice("A, malignancy cannot be excluded here", {"A": "benign", "B": "cyst"}) is None
    assert diagnosis("提示恶性待排。", ("良性", "恶性待排")) == "恶性待排"


def test_options_are_the_lettered_lines():
    asked = "Which? A. is no option here\nA. one\nＢ．two: 2 mm\nC、three\nE. beyond a gap"
    assert options_of(asked) == {"A": "one", "B": "two: 2 mm", "C": "three"}
    assert options_of("no options") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *(
            (word, YES)
            for word in ("Yes", "yes.", "True", "Correct!", "是", "是的。", "正确", "对")
        ),
        *(
            (word, NO)
            for word in ("No", "no, it is not", "False", "Incorrect", "否", "不是", "错误")
        ),
        ("答案：正确", YES),
        ("Answer: false", NO),
        ("不正确", NO),
        ("该说法不正确。", NO),
        ("该说法正确", YES),
        ("This is not true", NO),
        ("This statement is true.", YES),
        ("ＹＥＳ", YES),
        ("normal liver", None),  # "no" is no word here
        ("Yesterday", None),
        ("It is true or false", None),
        ("肝脏", None),
        ("", None),
    ],
)
def test_judgements(text, said):
    assert judgement(text) == said


LABELS = ("liver cyst", "cyst", "fatty liver", "normal liver")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Fatty liver.", "fatty liver"),
        ("ＦＡＴＴＹ　ＬＩＶＥＲ", "fatty liver"),
        ("Impression: fatty liver, follow-up", "fatty liver"),
        ("a liver cyst of 3 mm", "liver cyst"),
        ("cyst", "cyst"),
        ("liver cyst and another cyst", None),
        ("fatty liver or normal liver", None),
        ("cystic", None),
        ("nothing of it", None),
    ],
)
def test_diagnoses(text, label):
    assert diagnosis(text, LABELS) == label


def test_chinese_labels_ignore_spaces_and_the_shorter_inside_the_longer():
    labels = ("肾囊肿", "囊肿", "肾结石")
    assert diagnosis("肾 囊 肿 。", labels) == "肾囊肿"
    assert diagnosis("提示：肾囊肿，考虑良性", labels) == "肾囊肿"
    assert diagnosis("肾囊肿伴肾结石", labels) is None
    assert diagnosis("肾囊肿", ()) is None


def test_plain_text():
    assert plain(" “Ａ　Ｂ”。\n") == "a b"


@pytest.fixture(scope="module")
def samples():
    found = make_samples(open_dataset("phantom", "test"), limit=60)
    return [sample for exam in found for sample in exam if sample.kind != "report"]


def test_every_reference_is_read_as_right(samples):
    assert {sample.task for sample in samples} == {"choice", "choice_restate", "judge", "diagnosis"}
    for sample in samples:
        found = answers.read_answer(sample.task, sample.reference, sample.question, sample.labels)
        assert sample.answer is not None and found == sample.answer, sample


def test_other_answers_are_read_as_wrong(samples):
    for sample in samples:
        if sample.task == "judge":
            wrong = {"是": "否", "否": "是", "Yes": "No", "No": "Yes"}[sample.reference]
        elif sample.task == "diagnosis":
            wrong = next(label for label in sample.labels if label != sample.answer)
        else:
            options = options_of(sample.question)
            assert len(options) >= 2
            wrong = next(text for letter, text in options.items() if letter != sample.answer)
        found = answers.read_answer(sample.task, wrong, sample.question, sample.labels)
        assert found is not None and found != sample.answer, (sample, wrong)


def test_macro_f1_against_the_definition():
    rng = np.random.default_rng(0)
    names = ["a", "b", "c", "d"]
    truth = [names[i] for i in rng.integers(0, 3, 40)]
    found = [None if i == 4 else names[i] for i in rng.integers(0, 5, 40)]
    scores = []
    for name in names:
        right = sum(t == f == name for t, f in zip(truth, found, strict=True))
        precision = right / max(found.count(name), 1)
        recall = right / max(truth.count(name), 1)
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    expected = 100 * sum(scores) / 4
    assert estimate(answers.macro_f1(truth, found)) == pytest.approx(expected, abs=1e-9)
    assert estimate(answers.macro_f1([], [])) is None
    assert estimate(answers.macro_f1(["a"], [None])) == 0
    assert estimate(answers.macro_f1(["a", "b"], ["a", "b"])) == 100
    assert estimate(mean_of([True, False, False, True])) == 50
