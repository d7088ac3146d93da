"""One optimiser step: the state it carries, masked losses as (sum, weight), and exact accumulation."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxsearch.numerics import wide

Mean = tuple[jax.Array, jax.Array]
"""A mean that can still be merged: (sum of values, sum of weights), both scalars."""

Batch = dict[str, Any]
"""Arrays (or pytrees of arrays) whose leading axis is the batch."""


class Losses(NamedTuple):
    """What a task's loss returns; every part is a (sum, weight) pair.

    Attributes:
        total: the objective, sum / weight. A mapping of several pairs is the sum of their means, each over
            its own
            weight; each is logged under its name. Weights must not depend on the parameters.
        metrics: further means to log.
    """

    total: Mean | Mapping[str, Mean]
    metrics: Mapping[str, Mean] = {}

    def terms(self) -> dict[str, Mean]:
        """Return the objective's parts by name."""
        return dict(self.total) if isinstance(self.total, Mapping) else {"loss": self.total}

    def value(self) -> jax.Array:
        """Return the objective, a scalar."""
        return _objective(self.terms(), self.weights())

    def weights(self) -> dict[str, jax.Array]:
        """Return the weight of each part of the objective."""
        return {
            name: jax.lax.stop_gradient(jnp.asarray(weight, wide()))
            for name, (_, weight) in self.terms().items()
        }


def _objective(terms: Mapping[str, Mean], weights: Mapping[str, jax.Array]) -> jax.Array:
    value = jnp.zeros((), wide())
    for name, (total, _) in terms.items():
        weight = weights[name]
        # Nothing to learn from (all masked) is a loss of zero, not a NaN.
        value += jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)
    return value


def split_model(model: nnx.Module, trainable: Any) -> tuple[Any, nnx.State, nnx.State, nnx.State]:
    """Return the structure of a module, its trainable parameters, its frozen ones, and its other variables.

    Args:
        model: any module.
        trainable: NNX filter of the parameters that train.
    """
    graphdef, params, *others = nnx.split(model, trainable, nnx.Param, ...)
    frozen, rest = others
    return graphdef, params, frozen, rest


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step changes; this is what a checkpoint holds."""

    step: jax.Array
    """Completed steps, int32."""
    params: Any
    """Trainable parameters as nested dicts."""
    opt_state: Any
    """State of the optax transformation."""
    rest: Any
    """Variables of the model that are not parameters (counters of random streams)."""
    grad_norm: jax.Array
    """Global norm of the last gradient before clipping."""
    window: dict[str, Mean]
    """Sums since the last row of metrics."""
    bad_step: jax.Array
    """Step that the run must stop at (its loss or gradient is not finite, or a spike); 0 while there is none."""
    health: Any
    """Running mean of the losses and bad steps in a row (`health.Health`)."""


@dataclass(frozen=True)
class Tools:
    """What a step needs besides state and batch."""

    graphdef: Any
    trainable: Any
    frozen: Any
    optimizer: optax.GradientTransformation
    accumulation: int = 1

    def model(self, params: Any, rest: Any) -> nnx.Module:
        """Return the module with these parameters; the frozen ones are added."""
        return nnx.merge(self.graphdef, nnx.State(params), nnx.State(self.frozen), nnx.State(rest))

    def rest(self, model: nnx.Module) -> Any:
        """Return the variables of the module that are not parameters, as they are after a forward pass."""
        return nnx.to_pure_dict(split_model(model, self.trainable)[3])

    def apply(self, state: TrainState, grads: Any, rest: Any = None) -> TrainState:
        """Return the state after an update with these gradients."""
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        return dataclasses.replace(
            state,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            rest=state.rest if rest is None else rest,
            grad_norm=optax.tree.norm(grads),
        )


LossFunction = Callable[[nnx.Module, Batch, jax.Array], Losses]


def microbatches(batch: Batch, count: int) -> Batch:
    """Split leading axes [B, ...] into [count, B / count, ...].

    Every count-th example goes into one microbatch, so that a batch sharded over devices stays where it is.
    """

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def gradient_step(
    loss: LossFunction, state: TrainState, batch: Batch, key: jax.Array, tools: Tools
) -> tuple[TrainState, Losses]:
    """Take the gradient of a loss and update.

    With accumulation the result is that of the whole batch: the weights of all microbatches are added up
    first, and each microbatch contributes its gradient of sum / (total weight). That first pass computes
    weights alone; the compiler drops the rest of the forward pass.

    Args:
        loss: function of (model, batch, key).
        state: state before the step.
        batch: arrays [B, ...].
        key: random key of this step.
        tools: model structure, optimiser and accumulation.
    """

    def objective(
        params: Any, rest: Any, micro: Batch, micro_key: jax.Array, weights: dict[str, jax.Array] | None
    ) -> tuple[jax.Array, tuple[Losses, Any]]:
        model = tools.model(params, rest)
        losses = loss(model, micro, micro_key)
        value = _objective(losses.terms(), losses.weights() if weights is None else weights)
        return value, (losses, tools.rest(model))

    gradient = jax.grad(objective, has_aux=True)
    if tools.accumulation == 1:
        grads, (losses, rest) = gradient(state.params, state.rest, batch, key, None)
        return tools.apply(state, grads, rest), losses

    micro = microbatches(batch, tools.accumulation)
    keys = jax.random.split(key, tools.accumulation)

    def weigh(_: None, item: tuple[Batch, jax.Array]) -> tuple[None, dict[str, jax.Array]]:
        return None, loss(tools.model(state.params, state.rest), *item).weights()

    weights = jax.tree.map(lambda w: w.sum(0), jax.lax.scan(weigh, None, (micro, keys))[1])

    def accumulate(carry: tuple[Any, Any], item: tuple[Batch, jax.Array]) -> tuple[tuple[Any, Any], Losses]:
        grads, rest = carry
        new, (losses, rest) = gradient(state.params, rest, *item, weights)
        return (jax.tree.map(jnp.add, grads, new), rest), losses

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (grads, rest), parts = jax.lax.scan(accumulate, (zeros, state.rest), (micro, keys))
    losses = jax.tree.map(lambda x: x.sum(0), parts)
    return tools.apply(state, grads, rest), losses
