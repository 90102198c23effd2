"""A dataset's folder: a TFDS dataset in ArrayRecord, and beside it what is read without pixels.

    dataset_info.json, features.json              what TFDS reads
    echovlm-train.array_record-00000-of-00004     exams, texts and encoded pictures
    train.records.jsonl                           the texts and sizes, a line an exam
    train.index                                   where each line is, its checksum, its organ
    manifest.json                                 shards, digests, organs, counts
    quarantine.jsonl                              what was left out, and why

Everything is checked when it is read: the manifest against its own digest, the index against the
manifest, a line against its checksum in the index, an exam's bytes against the digest in its line.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echovlm_jax.data.record import Medium, Question, Record, Report, Turn
from echovlm_jax.errors import InputError
from echovlm_jax.processing.files import read_bytes, shown
from echovlm_jax.processing.images import ImageConfig, smart_resize

NAME = "echovlm"  # TFDS's name of the dataset
VERSION = "1.1.0"  # of the features
READ = ("1.0.0", VERSION)  # 1.0.0: without seconds, so that a loop counts as `media.DEFAULT_FPS`
MANIFEST, QUARANTINE = "manifest.json", "quarantine.jsonl"
INDEX = np.dtype([("offset", "<u8"), ("crc", "<u4"), ("organ", "<i2"), ("unused", "<i2")])
_MAX_INDEX = 2**34


def shard_name(split: str, number: int, count: int) -> str:
    return f"{NAME}-{split}.array_record-{number:05d}-of-{count:05d}"


def records_name(split: str) -> str:
    return f"{split}.records.jsonl"


def index_name(split: str) -> str:
    return f"{split}.index"


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def line_of(record: Record, stored: bytes) -> dict[str, Any]:
    """A record as its line in *.records.jsonl; `stored` is its example."""
    return {
        "id": record.id,
        "organ": record.organ,
        "source": record.source,
        "group": record.group,
        "synthetic": record.synthetic,
        "media": [list(medium) for medium in record.media],
        "turns": [list(turn) for turn in record.turns],
        "reports": [
            {
                "language": report.language,
                "findings": report.findings,
                "impression": report.impression,
                "caption": report.caption,
                "diagnosis": report.diagnosis,
                "questions": [[q.question, q.answer, list(q.options)] for q in report.questions],
            }
            for report in record.reports
        ],
        "digest": digest(stored),
    }


def record_of(line: dict[str, Any]) -> Record:
    """The record that `line_of` made a line of."""
    return Record(
        id=line["id"],
        organ=line["organ"],
        media=tuple(Medium(*medium) for medium in line["media"]),
        turns=tuple(Turn(*turn) for turn in line["turns"]),
        reports=tuple(
            Report(
                **{key: text for key, text in report.items() if key != "questions"},
                questions=tuple(Question(q, a, tuple(o)) for q, a, o in report["questions"]),
            )
            for report in line["reports"]
        ),
        source=line["source"],
        group=line["group"],
        synthetic=line["synthetic"],
    )


def lengths_of(record: Record) -> tuple[list[int], list[int], int]:
    """What packing asks of an exam, by formula, at Qwen2-VL's own image settings.

    Returns:
      patches and image tokens, of each medium, and the bytes of all its texts: no tokenizer makes
      more tokens than bytes.
    """
    config = ImageConfig()
    patches = []
    for medium in record.media:
        height, width = smart_resize(
            medium.height, medium.width, config.factor, config.min_pixels, config.max_pixels
        )
        steps = -(-max(medium.frames, 1) // config.temporal_patch_size)
        patches.append(steps * (height // config.patch_size) * (width // config.patch_size))
    texts = [turn.text for turn in record.turns]
    for report in record.reports:
        texts += [report.findings, report.impression, report.caption, report.diagnosis]
        for question in report.questions:
            texts += [question.question, question.answer, *question.options]
    merged = [count // config.merge_size**2 for count in patches]
    return patches, merged, sum(len(text.encode()) for text in texts)


def features() -> Any:
    """The features of a record, as TFDS declares them. Pictures are bytes: as images, TFDS would
    need TensorFlow to encode and decode them."""
    import tensorflow_datasets.public_api as tfds

    text, whole = tfds.features.Text(), tfds.features.Scalar(np.int64)
    many = tfds.features.Sequence
    return tfds.features.FeaturesDict(
        {
            "id": text,
            "organ": text,
            "source": text,
            "group": text,
            "synthetic": tfds.features.Scalar(np.bool_),
            "images": many(text),  # encoded PNG or JPEG: every picture, frame by frame
            "frames": many(whole),  # of each medium; 0: an image
            "heights": many(whole),
            "widths": many(whole),
            "seconds": many(tfds.features.Scalar(np.float32)),  # between frames; 0: not known
            "patches": many(whole),  # of each medium, at Qwen2-VL's image settings
            "image_tokens": many(whole),
            "text_bytes": whole,
            "conversations": many({"role": text, "text": text}),
            "reports": text,  # JSON, as in *.records.jsonl
        }
    )


def example_of(record: Record, images: Sequence[bytes]) -> dict[str, Any]:
    """A record as the features say."""
    patches, tokens, text_bytes = lengths_of(record)
    return {
        "id": record.id,
        "organ": record.organ,
        "source": record.source,
        "group": record.group,
        "synthetic": record.synthetic,
        "images": list(images),
        "frames": [medium.frames for medium in record.media],
        "heights": [medium.height for medium in record.media],
        "widths": [medium.width for medium in record.media],
        "seconds": [medium.seconds or 0.0 for medium in record.media],
        "patches": patches,
        "image_tokens": tokens,
        "text_bytes": text_bytes,
        "conversations": [{"role": turn.role, "text": turn.text} for turn in record.turns],
        "reports": json.dumps(line_of(record, b"")["reports"], ensure_ascii=False),
    }


def images_of(stored: bytes) -> list[bytes]:
    """The encoded pictures of a stored example."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example.FromString(stored)  # pyright: ignore[reportAttributeAccessIssue]
    return list(example.features.feature["images"].bytes_list.value)


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    body = json.dumps(manifest, ensure_ascii=False, sort_keys=True)
    return json.dumps({**manifest, "digest": digest(body.encode())}, indent=1).encode()


def read_manifest(root: Path) -> dict[str, Any]:
    """A dataset's manifest. Raises InputError where there is none, or a damaged one."""
    path = root / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{shown(root)}: is no dataset; give a folder made by `echovlm data build`, or phantom"
        )
    try:
        manifest = json.loads(read_bytes(path))
        stated = manifest.pop("digest")
        body = json.dumps(manifest, ensure_ascii=False, sort_keys=True)
        whole = stated == digest(body.encode())
    except InputError:
        raise
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        whole, manifest = False, {}
    if not whole:
        raise InputError(f"{shown(path)}: is damaged; build or copy the dataset again")
    if manifest.get("version") not in READ:
        raise InputError(f"{shown(path)}: is of another version; build the dataset again")
    return manifest


def read_index(path: Path, entry: dict[str, Any]) -> np.ndarray:
    """A split's index, checked: INDEX [N + 1]; the last row holds only where the lines end."""
    data = read_bytes(path, _MAX_INDEX)
    if digest(data) != entry["index"]:
        raise InputError(f"{shown(path)}: is damaged; build or copy the dataset again")
    return np.frombuffer(data, INDEX)
