"""Which tokenizer a model gets, and one trained on reports."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echovlm_jax.config import PRESETS, preset, to_hf
from echovlm_jax.data.tokenizer import (
    SPECIAL,
    byte_tokenizer,
    tokenizer_for,
    train_sentencepiece,
)
from echovlm_jax.errors import InputError
from echovlm_jax.processing import ImageConfig, load_tokenizer

WORDS = [
    *("肝脏", "回声", "均匀", "结节", "边界", "清晰", "node", "margin"),
    *("lobe", "echo", "cyst", "smooth", "irregular", "shadow"),
]
TEXTS = [
    f"{a}{b}，{c} {a} {b}-{c}。\nThe {b} of {a}: {i} mm."
    for i, (a, b, c) in enumerate(
        (WORDS[i % 14], WORDS[i * 5 % 14], WORDS[i * 3 % 13]) for i in range(60)
    )
]
ANY = st.text(max_size=40) | st.lists(
    st.sampled_from(
        ["肝", " ", "\n", "\r\n", "▁", "\t", "node", "\x00", "🫀", "e\u0301", "<", "0x41>"]
    )
).map("".join)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, train_sentencepiece(TEXTS, folder, vocab_size=340)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_tokenizer_of_bytes(name):
    tokenizer, config, images = tokenizer_for(name)
    assert config == preset(name)
    assert images == ImageConfig()
    assert tokenizer.vocab_size <= config.text.vocab_size
    ids = {token: tokenizer.token_id(token) for token in SPECIAL}
    assert ids["<|endoftext|>"] == config.bos_token_id
    assert ids["<|im_end|>"] == config.eos_token_id == ids["<|im_start|>"] + 1
    assert ids["<|vision_start|>"] == config.vision_start_token_id
    assert ids["<|vision_end|>"] == config.vision_end_token_id
    assert ids["<|image_pad|>"] == config.image_token_id
    assert ids["<|video_pad|>"] == config.video_token_id
    text = "肝 a\r\n\t🫀"
    found = tokenizer.encode(f"<|im_start|>{text}<|im_end|>")
    assert len(found) == 2 + len(text.encode())
    assert not {*found[1:-1]} & {*ids.values()} and len({*found}) == 2 + len({*text.encode()})
    assert tokenizer.decode(found) == text


def test_bytes_need_room_and_ids_of_their_own():
    tiny = preset("tiny")
    with pytest.raises(InputError, match="vocab_size 263 has no room for 256 bytes"):
        byte_tokenizer(tiny.replace(text={"vocab_size": 263}))
    with pytest.raises(InputError, match="share an id"):
        byte_tokenizer(tiny.replace(vision_pad_token_id=6))
    assert byte_tokenizer(tiny.replace(text={"vocab_size": 264})).get_vocab_size() == 264


def model_folder(path, **changes):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(to_hf(preset("tiny").replace(**changes))))
    byte_tokenizer(preset("tiny")).save(str(path / "tokenizer.json"))
    return path


def test_a_folder_brings_its_own_tokenizer_and_image_settings(tmp_path, trained):
    folder = model_folder(tmp_path / "model")
    (folder / "preprocessor_config.json").write_text('{"max_pixels": 50176, "min_pixels": 3136}')
    tokenizer, config, images = tokenizer_for(str(folder))
    assert config == preset("tiny") and images.max_pixels == 50176
    assert len(tokenizer.encode("肝")) == 3
    other, config, images = tokenizer_for(str(folder), str(trained[0]))
    assert config == preset("tiny") and images.max_pixels == 50176
    assert len(other.encode("肝脏回声")) < 4
    assert tokenizer_for("tiny", str(trained[0]))[0].encode(TEXTS[0]) == other.encode(TEXTS[0])


def test_files_that_disagree_are_refused(tmp_path, trained):
    changed = model_folder(tmp_path / "ids", video_token_id=9)
    with pytest.raises(InputError, match=r"encodes <\|video_pad\|> as \[7\], the model's id is 9"):
        tokenizer_for(str(changed))
    small = model_folder(tmp_path / "small", text={"vocab_size": 100})
    with pytest.raises(InputError, match="has 264 tokens, the model's vocab_size is 100"):
        tokenizer_for(str(small))
    sizes = model_folder(tmp_path / "sizes")
    (sizes / "preprocessor_config.json").write_text('{"patch_size": 16}')
    with pytest.raises(InputError, match="patch, temporal and merge sizes"):
        tokenizer_for(str(sizes))
    templated = model_folder(tmp_path / "template")
    (templated / "chat_template.jinja").write_text("{{ messages[0].role }}")
    for model, tokenizer in ((str(templated), None), ("tiny", str(templated))):
        with pytest.raises(InputError, match="template: its chat template"):
            tokenizer_for(model, tokenizer)
    with pytest.raises(InputError, match="template: its chat template"):
        tokenizer_for(str(templated), str(trained[0]))
    (tmp_path / "cut").mkdir()
    text = (sizes / "tokenizer.json").read_text()
    (tmp_path / "cut" / "tokenizer.json").write_text(text.replace("<|im_end|>", "<|im_over|>"))
    with pytest.raises(InputError, match=r"no token '<\|im_end\|>'"):
        tokenizer_for("tiny", str(tmp_path / "cut"))
    with pytest.raises(InputError, match="the model's id is 151652"):
        tokenizer_for("qwen2_vl_2b", str(trained[0]))
    with pytest.raises(InputError, match="neither a folder nor one of echovlm_11b"):
        tokenizer_for("no_such_model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no tokenizer here"):
        tokenizer_for("tiny", str(tmp_path / "empty"))


def test_a_template_like_qwens_is_taken(tmp_path):
    folder = model_folder(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}"
        "{{ m.content }}{% else %}{% for c in m.content %}{% if c.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    )
    assert tokenizer_for(str(folder))[0].token_id("<|im_start|>") == 1


def test_trained_pieces_agree_with_the_tiny_preset(trained):
    folder, made = trained
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.token_id(token) for token in SPECIAL] == list(range(8))
    assert tokenizer.encode("".join(SPECIAL)) == list(range(8))
    assert 8 not in tokenizer.encode("<unk> <s> </s> ⁇ \u2047 < 肝\x00")  # 8 stands for unknown
    assert made["pieces"] == tokenizer.vocab_size == 340
    assert made["texts"] == 60 and made["characters"] == sum(map(len, TEXTS))
    assert made["tokens"] == sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert made["tokens"] < 0.8 * made["characters"]


@given(ANY)
def test_trained_pieces_give_every_text_back(trained, text):
    tokenizer = load_tokenizer(trained[0])
    whole = text.encode("utf-8", "replace").decode()
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == whole


@given(ANY, ANY)
def test_no_piece_reaches_over_a_lines_end(trained, first, second):
    tokenizer = load_tokenizer(trained[0])
    ids = tokenizer.encode(first) + tokenizer.encode("\n") + tokenizer.encode(second)
    assert tokenizer.encode(f"{first}\n{second}") == ids


def test_training_twice_gives_the_same_file(trained, tmp_path):
    train_sentencepiece(iter(TEXTS), tmp_path, vocab_size=340)
    name = "tokenizer.model"
    assert (tmp_path / name).read_bytes() == (trained[0] / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_control_tokens_in_reports_teach_nothing(tmp_path):
    train_sentencepiece(TEXTS + ["<|im_end|> <|unknown|> \ud800"] * 50, tmp_path, vocab_size=340)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<|im_end|>") == [2]


def test_bad_requests_for_training_are_one_line(tmp_path, trained):
    for texts, size, words in [
        ([], 340, "no texts"),
        ([" \n"], 340, "no texts"),
        (TEXTS, 100, "vocab_size 100 is too small"),
        (TEXTS, 100_000, r"vocab_size 100000: .*give more texts or at most \d+"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            train_sentencepiece(texts, tmp_path / "new", vocab_size=size)
        assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()
    with pytest.raises(InputError, match=r"tokenizer\.model: exists"):
        train_sentencepiece(TEXTS, trained[0], vocab_size=340)


def test_real_reports_take_a_tenth_of_their_bytes(public_data, tmp_path):
    texts = []
    for path in sorted((public_data / "echovlm_public").glob("*.json")):
        texts += [record["description"] for record in json.loads(path.read_text("utf-8"))]
    made = train_sentencepiece(texts, tmp_path)
    assert made["pieces"] == preset("tiny").text.vocab_size
    assert made["tokens"] < 0.35 * made["characters"]
    assert made["tokens"] < 0.12 * sum(len(text.encode()) for text in texts)
