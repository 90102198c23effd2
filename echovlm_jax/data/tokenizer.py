"""The tokenizer that goes with a model: its own, a byte for a token, or one trained on reports."""

import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from echovlm_jax.config import PRESETS, ModelConfig, from_hf, preset
from echovlm_jax.data.disk import writing
from echovlm_jax.errors import InputError
from echovlm_jax.processing.chat import load_chat_template, neutral, qwen2_vl_prompt
from echovlm_jax.processing.files import read_json, shown
from echovlm_jax.processing.images import ImageConfig
from echovlm_jax.processing.processor import check_patch_sizes, pixel_configs
from echovlm_jax.processing.tokenizer import (
    HubTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from echovlm_jax.storage.files import as_path, make_folder, write_bytes
from echovlm_jax.storage.layout import CONFIG, model_files

# Qwen2-VL's control tokens, in the order of the ids that preset tiny gives them: 0 to 7.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TINY_VOCAB = PRESETS["tiny"].text.vocab_size
_RESERVED = len(SPECIAL) + 1 + 256  # pieces: the control tokens, unknown, the bytes
_LEAST_VOCAB = 320
_LONGEST_LINE = 2**16  # bytes; SentencePiece leaves out longer lines


def tokenizer_for(
    model: str, tokenizer: str | None = None
) -> tuple[Tokenizer, ModelConfig, ImageConfig]:
    """What texts and images of a model go through.

    Args:
      model: a preset's name, or a MODEL folder with config.json and, unless `tokenizer` is given,
        tokenizer files; its preprocessor_config.json is honoured.
      tokenizer: a folder of tokenizer files, instead of the model's. A preset without one gets a
        token for each byte: every configuration runs without files.

    Returns:
      the tokenizer, the model's configuration and how its images become patches.

    Raises:
      InputError: files are missing or disagree on the ids of control tokens, the vocabulary is
        larger than the model's, or the model's chat template is not Qwen2-VL's.
    """
    if model in PRESETS:
        config = preset(model)
        images = images_of_preset(config)
        if tokenizer is None:
            return HubTokenizer(byte_tokenizer(config), f"bytes for {model}"), config, images
        folder = as_path(tokenizer)
    else:
        if not as_path(model).is_dir():
            raise InputError(
                f"model {shown(model)}: is neither a folder nor one of {', '.join(PRESETS)}"
            )
        files = model_files(as_path(model))
        config, images = _of_folder(files)
        folder = files if tokenizer is None else as_path(tokenizer)
        _check_template(files)
    found = load_tokenizer(folder)
    _check_template(folder)
    _check_ids(found, config)
    return found, config, images


def images_of_preset(config: ModelConfig) -> ImageConfig:
    """How a model that has no folder turns pictures into patches: as Qwen2-VL does."""
    vision = config.vision
    return ImageConfig(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
    )


def _of_folder(folder: Path) -> tuple[ModelConfig, ImageConfig]:
    config = from_hf(read_json(folder / CONFIG), shown(folder / CONFIG))
    images, videos = pixel_configs(folder, None)
    for found in (images, videos):
        check_patch_sizes(found, config.vision, folder)
    return config, images


def _check_template(folder: Path) -> None:
    """Training writes conversations in Qwen2-VL's form; answers asked for in another would suffer.

    A system turn is given: templates differ in what they put in where there is none.
    """
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}
    answered = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    messages = [{"role": "system", "content": "s"}, *(asked, answered) * 2]
    theirs = load_chat_template(folder)(messages, add_generation_prompt=False)
    if theirs != qwen2_vl_prompt(messages, add_generation_prompt=False):
        raise InputError(
            f"{shown(folder)}: its chat template writes a conversation otherwise than Qwen2-VL's;"
            " training needs that form: take the template out of the folder"
        )


def _check_ids(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """The tokens of a chat are whole, images' have the model's ids, and no id is beyond its reach.

    What a configuration says of beginnings and ends is not looked at: base models say another end
    than the chat's.
    """
    ids = _special_ids(config)
    for token in ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"):
        if (found := tokenizer.encode(token)) != [ids[token]]:
            raise InputError(
                f"{tokenizer.source}: encodes {token} as {found[:4]}, the model's id is"
                f" {ids[token]}; give the tokenizer that belongs to the model"
            )
    for token in ("<|im_start|>", "<|im_end|>"):
        if tokenizer.encode(token) != [tokenizer.token_id(token)]:
            raise InputError(f"{tokenizer.source}: cuts {token} to pieces; list it as a token")
    if tokenizer.vocab_size > config.text.vocab_size:
        raise InputError(
            f"{tokenizer.source}: has {tokenizer.vocab_size} tokens, the model's vocab_size is"
            f" {config.text.vocab_size}"
        )


def _special_ids(config: ModelConfig) -> dict[str, int]:
    """The ids of the control tokens that a configuration states: all but <|im_start|>."""
    return {
        "<|endoftext|>": config.bos_token_id,
        "<|im_end|>": config.eos_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
        "<|vision_pad|>": config.vision_pad_token_id,
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
    }


def byte_tokenizer(config: ModelConfig) -> tokenizers.Tokenizer:
    """A tokenizer that needs no training: the model's control tokens, and one token a byte.

    The control tokens have the ids that the configuration states, <|im_start|> the one before
    <|im_end|>'s; the bytes take the lowest ids that are left.

    Raises:
      InputError: two control tokens share an id, or the vocabulary is too small.
    """
    ids = _special_ids(config)
    ids["<|im_start|>"] = config.eos_token_id - 1
    taken = set(ids.values())
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    free = [i for i in range(len(alphabet) + len(taken)) if i not in taken][: len(alphabet)]
    if len(taken) != len(ids) or min(taken) < 0:
        raise InputError(f"control tokens share an id, or leave none for <|im_start|>: {ids}")
    if max(*taken, *free) >= config.text.vocab_size:
        raise InputError(
            f"vocab_size {config.text.vocab_size} has no room for {len(alphabet)} bytes and the"
            f" control tokens' ids up to {max(taken)}"
        )
    vocab = ids | dict(zip(alphabet, free, strict=True))
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(sorted(ids, key=ids.__getitem__))
    return made


def train_sentencepiece(
    texts: Iterable[str], out: str | os.PathLike[str], vocab_size: int = TINY_VOCAB
) -> dict[str, Any]:
    """Trains a SentencePiece tokenizer for a small model, and writes OUT/tokenizer.model.

    The first eight ids are Qwen2-VL's control tokens, as preset tiny has them; 256 are bytes, for
    characters that the texts are short of, and for a line's end: no piece reaches over one. Nothing
    is normalised: every text comes back as it was. The same texts in the same order give the same
    file.

    Args:
      texts: reports, Chinese and English; control tokens in them are left out.
      out: a folder; made if missing. A tokenizer.model that is there already is refused.
      vocab_size: pieces, all of the above counted.

    Returns:
      out, pieces, texts, characters, tokens (of those characters).

    Raises:
      InputError: no texts, too few different ones for so many pieces, or a folder in use.
    """
    folder = Path(out)
    target = folder / "tokenizer.model"
    if target.exists() or target.is_symlink():
        raise InputError(f"{shown(target)}: exists; name another folder")
    if vocab_size < _LEAST_VOCAB:
        raise InputError(f"vocab_size {vocab_size} is too small; give at least {_LEAST_VOCAB}")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InputError("no texts to train a tokenizer on")
    data = _train(texts, vocab_size)
    tokenizer = SentencePieceTokenizer(data, shown(target))
    _write(target, data)
    return {
        "out": str(folder),
        "pieces": tokenizer.vocab_size,
        "texts": len(texts),
        "characters": sum(map(len, texts)),
        "tokens": sum(len(tokenizer.encode(text)) for text in texts),
    }


def _train(texts: Sequence[str], vocab_size: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts, (vocab_size - _RESERVED) // 2),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",  # counts only; a unigram model's floats may differ by machine
            character_coverage=1.0,  # `_lines` leaves the rare ones out
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            control_symbols=list(SPECIAL),
            unk_id=len(SPECIAL),
            unk_piece="<|unknown|>",
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=_LONGEST_LINE,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        most = re.search(r"value <= (\d+)", str(error))
        raise InputError(
            f"vocab_size {vocab_size}: the texts don't hold so many different pieces; give more"
            f" texts or {f'at most {most[1]}' if most else 'a smaller vocab_size'}"
        ) from None
    return model.getvalue()


def _lines(texts: Sequence[str], most: int) -> Iterator[str]:
    """What SentencePiece learns from: the texts' lines, cut where they are too long for it.

    They are also cut at rare characters, which get no piece but are spelled in bytes: all but the
    `most` commonest, and what makes up the last 0.05 % of the texts.
    """
    clean = [neutral(text.encode("utf-8", "replace").decode("utf-8")) for text in texts]
    counts = Counter("".join(clean))
    kept, seen = set(), 0
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]:
        if seen >= 0.9995 * counts.total():
            break
        kept.add(character)
        seen += count
    rare = str.maketrans({character: "\n" for character in counts if character not in kept})
    longest = _LONGEST_LINE // 4  # characters of at most 4 bytes
    for text in clean:
        for line in text.translate(rare).replace("\0", "\n").splitlines():
            yield from (line[at : at + longest] for at in range(0, len(line), longest))


def _write(path: Path, data: bytes) -> None:
    with writing(path, lambda: len(data)):
        make_folder(path.parent)
        write_bytes(path, data)
