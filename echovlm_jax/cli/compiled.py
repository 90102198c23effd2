"""Compiled programs that outlive the process: JAX's persistent cache, in a folder of the user's."""

import os
import stat
import sys
from pathlib import Path

# JAX reads these. Whoever sets the folder himself, or sets it to nothing, has decided.
FOLDER = "JAX_COMPILATION_CACHE_DIR"
# A program that takes less than this to compile isn't worth a file; JAX's own limit is a second.
_SECONDS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
KEPT = (  # in the help of the commands that do
    f"compiled programs are kept in {FOLDER}, by default\n"
    "$XDG_CACHE_HOME/echovlm/xla or ~/.cache/echovlm/xla, for the next run; set it to\n"
    "nothing to keep none, and delete the folder when you like"
)


def keep_programs(debug: bool) -> None:
    """Tells JAX, before it is imported, where compiled programs are kept.

    JAX files a program under all that it depends on: its own version, XLA's options, the device and
    the processor's features. What is in the folder is run, so that it must be ours alone. Where
    there can't be such a folder, nothing is kept.
    """
    if FOLDER in os.environ:
        return
    folder = _private_folder()
    if folder is not None:
        os.environ[FOLDER] = str(folder)
        for name, value in _SECONDS.items():
            os.environ.setdefault(name, value)
    if debug:
        where = f"in {folder}" if folder is not None else "nowhere: there is no folder of ours"
        print(f"echovlm: compiled programs are kept {where}", file=sys.stderr)


def _private_folder() -> Path | None:
    """The folder, made where it isn't there; None where others may write to it, or we may not."""
    given = Path(os.environ.get("XDG_CACHE_HOME") or ".")
    try:
        parent = given if given.is_absolute() else Path.home() / ".cache"
        folder = parent / "echovlm" / "xla"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # no place, or no home
        return None
    ours = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if ours and os.access(folder, os.W_OK | os.X_OK) else None
