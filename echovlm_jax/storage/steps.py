"""Pruning a run's checkpoints, setting broken ones aside, clearing up after a kill.

On a file system a folder gets a step's name when it is whole. In a bucket it has the name from the
beginning, and is a checkpoint while it has XXH128SUMS, which is written last.
"""

import re
from pathlib import Path

from echovlm_jax.storage.files import below, in_bucket, remove, write_bytes
from echovlm_jax.storage.layout import CHUNKS, EXTRA, STATE, SUMS, steps

UNFINISHED, DELETED, BROKEN = ".unfinished", ".deleted", ".broken"
PART = ".digests.{}.json"  # of one process

# Left by a kill: an unfinished save of ours or of Orbax's, or an unfinished deletion.
_LEFT = re.compile(rf"[0-9]+({re.escape(UNFINISHED)}|{re.escape(DELETED)})(\.orbax-.*)?")
_OURS = re.compile(rf"({STATE}|{EXTRA})/.*|{re.escape(CHUNKS)}|\.digests\.[0-9]+\.json")


def unfinished(folder: Path, step: int) -> Path:
    """Where a checkpoint is made."""
    return folder / (f"{step}" if in_bucket(folder) else f"{step}{UNFINISHED}")


def prune(folder: Path, keep: int, keep_every: int | None) -> None:
    """Deletes all but the newest checkpoints, and each whose step is a multiple of `keep_every`."""
    for step in steps(folder)[:-keep]:
        if keep_every is None or step % keep_every:
            # First its name or its digests: after a kill the rest is no checkpoint.
            gone = folder / str(step)
            if in_bucket(gone):
                (gone / SUMS).unlink()
            else:
                gone = gone.rename(folder / f"{step}{DELETED}")
            remove(gone)


def clear(folder: Path) -> None:
    """Deletes unfinished saves and deletions, and nothing that may be somebody else's."""
    whole = {str(step) for step in steps(folder)} | set(broken(folder))
    for path in folder.iterdir():
        if in_bucket(path):
            left = path.name.isdecimal() and path.name not in whole
            if left and all(map(_OURS.fullmatch, below(path))):
                remove(path)
        elif _LEFT.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            remove(path)


def broken(folder: Path) -> list[str]:
    """The names of checkpoints that were set aside."""
    if in_bucket(folder):
        mark = f"/{SUMS}{BROKEN}"
        return [name.removesuffix(mark) for name in below(folder) if name.endswith(mark)]
    return sorted(path.name for path in folder.glob(f"*{BROKEN}*"))


def set_aside(path: Path) -> str:
    """Renames a broken checkpoint, or in a bucket its digests. Returns a few words about that.
    Raises OSError."""
    if in_bucket(path):
        found = path / SUMS
        write_bytes(path / f"{SUMS}{BROKEN}", found.read_bytes() if found.is_file() else b"")
        found.unlink()
        return f"left there, its {SUMS} renamed"
    aside, count = path.with_name(f"{path.name}{BROKEN}"), 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}{BROKEN}-{count}")
    path.rename(aside)
    return f"set aside as {aside.name}"
