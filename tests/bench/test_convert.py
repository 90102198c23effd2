import shutil
from pathlib import Path

import pytest

from echovlm_jax.bench.convert import bench_convert
from echovlm_jax.errors import InputError


def test_it_measures_both_sides_and_cleans_up(tmp_path: Path) -> None:
    report = bench_convert(tmp_path / "work", size="tiny", shard_bytes=1_000_000, rounds=2)
    assert report["bytes"] == 2 * 2_846_952
    assert report["ratio"] == report["ours"] / report["theirs"] > 0
    assert 0 < report["peak_rss_bytes"] < 4 * 2**30
    assert "cp -r" in report["what"]
    assert [len(seconds) for seconds in report["runs"].values()] == [2, 2]
    assert list((tmp_path / "work").iterdir()) == []


def test_it_measures_few_bits_and_loading_them(tmp_path: Path) -> None:
    report = bench_convert(tmp_path / "work", size="tiny", quantize="int4", rounds=1)
    assert "in int4" in report["what"]
    assert 2_846_952 / 2 < report["load"]["held_bytes"] < 2 * 2_846_952
    assert 0 < report["load"]["peak_rss_beyond_bytes"] < 3 * 2**30
    assert list((tmp_path / "work").iterdir()) == []


def test_unknown_size(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="preset 'huge' is unknown"):
        bench_convert(tmp_path, size="huge")


@pytest.mark.slow
def test_full_size_stays_within_memory(tmp_path: Path) -> None:
    """The released names and shapes, 23.4 GB: made, copied, converted, deleted."""
    if shutil.disk_usage(tmp_path).free < 55e9:
        pytest.skip("needs 55 GB of disk")
    report = bench_convert(tmp_path / "work", rounds=1)
    assert report["bytes"] == 2 * 11_683_172_920
    assert report["peak_rss_bytes"] < 4 * 2**30
