"""Bad steps: losses that are not finite or jump, found on the devices and, if wanted, undone there."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxsearch.config import FaultsConfig
from jaxsearch.numerics import wide

Tree = TypeVar("Tree")
Health = dict[str, Any]
"""loss: running mean of good losses, fp32; good: how many there were, int32; skipped: bad steps in a row, int32."""
MEMORY = 20
"""Steps that the running mean reaches back, about; before that many good ones no loss counts as a spike."""


def first_health() -> Health:
    """Return the health of a run that has not begun."""
    return {"loss": np.zeros((), wide()), "good": np.int32(0), "skipped": np.int32(0)}


def examine(
    config: FaultsConfig, health: Health, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, Health, jax.Array]:
    """Judge a step.

    Args:
        config: what counts as bad, and how many are let pass.
        health: before the step.
        loss: scalar.
        grad_norm: global norm of the gradient before clipping, scalar.

    Returns:
        Whether the step is good; the health after it; whether the run must stop.
    """
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if config.spike_factor:
        good &= (health["good"] < MEMORY) | (loss <= config.spike_factor * health["loss"])
    count = health["good"] + good
    share = 1 / jnp.clip(count, 1, MEMORY)
    mean = jnp.where(good, health["loss"] + share * (loss - health["loss"]), health["loss"])
    skipped = jnp.where(good, 0, health["skipped"] + 1)
    after = {"loss": jnp.asarray(mean, wide()), "good": jnp.int32(count), "skipped": jnp.int32(skipped)}
    limit = config.skip_limit if config.on_bad_step == "skip" else 0
    return good, after, skipped > limit


def choose(good: jax.Array, new: Tree, old: Tree) -> Tree:
    """Return the new pytree after a good step, else the old one."""

    def pick(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.select(good, x, y) if x.ndim == 0 else jnp.where(good, x, y)

    return jax.tree.map(pick, new, old)
