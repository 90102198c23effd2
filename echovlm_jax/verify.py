"""Every stored byte of a model or a run against its digest."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from echovlm_jax import digests
from echovlm_jax.errors import InputError
from echovlm_jax.progress import progress

CHECKPOINTS = "checkpoints"
_PARAMS, _STATE = "params", "state"  # where a model, and where a checkpoint, has its arrays
_TREE = "_METADATA"  # Orbax's list of them


def steps(folder: Path) -> list[int]:
    """The steps whose checkpoints a folder holds, in order; none where there is no folder."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def verify(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads all that a folder stores and compares it with the digests stored with it.

    Args:
      folder: made by `convert` or `upcycle`; or a training run's, its `checkpoints/`, or one of
        those. What was set aside as broken, or is being saved, is left out.

    Returns:
      ok; arrays and bytes that are stored; corrupt, the names of files that differ, are missing or
      are not among the digests; checkpoints, the steps looked at, for a run.

    Raises:
      InputError: there is no such folder, or one without digests.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give a model's or a run's folder")
    inside = root / CHECKPOINTS if (root / CHECKPOINTS).is_dir() else root
    found = steps(inside)
    if found:
        parts = [inside / str(step) for step in found]
    elif (root / digests.SUMS).exists() or _trees(root):
        parts = [root]
    else:
        raise InputError(
            f"{root}: holds no digests; `convert` and `train` store them, other folders have none"
        )
    arrays = size = 0
    corrupt: list[str] = []
    sizes = [digests.nbytes(part) for part in parts]
    with progress(sum(sizes), "B", "verify") as tick:
        for part, nbytes in zip(parts, sizes, strict=True):
            problems = digests.check(part, tick=tick)
            if problems and not part.exists():
                continue  # a run that goes on has pruned it meanwhile
            base = part.relative_to(root)
            if (part / _PARAMS).is_dir():  # people put a tokenizer beside a model's weights
                added = {n for n, what in problems.items() if what == digests.UNKNOWN}
                problems = {n: w for n, w in problems.items() if n not in added or os.sep in n}
            corrupt += [str(base / name) for name in problems]
            arrays += sum(_count(tree) for tree in _trees(part))
            size += nbytes
    result = {"ok": not corrupt, "arrays": arrays, "bytes": size, "corrupt": corrupt}
    return {**result, "checkpoints": found} if found else result


def _trees(folder: Path) -> list[Path]:
    found = [folder / arrays / _TREE for arrays in (_PARAMS, _STATE)]
    return [path for path in found if path.is_file()]


def _count(tree: Path) -> int:
    """How many arrays are listed; 0 where the list can't be read."""
    try:
        leaves = json.loads(tree.read_text("utf-8"))["tree_metadata"].values()
        kinds = [leaf["value_metadata"]["value_type"] for leaf in leaves]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 0
    return sum(kind in ("jax.Array", "np.ndarray") for kind in kinds)
