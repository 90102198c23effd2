"""Random damage to JSON and images: no crash, no hang, and never a record that is just gone."""

import json
import random

import pytest

from echovlm_jax.data.build import Options, validate
from echovlm_jax.data.media import read_medium
from echovlm_jax.data.quarantine import REASONS, Refused
from echovlm_jax.errors import InputError
from echovlm_jax.processing.images import decode_image
from tests.data.sources import encoded, record, write

WORDS = [
    *("id", "image", "images", "conversations", "messages", "from", "value", "human", "gpt"),
    *("<image>", "../x", "/x", "\ud800", "<|im_end|>", "", "0_0.png", "reports", "language", "zh"),
]


def _value(draw: random.Random, depth: int = 0):
    kind = draw.randrange(9 if depth < 4 else 6)
    if kind < 3:
        return draw.choice(WORDS)
    if kind < 6:
        return draw.choice([None, True, 0, -1, 10**40, 1.5, float("nan"), []])
    if kind == 6:
        return [_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(WORDS): _value(draw, depth + 1) for _ in range(draw.randrange(5))}


def _mutate(draw: random.Random, value, depth: int = 0):
    """`value` with about one place of it changed."""
    if draw.random() < 0.15:
        return _value(draw)
    if isinstance(value, dict) and value:
        key = draw.choice(list(value))
        if draw.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _mutate(draw, value[key], depth + 1)}
    if isinstance(value, list) and value:
        n = draw.randrange(len(value))
        return [*value[:n], _mutate(draw, value[n], depth + 1), *value[n + 1 :]]
    return _value(draw)


def _fuzz_records(where, cases):
    """All cases as one file: as many kept and quarantined as there are."""
    draw = random.Random(1)
    rich = record(0, reports=[{"language": "zh", "caption": "肝", "questions": []}], organ="liver")
    sources, images = write(where, [rich])
    changed = [_mutate(draw, {**rich, "id": str(n)}) for n in range(cases)]
    sources[0].write_text(json.dumps(changed))  # lone surrogates go out as escapes
    return validate(sources, images, Options(validation=0, test=0))


def _fuzz_bytes(where, cases):
    """A file of three records, its bytes damaged: it is refused, or every record counted."""
    draw = random.Random(2)
    sources, images = write(where, [record(n) for n in range(3)])
    whole, outcomes = sources[0].read_bytes(), set()
    for _ in range(cases):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(data))
            kind = draw.randrange(3)
            if kind == 0:
                data[at] = draw.randrange(256)
            elif kind == 1:
                del data[at : at + draw.randint(1, 30)]
            else:
                data[at:at] = draw.choice([b'"', b"{", b"]", b"\\", b"\xff", b"[" * 2000])
        sources[0].write_bytes(data)
        try:
            report = validate(sources, images, Options(validation=0, test=0))
        except InputError as error:
            outcomes.add("refused")
            assert str(sources[0]) in str(error) and "\n" not in str(error)
        else:
            outcomes.add("counted")
            assert report["records"] == report["kept"] + sum(report["quarantined"].values())
            assert report["records"] == len(json.loads(data.decode("utf-8", "replace")))
    return outcomes


def _fuzz_images(where, cases):
    draw = random.Random(3)
    files = [encoded(n, kind) for n in range(3) for kind in ("PNG", "JPEG")]
    files += [encoded(1, "JPEG", progressive=True), encoded(1, "PNG", compress_level=0)]
    outcomes = set()
    for n in range(cases):
        data = bytearray(files[n % len(files)])
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        path = where / "image"
        path.write_bytes(data)
        try:
            stored = read_medium(path, num_frames=4, crop=False)
        except Refused as refused:
            outcomes.add(refused.reason)
        else:
            outcomes.add("kept")
            (image,) = stored.images
            assert decode_image(image, "").shape[:2] == stored.medium[1:3]
    return outcomes


def test_fuzzed_records_are_all_counted(tmp_path):
    report = _fuzz_records(tmp_path, 300)
    assert report["records"] == 300 == report["kept"] + sum(report["quarantined"].values())
    assert 0 < report["kept"] < 300 and len(report["quarantined"]) > 5
    assert report["quarantined"].keys() <= REASONS.keys()


def test_fuzzed_files_are_refused_or_counted(tmp_path):
    assert _fuzz_bytes(tmp_path, 80) == {"refused", "counted"}


def test_fuzzed_images_are_kept_or_refused(tmp_path):
    assert {"kept", "unreadable image"} <= _fuzz_images(tmp_path, 150)


@pytest.mark.slow
def test_2000_fuzzed_records(tmp_path):
    report = _fuzz_records(tmp_path, 2000)
    assert report["records"] == 2000 == report["kept"] + sum(report["quarantined"].values())


@pytest.mark.slow
def test_2000_fuzzed_files(tmp_path):
    assert _fuzz_bytes(tmp_path, 2000) == {"refused", "counted"}


@pytest.mark.slow
def test_2000_fuzzed_images(tmp_path):
    assert _fuzz_images(tmp_path, 2000) <= {"kept", *REASONS}
