"""What the machine can do at most, measured in the process whose figures it stands beside."""

import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


def matmul_gflops(
    size: int = 1024,
    repeats: int = 8,
    *,
    inner: int | None = None,
    columns: int | None = None,
    dtype: str = "float32",
) -> float:
    """GFLOP/s of a matmul [size, inner] @ [inner, columns], square by default, of full precision.

    The best of several runs: other work can only slow it down.
    """
    inner, columns = inner or size, columns or size
    a = jax.random.normal(jax.random.key(0), (size, inner), dtype)
    b = jax.random.normal(jax.random.key(1), (inner, columns), dtype)
    multiply = jax.jit(lambda x, y: jnp.matmul(x, y, precision="highest"))
    jax.block_until_ready(multiply(a, b))
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(multiply(a, b))
        best = min(best, time.perf_counter() - started)
    return 2 * size * inner * columns / best / 1e9


def best_matmul_gflops(shapes: Iterable[tuple[int, int, int]], dtype: str = "float32") -> float:
    """The best rate of any of these shapes (rows, inner, columns)."""
    return max(
        matmul_gflops(rows, 4, inner=inner, columns=columns, dtype=dtype) for rows, inner, columns in shapes
    )


def vector_units() -> list[str]:
    """What decides how fast this CPU multiplies, of what Linux says: empty elsewhere."""
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [name for name in wanted if name in flags]


def describe() -> dict[str, Any]:
    """The machine and its matmul limit, for a line of results; of an accelerator also the limit of bf16 (8192 x 8192 x 8192)."""
    limits = (
        {}
        if jax.default_backend() == "cpu"
        else {"matmul_bf16_gflops": round(matmul_gflops(8192, dtype="bfloat16"), 1)}
    )
    return {
        **limits,
        "cores": len(os.sched_getaffinity(0)),
        "cpu": platform.machine(),
        "vector_units": vector_units(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_gflops": round(matmul_gflops(), 1),
    }
