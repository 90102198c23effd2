"""A folder's digests: what they find, and that what is hashed early is what is there in the end."""

import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from echovlm_jax.storage import digests
from echovlm_jax.storage.digests import DIFFERS, MISSING, SUMS, UNKNOWN

NAMES = ["a", "b/c", "b/d e", "b/f/g", "空", "new\nline", "back\\slash\\n", "cr\r"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = random.Random(0)
    for name in NAMES:
        path = tmp_path / "it" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(rng.randrange(9, 3000)))
    (tmp_path / "it" / "empty").touch()
    digests.write(tmp_path / "it")
    return tmp_path / "it"


def test_whole(folder: Path) -> None:
    read = []
    assert digests.check(folder, tick=read.append) == {}
    assert sum(read) == sum((folder / name).stat().st_size for name in NAMES)
    shutil.copytree(folder, folder.with_name("copy"))
    assert digests.check(folder.with_name("copy")) == {}


def test_the_form_is_that_of_xxh128sum(folder: Path) -> None:
    lines = (folder / SUMS).read_bytes().splitlines(keepends=True)
    digest = xxhash.xxh3_128_hexdigest((folder / "a").read_bytes())
    assert f"{digest}  a\n".encode() in lines
    assert any(line.startswith(b"\\") and line.endswith(b"  new\\nline\n") for line in lines)
    own = xxhash.xxh3_128_hexdigest(b"".join(lines[:-1]))
    assert lines[-1] == f"# XXH128 of the lines above: {own}\n".encode()


def test_damage_to_any_file_is_found(folder: Path) -> None:
    rng = random.Random(1)
    for name in [*NAMES, SUMS]:
        path = folder / name
        whole = path.read_bytes()
        for bit in rng.sample(range(8 * len(whole)), 50 if name == SUMS else 8):
            path.write_bytes(flipped(whole, bit))
            assert digests.check(folder) == {name: DIFFERS}
        path.write_bytes(whole[: rng.randrange(len(whole))])
        assert digests.check(folder) == {name: DIFFERS}
        path.write_bytes(whole + b"\0")
        assert digests.check(folder) == {name: DIFFERS}
        path.unlink()
        assert digests.check(folder) == {name: MISSING}
        path.write_bytes(whole)
        assert digests.check(folder) == {}


def flipped(data: bytes, bit: int) -> bytes:
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def test_files_that_do_not_belong(folder: Path) -> None:
    os.rename(folder / "a", folder / "t")
    os.rename(folder / "b/c", folder / "a")
    os.rename(folder / "t", folder / "b/c")
    assert digests.check(folder) == {"a": DIFFERS, "b/c": DIFFERS}
    (folder / "b/extra").touch()
    os.rename(folder / "b/f/g", folder.with_name("outside"))
    (folder / "b/f/g").symlink_to(folder.with_name("outside"))  # of the same content, for now
    (folder / "link").symlink_to(folder / "b", target_is_directory=True)
    os.remove(folder / "empty")
    os.mkfifo(folder / "empty")  # opening it would wait for ever
    found = digests.check(folder)
    assert found == {
        "a": DIFFERS, "b/c": DIFFERS, "b/extra": UNKNOWN, "b/f/g": DIFFERS, "link": UNKNOWN,
        "empty": DIFFERS,
    }  # fmt: skip


def test_a_digest_file_of_another_folder(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "a").write_bytes(b"other")
    digests.write(other)
    shutil.copy(other / SUMS, folder / SUMS)
    assert digests.check(folder) == {"a": DIFFERS}


def test_parts_make_the_whole(folder: Path) -> None:
    for name in NAMES:
        (folder / name).write_bytes(b"other")
    parts = [digests.check(folder, part=i, parts=3) for i in range(3)]
    assert {name: what for part in parts for name, what in part.items()} == dict.fromkeys(
        NAMES, DIFFERS
    )
    assert sum(map(len, parts)) == len(NAMES)


def test_what_other_processes_hashed_is_taken_over(folder: Path) -> None:
    known = digests.of_files(folder, ["a", "b/c"])
    digests.write(folder, known=known)
    assert digests.check(folder) == {}
    digests.write(folder, known={**known, "a": known["b/c"]})
    assert digests.check(folder) == {"a": DIFFERS}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which files are open")
def test_a_complete_file_is_hashed_while_another_one_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(2)
    hashed, original = [], digests._hash

    def counted(file, *rest):
        hashed.append(Path(file.name).name)
        return original(file, *rest)

    monkeypatch.setattr(digests, "_hash", counted)
    target = tmp_path / "it.partial"
    target.mkdir()
    with digests.Watch(lambda: tmp_path.glob("it*/*")) as watch:
        for name in ("a", "b"):
            with open(target / name, "wb", buffering=0) as file:
                file.write(rng.randbytes(300_000))
                time.sleep(0.2)
                assert name not in hashed
                file.write(rng.randbytes(300_000))
            eventually(lambda name=name: name in hashed)
        target.rename(tmp_path / "it")
        time.sleep(0.2)  # under its new name it is no other file
        with open(tmp_path / "it/c", "wb", buffering=0) as file:
            file.write(b"1")
            time.sleep(0.2)
    assert hashed == ["a", "b"]
    with open(tmp_path / "it/b", "ab") as file:
        file.write(b"more")
    digests.write(tmp_path / "it", seen=watch.seen)
    assert sorted(hashed[2:]) == ["b", "c"]  # one changed after it had been hashed
    assert digests.check(tmp_path / "it") == {}


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
