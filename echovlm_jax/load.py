"""A checkpoint folder as a model that answers."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from echovlm_jax.chips import defaults
from echovlm_jax.config import ModelConfig
from echovlm_jax.convert.folder import as_dtype, open_model, side_files
from echovlm_jax.convert.load import load_params
from echovlm_jax.errors import InputError
from echovlm_jax.generate import Generated, SamplingOptions, generate
from echovlm_jax.generate.defaults import compute_on
from echovlm_jax.generate.engine import request
from echovlm_jax.generate.offline import Asked, Run
from echovlm_jax.generate.prompts import check_new_tokens, check_room, prompt_lengths, split_rows
from echovlm_jax.mesh import param_shardings
from echovlm_jax.model import EchoVLM, abstract_params, logical_axes
from echovlm_jax.ops.product.weight import Quantized
from echovlm_jax.processing.batch import make_batch, pad_batch
from echovlm_jax.processing.chat import neutral
from echovlm_jax.processing.files import read_json_if_there
from echovlm_jax.processing.processor import Processor
from echovlm_jax.storage import digests
from echovlm_jax.storage.files import as_path

Inputs = dict[str, np.ndarray]

# Whatever a checkpoint's files say, an answer ends with its turn or with the text.
END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def load_model(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    quantize: str | None = None,
    num_frames: int | None = None,
    crop: bool | Literal["require"] = False,
    max_pixels: int | None = None,
    control_tokens: bool = False,
) -> Model:
    """Loads a model folder: in Hugging Face form, made by `convert`, or a training run's.

    Args:
      path: the folder.
      mesh: lays the parameters out over its devices (see `mesh.make_mesh`); by default they go to
        one device.
      dtype: of parameters and computation: bfloat16, float32 or float16. By default as stored, but
        float32 on a CPU or an NVIDIA card older than Ampere (see `chips.defaults`).
      quantize: "int8", "int4" or "w8a8": the decoder's products, embedding and head in few bits
        (see `quantize.KINDS`), rounded while they are read. By default as stored.
      num_frames: frames to take of a cine loop, evenly spaced; by default as
        preprocessor_config.json says, or 16.
      max_pixels: larger images are made this small; by default as preprocessor_config.json says.
      crop: whether to cut DICOM frames to their ultrasound regions; "require" refuses what
        can't be.
      control_tokens: whether tokens of the chat template that a prompt or system prompt holds, as
        <|im_end|>, act as such, the way of Hugging Face. By default they are plain text, written
        apart as in training: whoever writes a prompt can neither end a turn nor speak for another.

    Example:
      ```python
      model = load_model("EchoVLM-hf")
      print(model.generate(["liver.png"], "Write the report.")["text"])
      ```

    Raises:
      InputError: no model there, damaged data, one that is quantized in another way, or a mesh that
        the parameters can't be split over.
    """
    opened = open_model(path, quantized=True)
    config, stored = opened.config, set(opened.dtypes.values())
    wanted = as_dtype(dtype)
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    suited = as_dtype(defaults(device).dtype) if wanted is None else None
    wanted = wanted or suited
    shardings = None
    if mesh is not None:
        shardings = param_shardings(logical_axes(config), abstract_params(config), mesh)
    config, params = load_params(opened, dtype=wanted, shardings=shardings, quantize=quantize)
    if suited is not None and stored != {suited}:
        _say_once(
            "on a CPU this computes in float32; dtype bfloat16 halves memory, but is slower"
            if device.platform == "cpu"
            else f"this card has no bfloat16: it computes in {suited}"
        )
    return Model(
        config,
        params,
        opened.folder,
        mesh=mesh,
        dtype=wanted or opened.dtypes["text/embed/embedding"],
        control_tokens=control_tokens,
        num_frames=num_frames,
        crop=crop,
        max_pixels=max_pixels,
    )


class Model:
    """Parameters, and the folder's tokenizer and processor, which are read when first needed.

    Attributes:
      config: sizes.
      params: nested dict of arrays.
      dtype: what it computes in; the embedding's by default.
      mesh: the devices that hold the parameters, and generate; None for one.
      compute: how generation is computed.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict[str, Any],
        path: str | os.PathLike[str],
        *,
        mesh: Mesh | None = None,
        dtype: Any = None,
        control_tokens: bool = False,
        **media: Any,
    ) -> None:
        self.config, self.params, self._folder = config, params, as_path(path)
        self.mesh = mesh
        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        self.compute = compute_on(device, mesh)
        self._media = media
        self._control_tokens = control_tokens
        self.dtype = jnp.dtype(dtype or params["text"]["embed"]["embedding"].dtype)

    @functools.cached_property
    def processor(self) -> Processor:
        """Turns images and messages into inputs. Raises InputError without tokenizer files."""
        return Processor(self._folder, say=_say_once, **self._media)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; differs where an answer may: by any bit of a parameter, by a file that lies
        beside them, or by how images are read."""
        beside = side_files(self._folder)
        own = {path.name: digests.of_file(path) for path in beside if path.suffix}
        how = [self._media, self._control_tokens]
        return digests.of_json([fingerprint(self.params), repr(self.config), own, how])

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: config.json's, generation_config.json's, END_TOKENS."""
        path = self._folder / "generation_config.json"
        said = (read_json_if_there(path) or {}).get("eos_token_id")
        said = said if isinstance(said, list) else [] if said is None else [said]
        if not all(type(token) is int and 0 <= token < 2**31 for token in said):
            raise InputError(f"{path}: eos_token_id must be a whole number or a list of them")
        found = {self.config.eos_token_id, *said}
        for token in END_TOKENS:
            try:
                found.add(self.processor.tokenizer.token_id(token))
            except InputError:  # a small tokenizer of one's own need not have it
                continue
        return tuple(sorted(found))

    def generate(
        self,
        images: Any,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stream: Callable[[str], object] | None = None,
    ) -> dict[str, Any]:
        """Answers one prompt about images.

        Args:
          images: a list of paths (what `processing.load_media` reads), PIL images or uint8 arrays,
            or one of these; None for none. Several make one exam; a file with several frames is a
            video.
          prompt: what to ask; or a conversation, a list of {role, content}, that a user's turn ends
            (see `generate.chat.Chat`).
          system: the system prompt; by default the chat template's own.
          max_new_tokens: at most this many.
          temperature, top_k, top_p, repetition_penalty, seed: see `SamplingOptions`.
          stream: called with each piece of the text as it comes; joined, they are the text. A piece
            never ends inside a character.

        Returns:
          text, prompt_tokens, new_tokens, compile_seconds (0 where a program for these sizes is
          there), prefill_seconds (until the first token), decode_tokens_per_second (of those after
          it).

        Raises:
          InputError: a file can't be used, the prompt is too long, or a setting is out of range.
        """
        inputs = self.prepare(images, prompt, system=system, max_new_tokens=max_new_tokens)
        sent = ""

        def send(text: str) -> None:
            nonlocal sent
            if stream is not None and len(text) > len(sent) and text.startswith(sent):
                stream(text[len(sent) :])
                sent = text

        def listen(tokens: np.ndarray, lengths: np.ndarray) -> None:
            # U+FFFD at the end is a character whose bytes have not all come yet.
            send(self._text(tokens[0, : lengths[0]]).rstrip("\ufffd"))

        [result] = self.answer(
            [inputs],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            on_tokens=None if stream is None else listen,
        )
        send(result["text"])
        return result

    def prepare(
        self, images: Any, prompt: Any, *, system: str | None = None, max_new_tokens: int
    ) -> Inputs:
        """The inputs of one prompt, as the processor gives them; see `generate` and `load_model`'s
        control_tokens."""
        if images is None:
            images = []
        elif not isinstance(images, list | tuple):
            images = [images]
        turns = [{"role": "user", "content": prompt}]
        if isinstance(prompt, list | tuple) and all("role" in turn for turn in prompt):
            turns = prompt
        messages = [{**turn, "content": self._plain(turn.get("content"))} for turn in turns]
        if system is not None:
            messages.insert(0, {"role": "system", "content": self._plain(system)})
        inputs = self.processor(images, messages)
        check_room(self.config, inputs["input_ids"].shape[1], max_new_tokens)
        return inputs

    def _plain(self, text: Any) -> Any:
        """A text as it goes into a prompt: without control tokens, unless they are to act."""
        if isinstance(text, list | tuple):  # entries, as the processor takes them
            entries = [
                {**entry, "text": self._plain(entry["text"])}
                if isinstance(entry, Mapping) and "text" in entry
                else entry
                for entry in text
            ]
            # Two harmless texts may be a control token together.
            said = [entry.get("text") for entry in entries if isinstance(entry, Mapping)]
            joined = "".join(text for text in said if isinstance(text, str))
            if self._plain(joined) != joined:
                raise InputError(_CONTROL)
            return entries
        if self._control_tokens or not isinstance(text, str):
            return text
        clean = neutral(text)
        if clean != text:
            _say_once(
                "a prompt holds tokens of the chat template; they are read as plain text"
                " (control_tokens lets them act)"
            )
        found = self.processor.tokenizer.encode(clean)
        if not self._control_ids.isdisjoint(found):
            raise InputError(_CONTROL)
        return clean

    @functools.cached_property
    def _control_ids(self) -> frozenset[int]:
        """The ids that open turns, end them, or stand for media."""
        config = self.config
        found = {config.eos_token_id, config.vision_start_token_id, config.vision_end_token_id}
        found |= {config.image_token_id, config.video_token_id}
        for token in ("<|im_start|>", *END_TOKENS):
            with contextlib.suppress(InputError):  # a small tokenizer of one's own need not have it
                found.add(self.processor.tokenizer.token_id(token))
        return frozenset(found)

    def answer(
        self,
        inputs: Sequence[Mapping[str, np.ndarray]],
        *,
        max_new_tokens: int,
        rows: Sequence[int] | None = None,
        on_tokens: Callable[[np.ndarray, np.ndarray], object] | None = None,
        **sampling: Any,
    ) -> list[dict[str, Any]]:
        """Answers several prepared prompts at once; the results are as `generate`'s.

        Args:
          inputs: what `prepare` gave for each.
          max_new_tokens: for each.
          rows, on_tokens: see `generate.generate`.
          **sampling: of `SamplingOptions`.
        """
        with self._on_mesh():
            made = generate(
                self.config,
                self.params,
                pad_batch(inputs, self.processor.pad_token_id),
                SamplingOptions(**sampling),
                max_new_tokens=max_new_tokens,
                eos_token_ids=self.stop_ids,
                rows=rows,
                dtype=self.dtype,
                on_tokens=on_tokens,
                compute=self.compute,
            )
        return [
            {
                **self._said(tokens[:length], int(prompt)),
                "compile_seconds": made.compile_seconds,
                "prefill_seconds": made.prefill_seconds,
                "decode_tokens_per_second": _rate(made),
            }
            for tokens, length, prompt in zip(
                made.tokens, made.lengths, made.prompt_lengths, strict=True
            )
        ]

    def answer_each(
        self,
        asked: Iterable[tuple[int, Mapping[str, np.ndarray]]],
        *,
        slots: int,
        max_new_tokens: int,
        **sampling: Any,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Answers prepared prompts as they come, `slots` at one time: where one ends, the next
        begins.

        Args:
          asked: for each a number, that its draws depend on, and what `prepare` gave. Read only a
            few ahead.
          slots: how many are answered at one time; more or fewer are another program.
          max_new_tokens: for each.
          **sampling: of `SamplingOptions`.

        Yields:
          As they end, the number of each, and its text, prompt_tokens and new_tokens.
        """
        lengths: list[tuple[int, int]] = []  # number and prompt's length, in the order of `asked`

        def prompts() -> Iterator[Asked]:
            for number, inputs in asked:
                [prompt] = split_rows(self.config, inputs)
                lengths.append((number, int(prompt_lengths(inputs)[0])))
                yield prompt, request(options, self.stop_ids, max_new_tokens, number)

        check_new_tokens(self.config, max_new_tokens)
        options = SamplingOptions(**sampling)
        run = Run(self.config, self.params, self.dtype, self.compute)
        answers = run.answer(prompts(), rows=slots, new=max_new_tokens)
        while True:
            with self._on_mesh():  # and not what our caller does between two answers
                found = next(answers, None)
            if found is None:
                return
            number, length = lengths[found[0]]
            yield number, self._said(found[1], length)

    def _said(self, tokens: np.ndarray, prompt: int) -> dict[str, Any]:
        return {
            "text": self._text(tokens),
            "prompt_tokens": prompt,
            "new_tokens": len(tokens),
        }

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def forward(self, batch: Mapping[str, Any]) -> jax.Array:
        """Logits [B, S, V] in float32 of a model batch, or of Hugging Face-style inputs."""
        if "input_ids" in batch:
            batch = make_batch(self.config, batch)
        for key in ("tokens", "positions", "segment_ids"):
            if key not in batch:
                raise InputError(f"batch key {key} is missing; `make_batch` makes whole batches")
        tokens, vocab = np.asarray(batch["tokens"]), self.config.text.vocab_size
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
            raise InputError(f"batch key tokens holds ids outside 0 to {vocab - 1}")
        return _forward(self.params, dict(batch), config=self.config, dtype=self.dtype)

    def _text(self, tokens: np.ndarray) -> str:
        ids = tokens.tolist()
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self.processor.tokenizer.decode(ids)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _forward(
    params: dict[str, Any], batch: dict[str, Any], *, config: ModelConfig, dtype: jnp.dtype
) -> Any:
    return EchoVLM(config, dtype).apply({"params": params}, batch, method="forward")


def fingerprint(params: Any) -> str:
    """Hexadecimal, of every bit of all parameters; how they are laid out makes no difference."""

    def digest(leaf: Any) -> str:
        return digests.of_array(np.asarray(leaf))

    leaves = jax.tree_util.tree_leaves_with_path(params)
    with ThreadPoolExecutor(2) as pool:  # each holds one parameter that may come from a device
        found = list(pool.map(digest, (leaf for _, leaf in leaves)))
    described: list[Any] = [
        [jax.tree_util.keystr(path), str(leaf.dtype), list(leaf.shape), one]
        for (path, leaf), one in zip(leaves, found, strict=True)
    ]
    weights = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    if any(isinstance(weight, Quantized) and weight.int8_products for weight in weights):
        described.append("int8 products")
    return digests.of_json(described)


def _rate(made: Generated) -> float:
    """New tokens a second of all rows, the first of each not counted: prefill made that."""
    later = int(made.lengths.sum()) - len(made.lengths)
    return later / made.decode_seconds if later else 0.0


_CONTROL = (
    "the tokenizer makes a control token of the prompt's text; take it out, or load the model with"
    " control_tokens"
)


@functools.cache
def _say_once(line: str) -> None:
    print(f"echovlm: {line}", file=sys.stderr)
