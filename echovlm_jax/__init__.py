"""EchoVLM, the ultrasound vision-language model, in JAX and Flax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echovlm_jax.load import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """`load_model` on first use, so that `import echovlm_jax.config` does not wait for JAX."""
    if name == "load_model":
        from echovlm_jax.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
