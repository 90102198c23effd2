"""Two files of texts, references and predictions, scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.metrics import score
from echovlm_jax.processing.files import open_file, shown


def score_files(
    references: str | Path,
    predictions: str | Path,
    language: str = "zh",
    *,
    segment: str = "characters",
    seed: int = 0,
) -> dict[str, Any]:
    """`metrics.score` of two files with a line `{"id", "text"}` a text, paired by id.

    A reference without a prediction is scored against an empty text.

    Returns:
      what `metrics.score` returns, n (references), missing (ids without a prediction) and
      unexpected (ids without a reference, which don't count).

    Raises:
      InputError: a file can't be read, a line is malformed or an id there twice; names file and
        line. Or as `metrics.score`.
    """
    wanted, found = read_texts(Path(references)), read_texts(Path(predictions))
    if not wanted:
        raise InputError(f'{shown(references)}: holds no references; write {{"id", "text"}} a line')
    result = score(
        list(wanted.values()),
        [found.get(name, "") for name in wanted],
        language,
        segment=segment,
        seed=seed,
    )
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    return result | {"missing": missing, "unexpected": unexpected}


def read_texts(path: Path) -> dict[str | int, str]:
    """A file's texts by id. Raises InputError."""
    out: dict[str | int, str] = {}
    try:
        with open_file(path) as file:
            raw = file.read()
    except OSError as error:
        raise InputError(f"{shown(path)}: can't be read ({error.strerror})") from None
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{shown(path)}:{number}"
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise InputError(f"{where}: is not UTF-8 text") from None
        except (ValueError, RecursionError):
            raise InputError(f'{where}: is not JSON; write {{"id": …, "text": …}}') from None
        name = value.get("id") if isinstance(value, dict) else None
        if (
            not isinstance(name, str | int)
            or isinstance(name, bool)
            or not isinstance(value.get("text"), str)
        ):
            raise InputError(
                f'{where}: must be an object with "id", a text or whole number, and "text", a text'
            )
        if name in out:
            raise InputError(f"{where}: id {shown(repr(name))} is there twice; rename one")
        out[name] = value["text"]
    return out
