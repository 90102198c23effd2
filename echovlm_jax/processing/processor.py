"""Images and messages to model inputs, equal to Hugging Face's Qwen2-VL processor."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from echovlm_jax import config as model_config
from echovlm_jax.errors import InputError
from echovlm_jax.processing.chat import check_messages, entry_kind, load_chat_template
from echovlm_jax.processing.files import read_json_if_there, shown
from echovlm_jax.processing.images import (
    MAX_RESIZED_PIXELS,
    ImageConfig,
    image_config,
    images_to_patches,
    read_media,
)
from echovlm_jax.processing.levels import Say, silent
from echovlm_jax.processing.media import second_per_grid
from echovlm_jax.processing.tokenizer import Tokenizer, load_tokenizer, special_token_text
from echovlm_jax.storage.files import as_path
from echovlm_jax.storage.layout import CONFIG, model_files

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
NUM_FRAMES = 16  # of a cine loop, where nothing says how many
MAX_FRAMES = 2**16
_JOINT, _IMAGE, _VIDEO = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


class Processor:
    """Callable: (images, messages) → the arrays a Qwen2-VL model takes.

    Args:
      path: a checkpoint folder with tokenizer files; config.json (token ids), the chat template
        and preprocessor_config.json are honoured where present.
      max_pixels: overrides the checkpoint's largest area of an image, in pixels.
      num_frames: a longer loop is sampled to this many frames; by default as the checkpoint
        says, else NUM_FRAMES.
      crop: crops of DICOM frames to their ultrasound regions; "require" refuses the others.
      say: callback for lines on values of more than eight bits.

    Raises:
      InputError: a file is missing or invalid, or the tokenizer and config.json disagree.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_pixels: int | None = None,
        num_frames: int | None = None,
        crop: bool | Literal["require"] = False,
        say: Say = silent,
    ) -> None:
        folder = as_path(path)
        if not folder.is_dir():
            raise InputError(f"{shown(folder)}: is not a folder with tokenizer files")
        folder = model_files(folder)
        self.tokenizer = load_tokenizer(folder)
        self.template = load_chat_template(folder)
        self.image_config, self.video_config = pixel_configs(folder, max_pixels)
        self.num_frames = _num_frames(folder) if num_frames is None else num_frames
        self.say = say
        self.crop: bool | Literal["require"] = crop
        self.image_token_id = _one_token(self.tokenizer, IMAGE_TOKEN)
        self.video_token_id = _one_token(self.tokenizer, VIDEO_TOKEN)
        raw, where = read_json_if_there(folder / CONFIG), shown(folder / CONFIG)
        self.config = None if raw is None else model_config.from_hf(raw, where)
        if self.config is not None:
            self._check_against(self.config, folder)
        self.pad_token_id = self._pad_token_id(folder)

    def __call__(
        self,
        images: Sequence[Any] | None,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
    ) -> dict[str, np.ndarray]:
        """One prompt's inputs.

        Args:
          images: paths (see `read_media`), PIL images, uint8 arrays [H, W, 3], or videos
            [T, H, W, 3], or a `Media` of one; a file with several frames is a video.
          messages: a list of {role, content}, or one string: the user's turn. Where no message
            marks an image, the images go to the front of the first user turn. A mark in a list of
            entries becomes an image's or a video's by what the file is.
          add_generation_prompt: end with the opening of the assistant's turn.

        Returns:
          input_ids, attention_mask int64 [1, S]; pixel_values float32 [P, 1176] and
          image_grid_thw int64 [N, 3] where there are images; pixel_values_videos and
          video_grid_thw where there are videos, and of a model that counts time
          (tokens_per_second) second_per_grid_ts float64 [videos].

        Raises:
          InputError: a file can't be used, or images and marks differ in number.
        """
        if isinstance(images, str | Path):
            raise InputError("images must be a list; put the one path in brackets")
        media = [
            read_media(
                item,
                num_frames=self.num_frames,
                crop=self.crop,
                convert_rgb=self.image_config.do_convert_rgb,
                say=self.say,
            )
            for item in (images if images is not None else [])
        ]
        kinds = ["video" if item.pixels.ndim == 4 else "image" for item in media]
        text = self._prompt(kinds, messages, add_generation_prompt)
        out: dict[str, np.ndarray] = {}
        grids: dict[str, np.ndarray] = {}
        for kind, pixels_key, config in (
            ("image", "pixel_values", self.image_config),
            ("video", "pixel_values_videos", self.video_config),
        ):
            items = [item for item, k in zip(media, kinds, strict=True) if k == kind]
            if items:
                pixels = [item.pixels for item in items]
                out[pixels_key], grids[kind] = images_to_patches(pixels, config)
                out[f"{kind}_grid_thw"] = grids[kind]
            if items and kind == "video" and getattr(self.config, "tokens_per_second", None):
                steps = [second_per_grid(x.seconds, config.temporal_patch_size) for x in items]
                out["second_per_grid_ts"] = np.array(steps)
        ids = self._expand(self.tokenizer.encode(text), grids)
        return {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64), **out}

    def _prompt(
        self,
        kinds: list[str],
        messages: str | Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
    ) -> str:
        """The rendered text, its marks checked against the kinds of media given."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        turns = check_messages(messages)
        written = sum(
            m["content"].count(mark)
            for m in turns
            if isinstance(m["content"], str)
            for mark in (IMAGE_TOKEN, VIDEO_TOKEN)
        )
        entries = [
            entry
            for m in turns
            if isinstance(m["content"], list)
            for entry in m["content"]
            if entry_kind(entry) in ("image", "video")
        ]
        if kinds and not entries and not written:
            _put_in_front(turns, kinds)
        elif len(entries) == len(kinds) and not written:
            for entry, kind in zip(entries, kinds, strict=True):
                entry.clear()
                entry["type"] = kind
        text = self.template(turns, add_generation_prompt=add_generation_prompt)
        for kind, mark in (("image", IMAGE_TOKEN), ("video", VIDEO_TOKEN)):
            if (marked := text.count(mark)) != (given := kinds.count(kind)):
                raise InputError(
                    f"the prompt marks {marked} {kind}{'' if marked == 1 else 's'} but {given}"
                    f" {'is' if given == 1 else 'are'} given: use one mark for each"
                )
        return text

    def _expand(self, ids: list[int], grids: dict[str, np.ndarray]) -> np.ndarray:
        """Repeats each mark's token once for each merged patch of its image: int64 [S]."""
        tokens = np.array(ids, np.int64)
        repeats = np.ones(len(tokens), np.int64)
        for kind, token in (("image", self.image_token_id), ("video", self.video_token_id)):
            if kind in grids:
                unit = self.image_config.merge_size**2
                repeats[tokens == token] = grids[kind].prod(axis=1) // unit
        return np.repeat(tokens, repeats)

    def _check_against(self, config: model_config.ModelConfig, folder: Path) -> None:
        for key in ("image_token_id", "video_token_id"):
            if getattr(self, key) != getattr(config, key):
                raise InputError(
                    f"{shown(folder)}: config.json says {key} {getattr(config, key)}, the tokenizer"
                    f" {getattr(self, key)}; they are not of one checkpoint"
                )
        for ours in (self.image_config, self.video_config):
            check_patch_sizes(ours, config.vision, folder)

    def _pad_token_id(self, folder: Path) -> int:
        """The tokenizer's stated pad token, else config.json's first token; masked anyhow."""
        stated = read_json_if_there(folder / "tokenizer_config.json") or {}
        if token := special_token_text(stated, "pad_token"):
            return self.tokenizer.token_id(token)
        return self.config.bos_token_id if self.config is not None else 0


def check_patch_sizes(
    images: ImageConfig, vision: model_config.VisionConfig, folder: str | Path
) -> None:
    """Raises InputError where a folder's preprocessor and its config.json cut patches otherwise."""
    stated = (images.patch_size, images.temporal_patch_size, images.merge_size)
    needed = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
    if stated != needed:
        raise InputError(
            f"{shown(folder)}: the preprocessor's patch, temporal and merge sizes {stated} differ"
            f" from config.json's {needed}"
        )


def check_length(length: int, limit: int, source: str = "max_position_embeddings") -> None:
    """Raises InputError when a prompt of `length` tokens exceeds `limit`, naming both."""
    if length > limit:
        raise InputError(
            f"the prompt has {length} tokens, over {source} {limit}; shorten it, use fewer images"
            " or lower max_pixels"
        )


def _one_token(tokenizer: Tokenizer, mark: str) -> int:
    """The id of a mark. Raises InputError where the tokenizer would cut it to pieces in a text."""
    number = tokenizer.token_id(mark)
    if (found := tokenizer.encode(mark)) != [number]:
        raise InputError(
            f"{tokenizer.source}: cuts {mark!r} into {len(found)} tokens, not its id {number};"
            " list it among the added tokens (added_tokens of tokenizer.json, added_tokens_decoder"
            " of tokenizer_config.json)"
        )
    return number


def _put_in_front(turns: list[dict[str, Any]], kinds: list[str]) -> None:
    """Marks for all media at the front of the first user turn, in place."""
    for turn in turns:
        if turn["role"] == "user":
            content = turn["content"]
            rest = [{"type": "text", "text": content}] if isinstance(content, str) else content
            turn["content"] = [{"type": kind} for kind in kinds] + rest
            return
    raise InputError("images are given but no message has the role user")


def pixel_configs(folder: Path, max_pixels: int | None) -> tuple[ImageConfig, ImageConfig]:
    """A folder's settings for images and for videos; videos take the images' where it is silent.

    Raises InputError where a file is invalid, or max_pixels, which overrides the files', is.
    """
    (raw, source), (video_raw, video_source) = _pixel_files(folder)
    found = [image_config(raw, source), image_config(video_raw, video_source)]
    if max_pixels is not None:
        if not 1 <= max_pixels <= MAX_RESIZED_PIXELS:
            raise InputError(f"max_pixels must be from 1 to {MAX_RESIZED_PIXELS}")
        found = [
            dataclasses.replace(c, max_pixels=max_pixels, min_pixels=min(c.min_pixels, max_pixels))
            for c in found
        ]
    return found[0], found[1]


def _pixel_files(folder: Path) -> tuple[tuple[dict[str, Any], str], tuple[dict[str, Any], str]]:
    """What a folder says of images and of videos, and in which file."""
    joint_path = folder / _JOINT
    joint = read_json_if_there(joint_path) or {}
    raw = read_json_if_there(folder / _IMAGE)
    source = shown(folder / _IMAGE)
    if raw is None:
        raw, source = joint.get("image_processor") or {}, shown(joint_path)
    video_raw = read_json_if_there(folder / _VIDEO)
    video_source = shown(folder / _VIDEO)
    if video_raw is None:
        video_raw, video_source = joint.get("video_processor"), shown(joint_path)
    if video_raw is None:
        video_raw, video_source = raw, source
    return (raw, source), (video_raw, video_source)


def _num_frames(folder: Path) -> int:
    """How many frames of a loop a folder says to take."""
    _, (raw, source) = _pixel_files(folder)
    found = raw.get("num_frames")
    if found is None:
        return NUM_FRAMES
    if type(found) is not int or not 1 <= found <= MAX_FRAMES:
        raise InputError(f"{source}: num_frames must be a whole number from 1 to {MAX_FRAMES}")
    return found


def stated_pixels(
    folder: Path, images: ImageConfig, num_frames: int | None = None
) -> dict[str, dict[str, Any]]:
    """A folder's files on images and videos, by name, made to say that both are as `images`.

    All that hold such settings are among them: programs differ in which they read first.

    Args:
      num_frames: frames of a loop; None: as the files state.
    """
    said: dict[str, Any] = {
        **dataclasses.asdict(images),
        "size": {"shortest_edge": images.min_pixels, "longest_edge": images.max_pixels},
    }
    without: set[str] = set()
    if num_frames is not None:
        said["num_frames"] = num_frames
        without = {"fps"}  # the other way to say how many; Hugging Face refuses the two together

    def mended(raw: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in raw.items() if key not in without} | said

    found = {_IMAGE: mended(read_json_if_there(folder / _IMAGE) or {})}
    if (video := read_json_if_there(folder / _VIDEO)) is not None:
        found[_VIDEO] = mended(video)
    joint = read_json_if_there(folder / _JOINT) or {}
    parts = {
        part: mended(joint[part])
        for part in ("image_processor", "video_processor")
        if isinstance(joint.get(part), dict)
    }
    return found | ({_JOINT: joint | parts} if parts else {})
