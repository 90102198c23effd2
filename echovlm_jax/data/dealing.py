"""From the records to the parts of a build: pictures looked at, groups dealt out to the splits."""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echovlm_jax.data import groups, parts, survey
from echovlm_jax.data.sources import Sources
from echovlm_jax.processing.files import shown
from echovlm_jax.progress import progress

# Runs a function (work folder, number) -> result for each number; yields results as they come.
Runner = Callable[[Callable[[str, int], Any], str, Sequence[int]], Iterator[Any]]

MAX_SHARDS = 256  # a large dataset has larger ones: each process that reads keeps them all open
_LARGE_GROUP = 0.1  # of all records, from which on a group is worth a warning


def deal(
    work: Path,
    found: Sources,
    plan: dict[str, Any],
    shares: tuple[float, float],
    salt: bytes,
    run: Runner,
    records: int,
) -> tuple[dict[str, Any], int]:
    """Looks at all pictures, deals the records out to splits and writes the plan of the parts.

    Args:
      work: the work folder.
      found, plan: the records, and what all jobs need to know; gets the parts.
      shares: those of validation and test.
      salt: secret of the patients' keys.
      run: the runner of the jobs.
      records: least number in a job.

    Returns:
      what is counted of groups and near-duplicates, and about how many bytes the parts will have.
    """
    size = max(records, -(-len(found.rows) // MAX_SHARDS))
    jobs = survey.prepare(work, found, plan, size)
    with progress(len(found.rows), "record", "look") as tick:
        for count in run(functools.partial(survey.look, salt=salt), str(work), jobs):
            tick(count)
    seen = survey.gather(work, jobs, plan, len(found.rows))
    ties = np.concatenate([found.ties, seen.ties])
    grouping = groups.group(found.keys, ties, validation=shares[0], test=shares[1])
    near = groups.near_duplicates(grouping.split, seen.row, seen.hashes)
    rows = found.rows.copy()
    rows["pictures"], rows["group"], rows["split"] = seen.pictures, *grouping[:2]
    rows = rows[np.argsort(rows["split"], kind="stable")]
    plan["parts"] = [list(part) for part in parts.cut(rows, size, plan["key"])]
    rows.tofile(work / parts.ROWS)
    (work / parts.PLAN).write_text(json.dumps(plan), "utf-8")
    counts = {**grouping.counts, "near_duplicates": near}
    return counts, seen.size + int(rows["size"].sum())


def warnings(counts: dict[str, Any], found: Sources) -> list[str]:
    """Warnings about a split that may leak."""
    records, out = counts["records"], []
    unmatched, example = found.unmatched
    if unmatched:
        out.append(
            f"--group-pattern finds no group in {unmatched:,} of {records:,} records, the first is"
            f" {shown(example)!r}"
        )
    if counts["unnamed"] == records:
        out.append(
            "nothing names patients, so one patient's records may be in two splits; give patient_id"
            " in the records, or --group-pattern where ids or paths tell"
        )
    elif counts["unnamed"] > unmatched:
        out.append(
            f"no patient is named of {counts['unnamed']:,} of {records:,} records, so one patient's"
            " may be in two splits"
        )
    if counts["largest_group"] > max(_LARGE_GROUP * records, 20):
        out.append(
            f"one group holds {counts['largest_group']:,} of {records:,} records, all in one split;"
            " check what ties them (an id that stands for many, as 'anonymous', or one picture)"
        )
    if counts["near_duplicates"]:
        out.append(
            f"{counts['near_duplicates']:,} records of validation or test have a picture that"
            " nearly equals one of another split; if they are of one patient, group them"
        )
    return out
