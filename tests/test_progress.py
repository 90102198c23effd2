"""The progress bar: on a terminal only."""

import io

import pytest

from echovlm_jax.progress import progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "shows"), [(io.StringIO(), False), (_Terminal(), True)])
def test_bar_only_on_a_terminal(monkeypatch, stream, shows) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    with progress(4, "tensor", "convert") as tick:
        tick(1)
        tick(3)
    assert ("convert" in stream.getvalue()) == shows
