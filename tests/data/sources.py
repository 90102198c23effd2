"""Small official-format files and pictures for the tests of `data build`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed: int, height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(seed: int, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(seed)).save(out, kind, **options)
    return out.getvalue()


def record(number: int, images: int = 1, **more: object) -> dict:
    paths = [f"{number}_{view}.png" for view in range(images)]
    return {
        "id": f"exam{number}",
        "image": paths,
        "conversations": [
            {"from": "human", "value": "<image>" * images + "What is seen?"},
            {"from": "gpt", "value": f"Finding {number}."},
        ],
        **more,
    }


def write(folder: Path, records: list, name: str = "liver.json") -> tuple[list[Path], Path]:
    """A source file and the image folder, with a picture for every path that is a plain name."""
    root = folder / "images"
    root.mkdir(parents=True, exist_ok=True)
    seed = 0
    for entry in records:
        for path in entry["image"] if isinstance(entry, dict) else []:
            seed += 1
            if isinstance(path, str) and path.endswith(".png") and Path(path).name == path:
                (root / path).write_bytes(encoded(seed))
    source = folder / name
    source.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    return [source], root
