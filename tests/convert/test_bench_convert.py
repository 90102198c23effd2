from pathlib import Path

import pytest

from echovlm_jax.bench_convert import bench_convert
from echovlm_jax.errors import InputError


def test_it_measures_both_sides_and_cleans_up(tmp_path: Path) -> None:
    report = bench_convert(tmp_path / "work", size="tiny", shard_bytes=1_000_000)
    assert report["bytes"] == 2 * 2_846_952
    assert report["ratio"] == report["ours"] / report["theirs"] > 0
    assert 0 < report["peak_rss_bytes"] < 4 * 2**30
    assert "cp -r" in report["what"]
    assert list((tmp_path / "work").iterdir()) == []


def test_unknown_size(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="preset 'huge' is unknown"):
        bench_convert(tmp_path, size="huge")
