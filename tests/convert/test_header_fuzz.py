"""The safetensors reader against arbitrary headers: an InputError or a sound answer."""

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echovlm_jax.convert import safetensors
from echovlm_jax.errors import InputError

NUMBERS = st.one_of(st.integers(-3, 40), st.integers(), st.just(2**63), st.floats(), st.booleans())
JSON = st.recursive(
    st.one_of(st.none(), NUMBERS, st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from([*safetensors.DTYPES, "F4", "bf16"]), JSON),
        "shape": st.one_of(st.lists(NUMBERS, max_size=4), JSON),
        "data_offsets": st.one_of(st.lists(NUMBERS, min_size=2, max_size=2), JSON),
    }
)
HEADERS = st.dictionaries(st.text(max_size=6), st.one_of(ENTRY, ENTRY, JSON), max_size=4)


@st.composite
def sound(draw: st.DrawFn) -> tuple[bytes, int]:
    """A header that is right, and the bytes it describes."""
    header, end = {}, 0
    for name in draw(st.lists(st.text(max_size=4), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(list(safetensors.DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = safetensors.Entry(tuple(shape), safetensors.DTYPES[dtype], 0).nbytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return json.dumps(header).encode(), end


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Sound files, sound files with some bytes changed, well-formed nonsense, and noise."""
    kind = draw(st.sampled_from(["sound", "damaged", "json", "noise"]))
    if kind == "noise":
        return draw(st.binary(max_size=64))
    if kind == "json":
        text, size = json.dumps(draw(HEADERS)).encode(), draw(st.integers(0, 64))
    else:
        text, size = draw(sound())
    data = bytearray(len(text).to_bytes(8, "little") + text + bytes(size))
    if kind == "damaged":
        for _ in range(draw(st.integers(1, 3))):
            place = draw(st.integers(0, len(data) - 1))
            data[place] = draw(st.integers(0, 255))
        if draw(st.booleans()):
            del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


def check(folder: Path, content: bytes) -> bool:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    try:
        entries = safetensors.read_header(path)
    except InputError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 600 and message.startswith(str(path))
        return False
    # What was accepted describes the file exactly.
    length = 8 + int.from_bytes(content[:8], "little")
    assert sum(entry.nbytes for entry in entries.values()) == len(content) - length
    fd = safetensors.open_file(path)
    for entry in entries.values():
        values = safetensors.read_values(fd, entry, 0, entry.nbytes // entry.dtype.itemsize)
        assert values.tobytes() == content[entry.offset : entry.offset + entry.nbytes]
    return True


def fuzz(folder: Path, examples: int) -> None:
    seen = {True: 0, False: 0}

    @settings(
        max_examples=examples,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(files())
    def run(content: bytes) -> None:
        seen[check(folder, content)] += 1

    run()
    assert min(seen.values()) > examples / 20, "the fuzz must reach both outcomes"


def test_fuzz(tmp_path: Path) -> None:
    fuzz(tmp_path, 200)


@pytest.mark.slow
def test_fuzz_long(tmp_path: Path) -> None:
    fuzz(tmp_path, 2000)


def test_a_lie_costs_no_memory(tmp_path: Path) -> None:
    """Sizes in a header are compared with the file before anything is made of them."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    for length in (len(text), 99_000_000):
        content = length.to_bytes(8, "little") + text.encode()
        tracemalloc.start()
        assert not check(tmp_path, content)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000
