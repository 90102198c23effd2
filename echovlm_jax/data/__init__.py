"""Datasets, packing plans and batches: everything between files of exams and the train step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echovlm_jax.data.pipeline import global_arrays, make_batches

__all__ = ["global_arrays", "make_batches"]


def __getattr__(name: str) -> Any:
    """On first use: a worker process imports this package, and needs no more than its own part."""
    if name in __all__:
        from echovlm_jax.data import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
