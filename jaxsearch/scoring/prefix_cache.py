"""Prefixes kept between calls: keys and values on the device, so that a query's next candidates cost only their own tokens."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxsearch.errors import InputError
from jaxsearch.models.decoder import DecoderConfig


@dataclass(frozen=True)
class PrefixCacheConfig:
    """What is kept of the prefixes of earlier calls.

    Raises:
        InputError: a number is out of range.
    """

    max_bytes: int = 0
    """Of device memory for keys and values; the prefixes used longest ago make room. 0: nothing is kept."""
    min_tokens: int = 256
    """Prefixes that are padded to fewer tokens are computed in every call, in one pass with their items, and not kept: that reads
    the weights once, and the first call of a prefix that is kept twice."""

    def __post_init__(self) -> None:
        for name, least in (("max_bytes", 0), ("min_tokens", 1)):
            if getattr(self, name) < least:
                raise InputError(f"PrefixCacheConfig.{name} is {getattr(self, name)}: give at least {least}")


class PrefixCache:
    """Keys and values by the exact tokens of a prefix and the length that it is padded to, the last used ones within a bound of bytes.

    Its owner sees to it that one thread at a time uses it.
    """

    def __init__(self, config: PrefixCacheConfig, decoder: DecoderConfig):
        self.config = config
        self.bytes_per_token = (
            2 * decoder.layers * decoder.kv_heads * decoder.head_dim * jnp.dtype(decoder.dtype).itemsize
        )
        self._kept: OrderedDict[tuple[int, tuple[int, ...]], Any] = OrderedDict()
        self._bytes = 0

    def keeps(self, length: int) -> bool:
        """Whether prefixes padded to this length are kept: they are long enough, and one of them fits."""
        fits = length * self.bytes_per_token <= self.config.max_bytes
        return fits and length >= self.config.min_tokens

    def get(self, tokens: Sequence[int], length: int) -> Any:
        """Keys and values of a prefix padded to `length`, or None; it is then the last to make room."""
        key = (length, tuple(tokens))
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, tokens: Sequence[int], length: int, state: Any) -> None:
        """Keep a prefix for which `keeps(length)` is true and `get` gave None."""
        self._bytes += length * self.bytes_per_token
        while self._bytes > self.config.max_bytes:
            (size, _), _ = self._kept.popitem(last=False)
            self._bytes -= size * self.bytes_per_token
        self._kept[(length, tuple(tokens))] = state

    def clear(self) -> None:
        """Forget all prefixes."""
        self._kept.clear()
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """What is held now."""
        return self._bytes

    def __len__(self) -> int:
        """How many prefixes are held."""
        return len(self._kept)
