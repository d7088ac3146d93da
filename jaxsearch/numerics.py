"""The dtype of sums, norms, softmax and losses."""

import jax
import numpy as np


def wide() -> np.dtype:
    """fp32; float64 where JAX runs with `jax_enable_x64`, so that two ways to compute the same can be told from rounding."""
    return jax.dtypes.canonicalize_dtype(np.float64)
