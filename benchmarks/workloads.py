"""The workloads that scoring is measured on, and the arithmetic that each needs."""

from typing import NamedTuple

from jaxsearch.models.decoder import DecoderConfig


class Workload(NamedTuple):
    """One query and its candidates, all alike."""

    prefix: int
    tokens: int
    """Of an item, embeddings included."""
    items: int
    embeddings: int = 0
    """Of an item."""
    sample: int = 0
    """How many items are scored where a whole call takes too long on a CPU; 0: all."""
    sample_alone: int = 0
    """The same where every item brings its own prefix; 0: as `sample`."""

    def of_mode(self, shared: bool) -> "Workload":
        """The workload with the sample of a mode that shares the prefix, or does not."""
        return self if shared or not self.sample_alone else self._replace(sample=self.sample_alone)


WORKLOADS = {
    "full": Workload(60, 900, 50, sample=4),
    "summary": Workload(60, 150, 50, sample=24),
    "short": Workload(60, 20, 50),
    "long_prefix": Workload(2000, 20, 500, sample=100, sample_alone=4),
    "mixlm_50": Workload(60, 2, 50, embeddings=1),
    "mixlm_250": Workload(60, 2, 250, embeddings=1),
    "mixlm_1000": Workload(60, 2, 1000, embeddings=1),
}


def flops(c: DecoderConfig, w: Workload, items: int, prefixes: int) -> float:
    """Linear layers and causal attention of a call, no padding, that computes the prefix so many times."""
    linear = c.layers * (4 * c.width * (c.heads + c.kv_heads) * c.head_dim + 6 * c.width * c.mlp_width)
    pair = 4 * c.layers * c.heads * c.head_dim
    head = w.prefix * linear + pair * w.prefix * (w.prefix + 1) / 2
    item = w.tokens * linear + pair * (w.tokens * w.prefix + w.tokens * (w.tokens + 1) / 2)
    return prefixes * head + items * item
