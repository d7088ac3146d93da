"""What the machine can do at most, measured in the process whose figures it stands beside."""

import os
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp


def matmul_gflops(size: int = 1024, repeats: int = 8) -> float:
    """GFLOP/s of an fp32 matmul [size, size] @ [size, size], the best of several runs: other work can only slow it down."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    multiply = jax.jit(lambda x, y: jnp.matmul(x, y, precision="highest"))
    jax.block_until_ready(multiply(a, a))
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(multiply(a, a))
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def describe() -> dict[str, Any]:
    """The machine and its matmul limit, for a line of results."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": platform.machine(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_gflops": round(matmul_gflops(), 1),
    }
