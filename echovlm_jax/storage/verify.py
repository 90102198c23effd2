"""Every stored byte of a model or a run against its digest."""

import json
import os
from pathlib import Path
from typing import Any

from echovlm_jax.errors import InputError
from echovlm_jax.progress import progress
from echovlm_jax.storage import digests
from echovlm_jax.storage.files import as_path
from echovlm_jax.storage.layout import (
    CHECKPOINTS,
    CONFIG,
    MODEL,
    OWN_MODEL,
    PARAMS,
    STATE,
    SUMS,
    TREE,
    run_files,
    steps,
)


def verify(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads all that a folder stores and compares it with the digests stored with it.

    Args:
      folder: a model made by `convert` or `upcycle`, a training run, its `checkpoints/`, or one of
        these. Unfinished and broken checkpoints and a run's log are left out.

    Returns:
      ok; the number of arrays and bytes; corrupt, the names of files that differ, are missing or
      have no digest; for a run checkpoints, their steps; unchecked, where there are any, the names
      of files that may lack a digest: those added beside a converted model's weights, and the
      configuration of a run older than its digests.

    Raises:
      InputError: there is no such folder, or one without digests.
    """
    root = as_path(folder)
    is_run = (root / MODEL / CONFIG).is_file() or (root / CHECKPOINTS).is_dir()
    inside = root / CHECKPOINTS if is_run else root
    whole = (root / SUMS).is_file() or bool(_trees(root))
    found = [] if whole and not is_run else steps(inside)
    if found or (is_run and whole):
        parts = [inside / str(step) for step in found]
    elif whole:
        parts = [root]
    elif not root.is_dir():
        raise InputError(f"{root}: no such folder; give a model's or a run's folder")
    else:
        raise InputError(
            f"{root}: holds no digests; `convert` and `train` store them, other folders have none"
        )
    arrays = 0
    sizes: list[int] = []
    corrupt: list[str] = []
    unchecked: list[str] = []
    if is_run:
        problems, unchecked = run_problems(root)
        corrupt += problems
    with progress(sum(map(digests.nbytes, parts)), "B", "verify") as tick:

        def read(count: int) -> None:
            sizes.append(count)  # from several threads
            tick(count)

        for part in parts:
            problems = digests.check(part, tick=read)
            if problems and not part.exists():
                continue  # a training run has just pruned it
            base = part.relative_to(root)
            if (part / PARAMS).is_dir():
                problems, added = without_added(problems)
                unchecked += added
            corrupt += [str(base / name) for name in problems]
            if (part / SUMS).is_file():
                sizes.append(len((part / SUMS).read_bytes()))
            arrays += sum(_count(tree) for tree in _trees(part))
    result = {"ok": not corrupt, "arrays": arrays, "bytes": sum(sizes), "corrupt": corrupt}
    if unchecked:
        result |= {"unchecked": unchecked}
    return {**result, CHECKPOINTS: found} if found else result


def without_added(problems: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """The problems of a converted model without the files that were added beside its weights, such
    as a tokenizer, and the names of those."""
    added = [n for n, what in problems.items() if what == digests.UNKNOWN and os.sep not in n]
    return {name: what for name, what in problems.items() if name not in added}, added


class DamagedError(InputError):
    """Stored data is lost or damaged; `what` describes it in a few words."""

    def __init__(self, folder: Path, what: str, mend: str) -> None:
        super().__init__(f"{folder}: is broken: {what}; {mend}")
        self.what = what


def check_files(folder: Path, mend: str, *, data: bool = True, added: bool = False) -> list[str]:
    """Compares files with their digests.

    Args:
      folder: a checkpoint or a converted model.
      mend: the advice at the end of the error.
      data: whether to read arrays' data files too.
      added: whether files without a digest may lie beside the weights.

    Returns:
      the names of such files.

    Raises:
      DamagedError: a file differs, is missing, or does not belong there.
    """
    with progress(digests.nbytes(folder) if data else 0, "B", f"check {folder.name}") as tick:
        problems = digests.check(folder, tick=tick, data=data)
    found = []
    if added:
        problems, found = without_added(problems)
    if problems:
        raise DamagedError(folder, digests.told(problems), mend)
    return found


def run_problems(run: Path) -> tuple[dict[str, str], list[str]]:
    """The problems of a run's own files, and the names of those without a digest.

    A run older than digests has none, and its checkpoints have no copies of its model/. With such
    copies, missing digests were lost.
    """
    names = run_files(run)
    if digests.read(run) == digests.MISSING:
        kept = [run / CHECKPOINTS / str(step) / OWN_MODEL for step in steps(run / CHECKPOINTS)]
        return ({SUMS: digests.MISSING}, []) if any(path.is_dir() for path in kept) else ({}, names)
    return digests.check(run, names=names), []


def _trees(folder: Path) -> list[Path]:
    found = [folder / arrays / TREE for arrays in (PARAMS, STATE)]
    return [path for path in found if path.is_file()]


def _count(tree: Path) -> int:
    """The number of listed arrays; 0 where the list can't be read."""
    try:
        leaves = json.loads(tree.read_text("utf-8"))["tree_metadata"].values()
        kinds = [leaf["value_metadata"]["value_type"] for leaf in leaves]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 0
    return sum(kind in ("jax.Array", "np.ndarray") for kind in kinds)
