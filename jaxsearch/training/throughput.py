"""What a step does and what the devices could do: tokens, FLOPs against the peak, memory."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxsearch.training.chips import CHIPS

KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
"""Chip by what JAX calls the device."""


def count_tokens(batch: Any) -> int:
    """Return how many tokens of a batch on the host are no padding.

    Counts every part that has `segments` (0 for padding), or `tokens` with a mask `where` of the same shape; other parts are searched.
    """
    found = batch._asdict() if hasattr(batch, "_asdict") else batch
    if not isinstance(found, Mapping):
        return 0
    parts: Mapping[str, Any] = found
    if parts.get("segments") is not None:
        return int(np.count_nonzero(parts["segments"]))
    tokens, where = parts.get("tokens"), parts.get("where")
    if tokens is not None and where is not None and np.shape(tokens) == np.shape(where):
        return int(np.count_nonzero(where))
    return sum(count_tokens(part) for part in parts.values())


def total_peak(peak_flops: float) -> float:
    """Return the FLOP/s that all devices together could do at most; 0 where nobody knows.

    Args:
        peak_flops: of one device; 0: what is published of its kind.
    """
    devices = jax.devices()
    kind = KINDS.get(devices[0].device_kind)
    return len(devices) * (peak_flops or (CHIPS[kind].flops if kind else 0.0))


def peak_memory() -> dict[str, float]:
    """Return `memory_gib`, the most that this process's first device has held; nothing where the backend does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"memory_gib": stats["peak_bytes_in_use"] / 2**30} if "peak_bytes_in_use" in stats else {}
