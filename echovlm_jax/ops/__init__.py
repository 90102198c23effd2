"""Pure functions on arrays, without parameters.

One axis alphabet for every einsum and every shape:

  B batch · T query positions · S key positions · N heads · K key/value heads · G query heads per
  key/value head · H head dimension · D model width · E experts · F feed-forward width · P patches ·
  L layers · V vocabulary
"""

import jax
import numpy as np

Array = jax.Array | np.ndarray  # numpy's arrays are as good an input as JAX's
