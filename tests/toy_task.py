"""A small training task: regression with masked examples, a frozen teacher and a random stream."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsearch.config import ConfigError, TaskConfig, TrainConfig
from jaxsearch.training.step import Batch, Losses
from jaxsearch.training.task import Task


@dataclass(frozen=True)
class ToyData:
    """Data of the toy task."""

    examples: int = 24
    """How many examples there are."""


@dataclass(frozen=True)
class ToyConfig(TaskConfig):
    """A toy task."""

    data: ToyData = dataclasses.field(default_factory=ToyData)
    """Where the data come from."""
    noise_scale: float = 0.0
    """Size of the noise that the step adds to its input."""
    names: tuple[str, ...] = ("a",)
    """Some names."""
    flag: bool = False
    """A switch."""
    two_terms: bool = False
    """Whether the loss has two parts with weights of their own."""
    poison: int = -1
    """Example whose target is not a number."""

    def __post_init__(self) -> None:
        if self.noise_scale < 0:
            raise ConfigError(f"task.noise_scale is {self.noise_scale}: expected zero or more")

    def build(self, config: TrainConfig) -> "ToyTask":
        return ToyTask(self)


class ToyModel(nnx.Module):
    """student(x) is learnt; teacher(x) stays."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        key = rngs.params
        self.inner = nnx.Param(jax.random.normal(key(), (4, 8)) / 2, axes=("embed", "mlp"))
        self.layers = nnx.List(
            [nnx.Param(jax.random.normal(key(), (8,)) / 3, axes=("mlp",)) for _ in range(2)]
        )
        self.teacher = nnx.Param(jax.random.normal(key(), (4,)))
        self.noise = rngs.fork()


class ToyTask(Task):
    """Fits `student` to the frozen teacher's prediction plus a wave."""

    def __init__(self, config: ToyConfig) -> None:
        self.config = config
        self.built: list[list[int]] = []

    def init(self, rngs: nnx.Rngs) -> ToyModel:
        return ToyModel(rngs)

    def trainable(self) -> Any:
        return nnx.All(nnx.Param, nnx.Not(nnx.PathContains("teacher")))

    @property
    def num_examples(self) -> int:
        return self.config.data.examples

    def batch(self, indices: np.ndarray, rngs: Sequence[np.random.Generator]) -> Batch:
        self.built.append(indices.tolist())
        jitter = np.array([rng.normal() for rng in rngs], np.float32)
        angle = indices[:, None] + np.arange(4)[None]
        target = np.where(indices == self.config.poison, np.nan, np.sin(indices + 1))
        return {
            "x": np.sin(angle).astype(np.float32) + 0.1 * jitter[:, None],
            "target": target.astype(np.float32),
            "where": indices % 3 != 0,
            "index": indices.astype(np.int32),
        }

    def loss(self, model: ToyModel, batch: Batch, key: jax.Array) -> Losses:
        noise = jax.random.normal(model.noise.noise(), batch["x"].shape[1:])
        x = batch["x"] + self.config.noise_scale * noise[None]
        hidden = jnp.tanh(jnp.einsum("bd,df->bf", x, model.inner[...]))
        out = jnp.einsum("bf,f->b", hidden, model.layers[0][...] + model.layers[1][...])
        teacher = jnp.einsum("bd,d->b", x, model.teacher[...])
        where = batch["where"].astype(jnp.float32)
        error = jnp.where(batch["where"], (out - teacher - batch["target"]) ** 2, 0)
        fit = (error.sum(), where.sum())
        metrics = {"mae": (jnp.sqrt(error).sum(), where.sum())}
        if not self.config.two_terms:
            return Losses(fit, metrics)
        odd = (batch["index"] % 2 == 1).astype(jnp.float32)
        return Losses({"fit": fit, "odd": ((odd * out**2).sum(), odd.sum())}, metrics)

    def evaluate(self, model: ToyModel) -> dict[str, float]:
        return {"norm": float(jnp.linalg.norm(model.inner[...]))}

    def export(self, model: ToyModel, folder: Path, config: TrainConfig) -> None:
        np.savez(folder / "weights.npz", inner=np.asarray(model.inner[...]))

    def example_ids(self, indices: np.ndarray) -> list[str]:
        return [f"toy-{index}" for index in indices]


def toy_config(**changes: Any) -> TrainConfig:
    """Return a configuration of the toy task with some fields changed."""
    values: dict[str, Any] = {
        "name": "toy",
        "task": ToyConfig(),
        "steps": 10,
        "batch_size": 8,
        "log_every": 5,
    }
    return TrainConfig(**(values | changes))
