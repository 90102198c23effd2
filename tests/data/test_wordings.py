"""The wordings are ours, many, in their language, and agree with the exam."""

import re

import pytest

from echovlm_jax.data.record import LANGUAGES, Medium
from echovlm_jax.data.wordings import ASKS, all_wordings, media_kind, system_prompt, wording

IMAGE, LOOP = Medium(0, 400, 600), Medium(12, 400, 600)
EXAMS = [(), (IMAGE,), (IMAGE, IMAGE), (IMAGE,) * 5, (LOOP,), (LOOP, IMAGE), (LOOP, LOOP)]
CHINESE = re.compile("[\u4e00-\u9fff]")


def bare(text):
    return re.sub(r"[\W_]+", "", text.casefold())


def test_none_is_a_sentence_of_the_official_question_bank(public_data):
    folder = public_data / "question_bank"
    # Read as text: some of the files hold more than one list.
    strings = re.compile(r'"((?:[^"\\]|\\.)*)"')
    theirs = {
        bare(found) for path in folder.glob("*.json") for found in strings.findall(path.read_text())
    }
    assert len(theirs) > 1000
    for language in LANGUAGES:
        ours = {bare(text.replace("{question}", "")) for text in all_wordings(language)}
        assert not ours & theirs


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_filled_in_and_in_their_language(language):
    found = set(all_wordings(language))
    assert len(found) > 2000
    for text in found:
        left = text.replace("{question}", "", 1)
        assert "{" not in left and "}" not in left, text
        assert text == text.strip() and "  " not in text
        if text != "{question}":
            assert bool(CHINESE.search(text)) == (language == "zh"), text


@pytest.mark.parametrize("media", EXAMS, ids=media_kind)
@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_repeats_of_an_exam_are_asked_in_other_words(language, ask, media):
    found = [wording(ask, language, media, key, question="Q?") for key in range(200)]
    assert found == [wording(ask, language, media, key, question="Q?") for key in range(200)]
    assert len(set(found)) >= (8 if ask.startswith("own_options") else 18)
    assert all(("Q?" in text) == (ask == "question" or ask.startswith("own")) for text in found)


def test_words_for_images_agree_with_what_the_exam_consists_of():
    def texts(language, media):
        return [wording("report", language, media, key) for key in range(300)]

    assert [media_kind(media) for media in EXAMS] == [
        *("none", "one", "many", "many", "loop", "mixed", "mixed"),
    ]
    assert not any(re.search("几|组|些", text) for text in texts("zh", (IMAGE,)))
    assert not any(re.search("images|sonograms|views", text) for text in texts("en", (IMAGE,)))
    assert any("5张" in text for text in texts("zh", (IMAGE,) * 5))
    assert any("5 " in text for text in texts("en", (IMAGE,) * 5))
    assert all(re.search("loop|clip|moving|cine", text) for text in texts("en", (LOOP,)))


def test_braces_of_a_question_are_its_own():
    text = wording("question", "en", (IMAGE,), 5, question="{images} {n} {question} {0}?")
    assert "{images} {n} {question} {0}?" in text


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_quarter_goes_without_a_system_prompt(language):
    prompts = [system_prompt(language, key) for key in range(4000)]
    assert 0.22 < prompts.count(None) / len(prompts) < 0.28
    assert len(set(prompts)) > 12
