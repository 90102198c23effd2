"""Text to token ids and back: one interface over the three kinds of tokenizer files.

`load_tokenizer(folder)` takes the first it finds of tokenizer.json, vocab.json + merges.txt
(Qwen2's byte-level BPE) and tokenizer.model (SentencePiece). Special tokens written out in a text
become their ids; nothing is added at either end.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from echovlm_jax.errors import InputError
from echovlm_jax.processing.files import (
    read_bytes,
    read_json,
    read_json_if_there,
    read_text,
    shown,
)
from echovlm_jax.storage.files import as_path

MAX_MODEL_BYTES = 64 * 2**20

# How Qwen2 cuts text before BPE: contractions, words with one leading non-letter, single digits,
# punctuation with a leading space, line ends, spaces. A published constant of the vocabulary.
QWEN2_PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer."""

    @property
    def source(self) -> str:
        """The file or folder it was read from, as errors show it."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens counted."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; over several threads where the library has them."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; ids outside the vocabulary are left out."""
        ...

    def token_id(self, token: str) -> int:
        """A token's id. Raises InputError when the vocabulary has no such token."""
        ...


class HubTokenizer:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, inner: tokenizers.Tokenizer, source: str) -> None:
        self._inner = inner
        self.source: str = source
        inner.no_truncation()
        inner.no_padding()
        vocab = inner.get_vocab(with_added_tokens=True)
        self._size = 1 + max(vocab.values(), default=-1)

    @property
    def vocab_size(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(_clean(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        clean = [_clean(text) for text in texts]
        found = self._inner.encode_batch_fast(clean, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        known = [int(i) for i in ids if 0 <= int(i) < self._size]
        return self._inner.decode(known, skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int:
        found = self._inner.token_to_id(token)
        if found is None:
            raise InputError(f"{self.source}: the tokenizer has no token {token!r}")
        return found


class SentencePieceTokenizer:
    """A SentencePiece model; its control pieces and its `<…>` symbols are the special tokens."""

    def __init__(self, data: bytes, source: str) -> None:
        import sentencepiece  # only models trained from scratch need it

        self.source = source
        try:
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=data)
        except Exception:
            raise InputError(f"{source}: is not a SentencePiece model") from None
        inner = self._inner
        self._ids = {inner.id_to_piece(i): i for i in range(inner.get_piece_size())}
        self._special = {
            piece: i
            for piece, i in self._ids.items()
            if inner.is_control(i) or (re.fullmatch(r"<[^<>\s]+>", piece) and not inner.is_byte(i))
        }
        longest_first = sorted(self._special, key=len, reverse=True)
        # "▁" is how a model writes a space. A text's own "▁" is spelled in bytes where the model
        # has them; not where it also puts a space before each run, which a cut would double.
        spelled = [self._ids.get(byte) for byte in ("<0xE2>", "<0x96>", "<0x81>")]
        adds_space = inner.encode("a", out_type=str)[:1] in (["▁"], ["▁a"])
        self._block = [] if adds_space else [i for i in spelled if i is not None]
        cuts = [*longest_first, "▁"] if len(self._block) == 3 else longest_first
        self._split = re.compile("(" + ("|".join(map(re.escape, cuts)) or "(?!)") + ")")

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(_clean(text)):
            if part in self._special:
                ids.append(self._special[part])
            elif part == "▁" and self._block:
                ids.extend(self._block)
            elif part:
                ids.extend(self._inner.encode(part))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text between special tokens is decoded run by run, as it was encoded."""
        special = {i: piece for piece, i in self._special.items()}
        out: list[str] = []
        run: list[int] = []
        for i in [*map(int, ids), None]:
            if i is not None and i not in special:
                if 0 <= i < self.vocab_size:
                    run.append(i)
                continue
            out.append(self._inner.decode(run))
            run = []
            if i is not None and not skip_special_tokens:
                out.append(special[i])
        return "".join(out)

    def token_id(self, token: str) -> int:
        if token not in self._ids:
            raise InputError(f"{self.source}: the tokenizer has no token {token!r}")
        return self._ids[token]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Raises:
      InputError: no tokenizer files, or files that can't be used; the message names the file.
    """
    folder = as_path(folder)
    if (folder / "tokenizer.json").is_file():
        return _from_tokenizer_json(folder / "tokenizer.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _from_vocab_and_merges(folder)
    if (folder / "tokenizer.model").is_file():
        path = folder / "tokenizer.model"
        return SentencePieceTokenizer(read_bytes(path, MAX_MODEL_BYTES), shown(path))
    raise InputError(
        f"{shown(folder)}: no tokenizer here; it takes tokenizer.json, vocab.json with merges.txt,"
        " or tokenizer.model"
    )


def _from_tokenizer_json(path: Path) -> Tokenizer:
    text = read_text(path)
    try:
        return HubTokenizer(tokenizers.Tokenizer.from_str(text), shown(path))
    except Exception:  # the library raises plain Exception, with the file's content in it
        raise InputError(f"{shown(path)}: is not a tokenizer.json that can be read") from None


def _from_vocab_and_merges(folder: Path) -> Tokenizer:
    """Qwen2's tokenizer from its two files, and the added tokens of tokenizer_config.json."""
    vocab = read_json(folder / "vocab.json")
    lines = read_text(folder / "merges.txt").split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    pairs = [line.split(" ") for line in lines if line]
    if any(len(pair) != 2 for pair in pairs):
        raise InputError(f"{shown(folder / 'merges.txt')}: a line is not two tokens and a space")
    try:
        inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[(a, b) for a, b in pairs]))
    except Exception:
        raise InputError(
            f"{shown(folder)}: merges.txt names a token that vocab.json lacks, or an id is invalid"
        ) from None
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    source = shown(folder / "tokenizer_config.json")
    config = read_json_if_there(folder / "tokenizer_config.json") or {}
    for number, token in _added_tokens(config, vocab, source):
        inner.add_tokens([token])
        if inner.token_to_id(token.content) != number:
            raise InputError(
                f"{source}: added token {token.content!r} has id {number}, but the ids before it"
                f" leave it {inner.token_to_id(token.content)}"
            )
    return HubTokenizer(inner, shown(folder))


def _added_tokens(
    config: Mapping[str, Any], vocab: Mapping[str, int], source: str
) -> list[tuple[int, AddedToken]]:
    """tokenizer_config.json's added tokens by id; where silent, the vocabulary's own `<|…|>`."""
    listed = config.get("added_tokens_decoder")
    if listed is None:
        names = sorted((i, t) for t, i in vocab.items() if re.fullmatch(r"<\|\w+\|>", t))
        return [(i, AddedToken(t, special=True, normalized=False)) for i, t in names]
    keys = ("lstrip", "rstrip", "single_word", "normalized", "special")
    try:
        return sorted(
            (
                (int(i), AddedToken(e["content"], **{k: bool(e[k]) for k in keys if k in e}))
                for i, e in listed.items()
            ),
            key=lambda pair: pair[0],
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{source}: added_tokens_decoder must map ids to tokens") from None


def special_token_text(config: Mapping[str, Any], key: str) -> str | None:
    """tokenizer_config.json's `bos_token`, `eos_token`, …: a string, or an object with content."""
    value = config.get(key)
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _clean(text: str) -> str:
    """Lone surrogates (from broken JSON escapes) have no UTF-8 form; the rest stays as it is."""
    return text.encode("utf-8", "replace").decode("utf-8")
