"""The whole way from files and messages to arrays, against Hugging Face's processor."""

import json

import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.pixels.utils import pixel_array

from echovlm_jax.config import preset, to_hf
from echovlm_jax.errors import InputError
from echovlm_jax.processing import Processor, check_length, make_batch, pad_batch
from tests.processing.checkpoints import TEMPLATE, write_sentencepiece_model


@pytest.fixture(scope="module")
def processor(small_folder):
    return Processor(small_folder)


def sample(name: str) -> str:
    return str(get_testdata_file(f"{name}.dcm"))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def prompt_text(processor, inputs) -> str:
    """The prompt, with runs of vision tokens as their count."""
    text = processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=False)
    for mark in ("<|image_pad|>", "<|video_pad|>"):
        for count in range(text.count(mark), 0, -1):
            text = text.replace(mark * count, f"[{mark[2:7]} {count}]")
    return text


MESSAGES = [
    {"role": "system", "content": "你是超声医生。"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "First: "},
            {"type": "image"},
            {"type": "text", "text": " second: "},
            {"type": "image"},
            {"type": "text", "text": "请描述所见。"},
        ],
    },
]


def test_equals_transformers_processor(qwen_folder, tmp_path):
    """Hugging Face's processor with its PIL image processor; its video part needs torchvision."""
    pytest.importorskip("torch")
    images = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    tokens = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
    module = pytest.importorskip("transformers.models.qwen2_vl.processing_qwen2_vl")
    for file in qwen_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    limits = {"min_pixels": 3136, "max_pixels": 100 * 28 * 28}
    (tmp_path / "config.json").write_text(json.dumps(to_hf(preset("qwen2_vl_7b"))))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(limits))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    theirs = object.__new__(module.Qwen2VLProcessor)
    theirs.image_processor = images.Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    theirs.tokenizer = tokens.Qwen2Tokenizer.from_pretrained(tmp_path)
    theirs.tokenizer.chat_template = TEMPLATE
    theirs.image_token = "<|image_pad|>"
    pixels = [pixel_array(sample("examples_jpeg2k")), picture(100, 300)]
    ours = Processor(tmp_path)([sample("examples_jpeg2k"), pixels[1]], MESSAGES)
    text = theirs.tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    visual = theirs.image_processor([Image.fromarray(p) for p in pixels], return_tensors="np")
    for i in range(2):  # its own replacement of each mark by that image's tokens
        mark = theirs.replace_image_token(visual, i)
        text = text.replace("<|image_pad|>", mark.replace("image_pad", "placeholder"), 1)
    text = text.replace("placeholder", "image_pad")
    assert ours["input_ids"].tolist() == [theirs.tokenizer(text)["input_ids"]]
    np.testing.assert_array_equal(ours["image_grid_thw"], visual["image_grid_thw"])
    np.testing.assert_allclose(ours["pixel_values"], visual["pixel_values"], rtol=0, atol=1e-6)
    assert ours["attention_mask"].shape == ours["input_ids"].shape and ours["attention_mask"].all()
    assert ours["input_ids"].dtype == ours["image_grid_thw"].dtype == np.int64


def test_a_string_prompt_puts_images_in_front(processor):
    inputs = processor([picture(56, 84), picture(56, 56)], "Describe.")
    assert prompt_text(processor, inputs) == (
        "<|im_start|>user\n<|vision_start|>[image 6]<|vision_end|><|vision_start|>[image 4]"
        "<|vision_end|>Describe.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 10
    messages = [{"role": "user", "content": [{"type": "text", "text": "Describe."}]}]
    again = processor([picture(56, 84), picture(56, 56)], messages)
    np.testing.assert_array_equal(inputs["input_ids"], again["input_ids"])
    ended = processor([], messages, add_generation_prompt=False)
    assert prompt_text(processor, ended).endswith("<|im_end|>\n")


def test_messages_are_not_changed(processor):
    messages = [{"role": "user", "content": [{"type": "image"}]}]
    processor([np.zeros((4, 56, 56, 3), np.uint8)], messages)
    assert messages == [{"role": "user", "content": [{"type": "image"}]}]


def test_a_loop_is_a_video_wherever_it_is_marked(small_folder):
    processor = Processor(small_folder, num_frames=5)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]
    inputs = processor([sample("examples_ybr_color"), picture(56, 56)], messages)
    assert inputs["video_grid_thw"].tolist() == [[3, 18, 22]]  # 5 frames: the last pair repeats
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert (inputs["input_ids"] == processor.video_token_id).sum() == 3 * 9 * 11
    assert inputs["pixel_values_videos"].shape == (3 * 18 * 22, 1176)
    ids = inputs["input_ids"][0].tolist()
    assert ids.index(processor.video_token_id) < ids.index(processor.image_token_id)
    assert processor.config is not None
    batch = make_batch(processor.config, inputs)
    assert batch["patches"].shape == (1, 3 * 18 * 22 + 16, 1176)


def test_max_pixels_overrides_the_checkpoint(small_folder):
    for limit in (196 * 28 * 28, 10 * 28 * 28, 1000):
        grid = Processor(small_folder, max_pixels=limit)([picture(700, 900)], "x")["image_grid_thw"]
        assert grid.prod() * 14 * 14 <= max(limit, 28 * 28)
    with pytest.raises(InputError, match="max_pixels"):
        Processor(small_folder, max_pixels=0)


def test_padded_batch_of_unequal_prompts(processor):
    prompts = [processor([picture(56, 84)], "One."), processor([], "A longer one, text only.")]
    for side in ("left", "right"):
        batch = pad_batch(prompts, processor.pad_token_id, side)
        for row, prompt in zip(range(2), prompts, strict=True):
            real = batch["attention_mask"][row] == 1
            assert batch["input_ids"][row, real].tolist() == prompt["input_ids"][0].tolist()
            assert (batch["input_ids"][row, ~real] == processor.pad_token_id).all()
            assert real[-1 if side == "left" else 0]
        assert batch["image_grid_thw"].shape == (1, 3)
    with pytest.raises(InputError, match="side"):
        pad_batch(prompts, 0, "top")


@pytest.mark.parametrize(
    "images, messages, words",
    [
        (2, [{"role": "user", "content": [{"type": "image"}]}], "marks 1 image but 2 are given"),
        (0, [{"role": "user", "content": [{"type": "image"}]}], "marks 1 image but 0 are given"),
        (1, "see <|image_pad|> and <|image_pad|>", "marks 2 images but 1 is given"),
        (1, [{"role": "system", "content": "x"}], "role user"),
        (0, [{"role": "user", "content": [{"type": "video"}]}], "marks 1 video but 0 are given"),
    ],
)
def test_image_counts_must_match_the_prompt(processor, images, messages, words):
    with pytest.raises(InputError) as caught:
        processor([picture(56, 56)] * images, messages)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_one_path_in_place_of_a_list(processor):
    with pytest.raises(InputError, match="list"):
        processor("image.png", "x")


def test_over_long_prompt_names_length_and_limit():
    check_length(4096, 4096)
    with pytest.raises(
        InputError, match=r"^the prompt has 4097 tokens, over max_pos\w+ 4096[^\n]*$"
    ):
        check_length(4097, 4096)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("config.json", to_hf(preset("tiny").replace(image_token_id=5)), "image_token_id 5"),
        ("config.json", {"model_type": "qwen2_vl"}, "config.json: key vocab_size is missing"),
        ("preprocessor_config.json", {"patch_size": 16}, "patch, temporal and merge sizes"),
        ("preprocessor_config.json", {"merge_size": "2"}, "merge_size"),
        ("tokenizer_config.json", [], "must hold a JSON object"),
    ],
)
def test_bad_checkpoint_folders_are_one_line(small_folder, tmp_path, name, content, words):
    for file in small_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        Processor(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="not a folder"):
        Processor(tmp_path / "absent")


def test_a_mark_that_is_not_one_token_is_the_tokenizers_fault(tmp_path):
    """In the vocabulary but not among the added tokens: a text's mark is cut to letters."""
    marks = ["<|image_pad|>", "<|video_pad|>"]
    vocab = {t: i for i, t in enumerate(sorted({*"".join(marks), *marks}))}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("")
    added = {vocab[m]: {"content": m} for m in marks[1:]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(InputError) as caught:
        Processor(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: cuts '<|image_pad|>' into 13 tokens")
    assert "added_tokens_decoder" in message and "\n" not in message
    (tmp_path / "tokenizer_config.json").unlink()
    assert Processor(tmp_path).image_token_id == vocab["<|image_pad|>"]


def test_an_absurd_max_pixels_is_refused(small_folder):
    for bad in (0, 10**10):
        with pytest.raises(InputError, match="max_pixels must be from 1 to"):
            Processor(small_folder, max_pixels=bad)


def test_newer_exporters_joint_file(tmp_path):
    write_sentencepiece_model(tmp_path)
    joint = {"image_processor": {"max_pixels": 784 * 9}, "video_processor": {"max_pixels": 784 * 4}}
    joint["image_processor"]["min_pixels"] = joint["video_processor"]["min_pixels"] = 784
    (tmp_path / "processor_config.json").write_text(json.dumps(joint))
    processor = Processor(tmp_path)
    inputs = processor([picture(200, 200), np.stack([picture(200, 200)] * 2)], "x")
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 6]]
    assert inputs["video_grid_thw"].tolist() == [[1, 4, 4]]


def test_a_small_model_with_a_sentencepiece_tokenizer(tmp_path):
    """Built-in template, ids from the tokenizer's own symbols, text back again."""
    write_sentencepiece_model(tmp_path)
    processor = Processor(tmp_path)
    inputs = processor([picture(56, 56)], "甲状腺左叶 nodule?")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 4
    assert prompt_text(processor, inputs) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>[image 4]<|vision_end|>甲状腺左叶 nodule?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
