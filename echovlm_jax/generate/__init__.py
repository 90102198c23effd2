"""Token ids, and whole files of answers, out of prompts and images."""

from echovlm_jax.generate.batch_file import generate_file
from echovlm_jax.generate.offline import Generated, generate
from echovlm_jax.ops.sampling import SamplingOptions

__all__ = ["Generated", "SamplingOptions", "generate", "generate_file"]
