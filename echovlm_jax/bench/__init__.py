"""The project's own benchmarks: ours and theirs, both in one run."""
