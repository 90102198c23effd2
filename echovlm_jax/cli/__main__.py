"""`python -m echovlm_jax.cli`: the `echovlm` command where the package is not installed."""

import sys

from echovlm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
