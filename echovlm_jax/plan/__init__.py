"""What a configuration needs on a machine that isn't here: compiled for it, read, and reported."""

from echovlm_jax.plan.goodput import Failures
from echovlm_jax.plan.plan import plan
from echovlm_jax.plan.programs import Serving

__all__ = ["Failures", "Serving", "plan"]
