"""AdamW, or Muon for the layers' matrices, with warm-up, cosine decay and clipping."""

from typing import Any

import optax
import optax.contrib
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from jaxsearch.config import TrainConfig


def learning_rate(config: TrainConfig, peak: float | None = None) -> optax.Schedule:
    """Return the schedule: linear warm-up to the peak, then a cosine down to a share of it.

    Args:
        config: the training configuration.
        peak: another peak than `optimizer.learning_rate`.
    """
    optimizer = config.optimizer
    peak = optimizer.learning_rate if peak is None else peak
    return optax.warmup_cosine_decay_schedule(
        # The first step already learns.
        init_value=peak / max(1, optimizer.warmup_steps),
        peak_value=peak,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=config.decay_steps,
        end_value=peak * optimizer.final_fraction,
    )


def decays(variable: nnx.Variable, decay_embeddings: bool) -> bool:
    """Return whether weight decay reaches a parameter: a matrix, but no norm, bias or (by default) embedding.

    The stacked `layer` axis does not count: scales of norms stay vectors when layers are stacked.
    """
    axes = variable.get_metadata().get("axes")
    if axes is None:
        return variable.get_value().ndim >= 2
    if "vocab" in axes and not decay_embeddings:
        return False
    return sum(axis != "layer" for axis in axes) >= 2


def decay_mask(params: nnx.State, decay_embeddings: bool) -> Any:
    """Return nested dicts of booleans beside the parameters: where weight decay applies."""
    return nnx.traversals.unflatten_mapping(
        {path: decays(variable, decay_embeddings) for path, variable in nnx.to_flat_state(params)}
    )


def muon_dimensions(params: nnx.State) -> Any:
    """Return nested dicts: which axes of a layer's matrix are its inputs and outputs; None where AdamW is used.

    A matrix maps from or to the model width ("embed"), whatever its other axes; the stacked layers are a batch of matrices.
    """

    def dimensions(variable: nnx.Variable) -> MuonDimensionNumbers | None:
        axes = variable.get_metadata().get("axes", ())
        matrix = [i for i, axis in enumerate(axes) if axis != "layer"]
        if "layer" not in axes or "embed" not in axes or len(matrix) < 2:
            return None
        width = (axes.index("embed"),)
        others = tuple(i for i in matrix if i not in width)
        return (
            MuonDimensionNumbers(others, width)
            if axes[-1] == "embed"
            else MuonDimensionNumbers(width, others)
        )

    return nnx.traversals.unflatten_mapping(
        {path: dimensions(variable) for path, variable in nnx.to_flat_state(params)}
    )


def make_optimizer(config: TrainConfig, params: nnx.State) -> optax.GradientTransformation:
    """Return the optimiser.

    Args:
        config: the training configuration.
        params: the trainable parameters with their metadata.
    """
    optimizer = config.optimizer
    mask = decay_mask(params, optimizer.decay_embeddings)
    clip = optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity()
    if optimizer.kind == "muon":
        update = optax.contrib.muon(
            learning_rate(config, optimizer.muon_learning_rate),
            adam_learning_rate=learning_rate(config),
            adam_b1=optimizer.b1,
            adam_b2=optimizer.b2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            weight_decay_mask=mask,
            adam_weight_decay=optimizer.weight_decay,
            muon_weight_dimension_numbers=muon_dimensions(params),
        )
    else:
        update = optax.adamw(
            learning_rate(config),
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            mask=mask,
        )
    return optax.chain(clip, update)
