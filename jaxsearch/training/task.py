"""What a task is: which parameters train, what a batch is, its loss, its evaluation, its export."""

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxsearch.config import TrainConfig
from jaxsearch.training.step import Batch, Losses, Tools, TrainState, gradient_step


class Task(abc.ABC):
    """One training stage. Build it with `config.task.build(config)`; `training.loop.run` does the rest."""

    accumulable: bool = True
    """False where the loss compares examples of a batch with each other (in-batch negatives)."""

    prefetch: int = 2
    """Batches prepared ahead, at most."""

    @abc.abstractmethod
    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        """Return the module with all parameters, trained and frozen; depends on `rngs` and files alone.

        Frozen parameters are not written to checkpoints: on resume they come from here again.
        """

    def trainable(self) -> Any:
        """Return the NNX filter of the parameters that train."""
        return nnx.Param

    @property
    @abc.abstractmethod
    def num_examples(self) -> int:
        """Number of training examples."""

    @property
    def data_version(self) -> str:
        """What tells one version of the data from another; processes compare it before the first step."""
        return ""

    @abc.abstractmethod
    def batch(self, indices: np.ndarray, rngs: Sequence[np.random.Generator]) -> Batch:
        """Return the arrays of a batch; a pure function of its arguments, called in a background thread.

        The leading axis of every array is the batch (or a multiple of it), and the other axes do not
        depend on which examples are in it, because each process builds only its own share of the global
        batch.

        Args:
            indices: example numbers below `num_examples`, int [B].
            rngs: one generator for each example, so that an example's randomness does not depend on its
                neighbours.
        """

    def batch_shape(self, size: int) -> Batch:
        """Return `jax.ShapeDtypeStruct`s of a batch of `size` examples whose texts are as long as the configuration allows.

        Needs neither data nor weights; `batch` gives the same arrays, none of them larger.
        """
        raise NotImplementedError(f"{type(self).__name__} has no batch_shape()")

    @abc.abstractmethod
    def loss(self, model: Any, batch: Batch, key: jax.Array) -> Losses:
        """Return masked sums and weights; traced by JAX.

        Args:
            model: the module that `init` returned, with the current parameters.
            batch: arrays of `batch`, over all processes.
            key: random key of this step (and microbatch).
        """

    def step(
        self, state: TrainState, batch: Batch, key: jax.Array, tools: Tools
    ) -> tuple[TrainState, Losses]:
        """Return the state after one update; replace it for anything but a plain gradient of `loss`.

        `tools.model(state.params, state.rest)` gives the module, `tools.apply(state, grads)` updates it.
        """
        return gradient_step(self.loss, state, batch, key, tools)

    @abc.abstractmethod
    def evaluate(self, model: Any) -> dict[str, float]:
        """Return figures on held-out data; runs on the host and may be slow. Must not keep the model."""

    @abc.abstractmethod
    def export(self, model: Any, folder: Path, config: TrainConfig) -> None:
        """Write what is needed to use the model into a new, empty folder."""

    def example_ids(self, indices: np.ndarray) -> list[str]:
        """Return names of examples for error messages."""
        return [str(index) for index in indices]
