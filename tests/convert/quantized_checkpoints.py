"""Small checkpoints as quantizing programs write them, and the weights that those read out of them.

compressed-tensors and bitsandbytes make theirs. AutoAWQ, AutoGPTQ and GPTQModel install for cards
only, so AWQ's and GPTQ's are packed here, integer by integer, as their layouts are described.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.convert.checkpoints import DENSE, Tensors, finite, write

torch = pytest.importorskip("torch")

CONFIG = DENSE.replace(
    text={
        "hidden_size": 64,
        "num_heads": 4,
        "head_dim": 16,
        "mlp_dim": 96,
        "mrope_section": (2, 3, 3),
    },
    vision={"out_width": 64},
)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A quantized checkpoint, and the same in floats.

    Attributes:
      stored: every tensor of it.
      settings: of config.json.
      floats: every tensor, dequantized by the program's own rule.
    """

    stored: dict[str, Any]
    settings: dict[str, Any]
    floats: dict[str, Any]

    def write(self, folder: Path) -> Path:
        return written(folder, self.stored, self.settings)


def written(folder: Path, stored: dict[str, Any], settings: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    write(folder, {}, CONFIG)
    save_file({n: t.contiguous() for n, t in stored.items()}, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def linears(vision: bool) -> Iterator[str]:
    """The modules that programs quantize: the decoder's, and the tower's if they do."""
    for name, value in finite(CONFIG).items():
        part = name.startswith("model.layers.") or (vision and name.startswith("visual.blocks."))
        if part and value.ndim == 2:
            yield name.removesuffix(".weight")


def made(
    one: Callable[[Any, int], tuple[dict[str, Any], Any]],
    settings: dict[str, Any],
    *,
    dtype: Any = torch.float16,
    vision: bool = False,
) -> Checkpoint:
    """A checkpoint whose linear modules are `one(weight, seed)`: stored tensors by the ends of
    their names, and the dequantized weight [out, in]."""
    plain: Tensors = finite(CONFIG, "float32", seed=7)
    floats = {name: torch.from_numpy(value).to(dtype) for name, value in plain.items()}
    stored = dict(floats)
    for seed, name in enumerate(linears(vision)):
        parts, floats[f"{name}.weight"] = one(stored.pop(f"{name}.weight"), seed)
        stored |= {f"{name}.{end}": value for end, value in parts.items()}
    return Checkpoint(stored, settings, floats)


def as_words(numbers: np.ndarray, bits: int) -> Any:
    """int32 [n, k · bits / 32] of [n, k]: each row one long binary number, the first lowest."""
    rows = []
    for row in numbers.tolist():
        whole = sum(number << (bits * place) for place, number in enumerate(row))
        rows.append(np.frombuffer(whole.to_bytes(len(row) * bits // 8, "little"), np.int32))
    return torch.from_numpy(np.stack(rows))


def awq(group: int = 32, dtype: Any = torch.float16) -> Checkpoint:
    def one(weight: Any, seed: int) -> tuple[dict[str, Any], Any]:
        rng = np.random.default_rng(seed)
        outputs, inputs = weight.shape
        size = inputs if group == -1 else group
        codes = rng.integers(0, 16, (inputs, outputs))
        zeros = rng.integers(0, 16, (inputs // size, outputs))
        scales = torch.from_numpy(rng.uniform(1e-4, 0.1, zeros.shape)).to(dtype)

        def packed(numbers: np.ndarray) -> Any:
            ordered = numbers.reshape(len(numbers), -1, 8)[..., list(AWQ_ORDER)]
            return as_words(ordered.reshape(len(numbers), -1), 4)

        wide = np.repeat(zeros, size, 0)
        # As AutoAWQ's dequantize_gemm: integers of 8 bits times half precision.
        whole = torch.from_numpy((codes - wide).astype(np.int8))
        value = whole * scales.repeat_interleave(size, dim=0)
        return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}, value.T

    told = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    told |= {"zero_point": True, "modules_to_not_convert": ["visual"]}
    return made(one, {"quantization_config": told}, dtype=dtype)


def gptq(bits: int = 4, group: int = 32, form: str = "gptq", *, act: bool = False) -> Checkpoint:
    def one(weight: Any, seed: int) -> tuple[dict[str, Any], Any]:
        rng = np.random.default_rng(seed)
        outputs, inputs = weight.shape
        size = inputs if group == -1 else group
        codes = rng.integers(0, 2**bits, (inputs, outputs))
        zeros = rng.integers(form == "gptq", 2**bits, (inputs // size, outputs))
        scales = torch.from_numpy(rng.uniform(1e-4, 0.1, zeros.shape)).half()
        g_idx = np.arange(inputs) // size
        if act:
            g_idx = rng.permutation(g_idx)
        # As dequantize_weight: scales[g_idx] * (weight - zeros[g_idx]).
        whole = torch.from_numpy((codes - zeros[g_idx]).astype(np.int16))
        value = scales[torch.from_numpy(g_idx)] * whole
        return {
            "qweight": as_words(codes.T, bits).T,
            "qzeros": as_words(zeros - (form == "gptq"), bits),
            "scales": scales,
            "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
        }, value.T

    told = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act}
    return made(one, {"quantization_config": told | {"checkpoint_format": form}})


def compressed(
    form: str, dtype: Any = torch.bfloat16, *, activations: bool = False, **weights: Any
) -> Checkpoint:
    """By the library: scales of its own kind, its compressor, its decompression, its config."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )

    args = QuantizationArgs(**weights)
    inputs = QuantizationArgs(num_bits=8, strategy="token", dynamic=True) if activations else None
    scheme = QuantizationScheme(
        targets=["Linear"], weights=args, input_activations=inputs, format=form
    )
    compressor = BaseCompressor.get_value_from_registry(form)

    def one(weight: Any, seed: int) -> tuple[dict[str, Any], Any]:
        rng = np.random.default_rng(seed)
        outputs, columns = weight.shape
        groups = columns // args.group_size if args.strategy == "group" else 1
        shape = (1,) if args.strategy == "tensor" else (outputs, groups)
        half = 2 ** (args.num_bits - 1)
        state = {"weight": weight}
        state["weight_scale"] = torch.from_numpy(rng.uniform(0.01, 0.4, shape)).to(dtype)
        if not args.symmetric:
            state["weight_zero_point"] = torch.from_numpy(
                rng.integers(-half, half, shape).astype(np.int8)
            )
        stored = compressor.compress(state, scheme)
        return stored, compressor.decompress(stored, scheme)["weight"]

    said = QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, quantization_status="compressed",
        ignore=["re:visual.*", "lm_head"],
    )  # fmt: skip
    return made(one, {"quantization_config": said.model_dump(mode="json")}, dtype=dtype)


def nf4(dtype: Any = torch.bfloat16, *, kind: str = "nf4", double: bool = True, block: int = 64,
        storage: Any = torch.uint8) -> Checkpoint:  # fmt: skip
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def one(weight: Any, seed: int) -> tuple[dict[str, Any], Any]:
        packed, state = quantize_4bit(
            weight, blocksize=block, compress_statistics=double, quant_type=kind,
            quant_storage=storage,
        )  # fmt: skip
        parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        # As one row: on processors with AVX-512, bitsandbytes 0.50.2 takes another block's scale
        # where a row is no whole number of blocks.
        state.shape = torch.Size((1, weight.numel()))
        return {"weight": packed, **parts}, dequantize_4bit(packed, state).reshape(weight.shape)

    told = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return made(one, {"quantization_config": told}, dtype=dtype, vision=True)


def int8(said: str | None = "float16") -> Checkpoint:
    """LLM.int8(): the library's weight in float32, and config.json's dtype."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    def one(weight: Any, seed: int) -> tuple[dict[str, Any], Any]:
        codes, largest, _ = int8_vectorwise_quant(weight)
        value = int8_vectorwise_dequant(codes, largest)
        parts = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0).byte()}
        return parts, value.to(getattr(torch, said)) if said else value

    told = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return made(one, {"quantization_config": told, "torch_dtype": said, "dtype": None}, vision=True)
