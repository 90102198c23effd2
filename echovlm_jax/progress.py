"""A progress bar for long work, on a terminal only."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(total: int, unit: str, what: str) -> Iterator[Callable[[int], object]]:
    """Yields `tick`: call `tick(n)` when n more of `total` units are done.

    The bar goes to standard error and only when that is a terminal, so that logs and pipes stay
    clean; otherwise ticks do nothing. Unit "B" (bytes) is shown with its prefix.

    >>> with progress(3, "tensor", "convert") as tick:
    ...     for _ in range(3):
    ...         tick(1)
    """
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    from tqdm import tqdm

    with tqdm(
        total=total,
        unit=unit,
        desc=what,
        unit_scale=unit == "B",
        unit_divisor=1024,
        dynamic_ncols=True,
        leave=False,
        file=sys.stderr,
    ) as bar:
        yield bar.update
