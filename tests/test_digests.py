"""A folder's digests: what they find, and that what is hashed early is what is there in the end."""

import os
import random
import shutil
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


def test_data_files_need_only_be_there(folder: Path) -> None:
    (folder / "x/d").mkdir(parents=True)
    (folder / "x/d/1").write_text("1")
    (folder / "x/d/2").write_text("2")
    digests.write(folder)
    (folder / "x/d/1").write_text("other")
    assert digests.check(folder) == {"x/d/1": DIFFERS}
    assert digests.check(folder, data=False) == {}
    (folder / "x/d/1").unlink()
    (folder / "a").write_text("other")
    assert digests.check(folder, data=False) == {"a": DIFFERS, "x/d/1": MISSING}


def test_what_other_processes_hashed_is_taken_over(folder: Path) -> None:
    known = digests.of_files(folder, ["a", "b/c"])
    digests.write(folder, known=known)
    assert digests.check(folder) == {}
    digests.write(folder, known={**known, "a": known["b/c"]})
    assert digests.check(folder) == {"a": DIFFERS}
