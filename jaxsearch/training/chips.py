"""Published peaks of TPU chips, and the slices that can be compiled for."""

from dataclasses import dataclass

from jaxsearch.config import ConfigError


@dataclass(frozen=True)
class Chip:
    """One chip; all numbers are per chip and second where they are rates."""

    flops: float
    """bf16 FLOP/s with fp32 accumulation."""
    hbm_bytes: int
    """Memory."""
    hbm_bandwidth: float
    """Bytes/s."""
    ici_bandwidth: float
    """Bytes/s that all links together receive (as many can be sent at the same time)."""
    slices: tuple[str, ...]
    """Shapes of a slice by name."""


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_GIB = 2**30

# Source: the "key chip specifications" tables of docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, read in November 2026. They
# give the interconnect in both directions together (v5e 400, v5p 1200, v6e 800 GB/s), or as 2400 Gbit/s in one (v4); a device receives
# in one.
CHIPS: dict[str, Chip] = {
    "v4": Chip(275e12, 32 * _GIB, 1228e9, 300e9, _CUBIC),
    "v5e": Chip(197e12, 16 * _GIB, 819e9, 200e9, _FLAT),
    "v5p": Chip(459e12, 95 * _GIB, 2765e9, 600e9, _CUBIC),
    "v6e": Chip(918e12, 32 * _GIB, 1640e9, 400e9, _FLAT),
}


def find_chip(topology: str) -> Chip:
    """Return the chip of a topology such as "v5e:4x4".

    Raises:
        ConfigError: not one of the known chips and slices; lists them.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or shape not in CHIPS[name].slices:
        known = "; ".join(
            ", ".join(f"{chip}:{shape}" for shape in CHIPS[chip].slices)
            for chip in ([name] if name in CHIPS else CHIPS)
        )
        raise ConfigError(f"topology is {topology!r}: known are {known}")
    return CHIPS[name]
