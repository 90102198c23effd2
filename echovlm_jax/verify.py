"""`storage.verify` under the name that other programs know it by."""

from echovlm_jax.storage.verify import verify

__all__ = ["verify"]
