"""Batches as a pure function of (seed, step), prefetched by Grain."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from jaxsearch.config import ConfigError


class Source(Protocol):
    """Where examples come from; every training task is one."""

    @property
    def num_examples(self) -> int:
        """Number of examples."""

    def batch(self, indices: np.ndarray, rngs: Sequence[np.random.Generator]) -> dict[str, Any]:
        """Return the arrays of these examples."""


class Pipeline:
    """Shuffled batches of a source.

    Every epoch has an order of its own; examples that do not fill its last batch wait for another epoch,
    so that no batch holds an example twice. A batch depends on nothing but (seed, step): a run resumes at
    any step, and P processes together see exactly the batch that one process would.

    Args:
        source: the examples.
        batch_size: examples in a global batch.
        seed: decides order and randomness, 0 <= seed < 2**32.
        process: number of this process, and how many there are; each builds a contiguous share of the batch.
        prefetch: batches prepared ahead by a background thread; the queue holds no more.

    Raises:
        ConfigError: more examples in a batch than there are, or a batch that the processes do not divide.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        process: tuple[int, int] = (0, 1),
        prefetch: int = 2,
    ) -> None:
        index, count = process
        if batch_size > source.num_examples:
            raise ConfigError(
                f"batch_size {batch_size} exceeds the {source.num_examples} training examples: lower it"
            )
        if batch_size % count:
            raise ConfigError(f"batch_size {batch_size} is not a multiple of the {count} processes")
        self._source = source
        self._size = batch_size
        self._seed = seed
        self._prefetch = prefetch
        self._made = self._taken = 0
        self._share = slice(index * batch_size // count, (index + 1) * batch_size // count)
        self._per_epoch = source.num_examples // batch_size
        # Drawing an order costs more than a batch; the thread that prefetches stays within an epoch for long.
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    def indices(self, step: int) -> np.ndarray:
        """Return the example numbers of the global batch of a step, int [B]; steps count from 0."""
        epoch, place = divmod(step, self._per_epoch)
        return self._order(epoch)[place * self._size : (place + 1) * self._size]

    def _draw_order(self, epoch: int) -> np.ndarray:
        # Grain's own shuffle takes most of a millisecond for each example of a small data set, and
        # gives seed 0 in epoch 1 the order of seed 1 in epoch 0.
        return np.random.default_rng((self._seed, 0, epoch)).permutation(self._source.num_examples)

    def batch(self, step: int) -> dict[str, Any]:
        """Return this process's share of the batch of a step."""
        positions = range(step * self._size, (step + 1) * self._size)[self._share]
        rngs = [np.random.default_rng((self._seed, 1, position)) for position in positions]
        return self._source.batch(self.indices(step)[self._share], rngs)

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Yield the batches of steps start, ..., stop - 1, prepared ahead in a thread."""
        self._made = self._taken = 0

        def make(step: int) -> dict[str, Any]:
            batch = self.batch(int(step))
            self._made += 1
            return batch

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._prefetch)
        for batch in grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options):
            self._taken += 1
            yield batch

    @property
    def ahead(self) -> int:
        """Finished batches that wait in the queue: how many steps old a teacher's scores will be when the last of them is used."""
        return self._made - self._taken
