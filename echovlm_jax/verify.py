"""The public name of `storage.verify.verify`, for other programs."""

from echovlm_jax.storage.verify import verify

__all__ = ["verify"]
