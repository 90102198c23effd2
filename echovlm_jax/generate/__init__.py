"""Token ids, and whole files of answers, out of prompts and images."""

from echovlm_jax.generate.batch_file import generate_file
from echovlm_jax.generate.decode import Generated, check_room, generate
from echovlm_jax.ops.sampling import SamplingOptions

__all__ = ["Generated", "SamplingOptions", "check_room", "generate", "generate_file"]
