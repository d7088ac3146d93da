"""Structured pruning (paper section 5): neurons, groups of heads and whole layers go, and an ordinary smaller model stays.

Whole layers go first. Then, from the first layer to the last, each loses the same number of head groups and of neurons, chosen on what the
layers before it, already pruned, hand on (`jaxsearch.compression.osscar`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxsearch.compression.calibration import Batch, Walk, Weights, check_model, choose_queries, make_batches
from jaxsearch.compression.osscar import METHODS, Kept, reduce_map, relative_error
from jaxsearch.data.datasets import Dataset
from jaxsearch.errors import InputError
from jaxsearch.models.contract import Contract, Golden, Model, save_model
from jaxsearch.models.decoder import Decoder, DecoderConfig, layer_table
from jaxsearch.models.scorer import Scorer
from jaxsearch.models.weights.huggingface import config_to_hf
from jaxsearch.retrieval.common import new_folder
from jaxsearch.scoring.records import RecordScorer

WHICH = ("last", "least")


@dataclass(frozen=True)
class Pruning:
    """What goes, and how it is chosen.

    Raises:
        InputError: a field is out of range, or nothing would go.
    """

    mlp: float = 0.0
    """Share of each layer's neurons, from 0 to below 1."""
    heads: float = 0.0
    """Share of each layer's key/value heads, each with its query heads; rounded to whole groups."""
    layers: int = 0
    """Whole layers."""
    which: str = "last"
    """Which layers: the "last", or those that change the residual stream "least" (cosine distance of output from input)."""
    method: str = "osscar"
    """Of neurons and heads, one of `osscar.METHODS`."""
    refit: bool = False
    """The baselines refit the kept weights, too."""
    damping: float = 1e-3
    """See `osscar.reduce_map`."""
    swaps: int = 10
    """See `osscar.reduce_map`."""
    seed: int = 0
    """Of the method "random"."""

    def __post_init__(self) -> None:
        for name in ("mlp", "heads"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give a share from 0 to below 1")
        for name in ("layers", "swaps", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}: give 0 or more")
        for name, known in (("which", WHICH), ("method", METHODS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}: use one of {', '.join(known)}")
        if not 0 < self.damping < np.inf:
            raise InputError(f"damping is {self.damping}: give a positive number, such as 0.001")
        if not (self.mlp or self.heads or self.layers):
            raise InputError(
                "mlp, heads and layers are all 0: give at least one of them (--mlp, --heads, --layers-drop)"
            )

    def apply(self, config: DecoderConfig) -> DecoderConfig:
        """The sizes of what stays.

        Raises:
            InputError: a share is less than one unit, nothing would stay, or no Hugging Face family can express the sizes.
        """
        if self.layers >= config.layers:
            raise InputError(
                f"layers (--layers-drop) is {self.layers}: the model has {config.layers}, and one must stay"
            )
        width = _left("mlp", self.mlp, config.mlp_width, "neurons")
        groups = _left("heads", self.heads, config.kv_heads, "key/value heads")
        smaller = replace(
            config,
            layers=config.layers - self.layers,
            mlp_width=width,
            kv_heads=groups,
            heads=groups * (config.heads // config.kv_heads),
        )
        try:
            config_to_hf(smaller)
        except InputError as error:
            raise InputError(f"heads is {self.heads}, and {error}; choose another share") from error
        return smaller


def _left(name: str, share: float, count: int, what: str) -> int:
    gone = int(share * count + 0.5)
    if share and not 1 <= gone < count:
        raise InputError(
            f"{name} is {share}, {gone} of {count} {what}: give a share between {0.5 / count:.3g} and {1 - 0.5 / count:.3g}"
        )
    return count - gone


class LayerReport(NamedTuple):
    """What one layer lost: relative squared errors of its two outputs on the calibration examples; 0 where nothing went."""

    layer: int
    """In the dense model."""
    heads_error: float
    mlp_error: float


def layer_changes(
    decoder: Decoder,
    batches: Sequence[Batch],
    mesh: Mesh | None = None,
    progress: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """fp64 [layers]: mean cosine distance of each layer's output from its input over all tokens."""
    walk, found = Walk(decoder, batches, mesh), []
    for layer in range(decoder.config.layers):
        found.append(walk.pass_layer(walk.weights(layer)))
        _tell(progress)
    return np.array(found)


def _tell(progress: Callable[[int], Any] | None) -> None:
    if progress is not None:
        progress(1)


def prune_decoder(
    decoder: Decoder,
    batches: Sequence[Batch],
    plan: Pruning,
    *,
    mesh: Mesh | None = None,
    progress: Callable[[int], Any] | None = None,
) -> tuple[Decoder, list[LayerReport]]:
    """The smaller decoder, and what each layer that stays lost.

    Args:
        decoder: the dense one; it is not changed.
        batches: calibration examples.
        plan: what goes.
        mesh: see `calibration.Walk`.
        progress: called with 1 after each layer, `steps(decoder.config, plan)` times.

    Raises:
        InputError: the plan does not fit the decoder, or an activation is NaN or infinite.
    """
    smaller = plan.apply(decoder.config)
    stay = np.arange(smaller.layers)
    if plan.layers and plan.which == "least":
        changes = layer_changes(decoder, batches, mesh, progress)
        stay = np.sort(np.argsort(changes, kind="stable")[plan.layers :])
    stacked = {name: np.empty(spec.shape, np.float32) for name, spec in layer_table(smaller).items()}
    narrower = bool(plan.heads or plan.mlp)
    walk, reports = Walk(decoder, batches if narrower else [], mesh), []
    for place, layer in enumerate(stay.tolist()):
        w, errors = walk.weights(layer), [0.0, 0.0]
        if plan.heads:
            w, errors[0] = cut_heads(w, walk.heads_gram(w), smaller.kv_heads, plan, layer)
        if narrower:
            walk.pass_heads(w)
        if plan.mlp:
            w, errors[1] = cut_neurons(w, walk.mlp_gram(w), smaller.mlp_width, plan, layer)
        # What the last layer hands on, nobody reads.
        if narrower and place + 1 < len(stay):
            walk.pass_mlp(w)
        for name, value in w.items():
            stacked[name][place] = value
        reports.append(LayerReport(layer, *errors))
        _tell(progress)
    return _assemble(decoder, smaller, stacked), reports


def steps(config: DecoderConfig, plan: Pruning) -> int:
    """How often `prune_decoder` tells its progress."""
    return config.layers - plan.layers + (config.layers if plan.layers and plan.which == "least" else 0)


def _reduce(
    gram: np.ndarray, weights: np.ndarray, keep: int, size: int, plan: Pruning, layer: int
) -> tuple[Kept, float]:
    kept = reduce_map(
        gram,
        weights,
        keep,
        size=size,
        method=plan.method,
        refit=plan.refit,
        damping=plan.damping,
        swaps=plan.swaps,
        seed=plan.seed + layer,
    )
    return kept, relative_error(gram, weights, kept, size)


def cut_neurons(
    w: Weights, gram: np.ndarray, keep: int, plan: Pruning, layer: int = 0
) -> tuple[Weights, float]:
    """A layer's weights with `keep` neurons, and the relative error of its MLP (gram [F, F] of the inputs of `down`)."""
    kept, error = _reduce(gram, w["down"], keep, 1, plan, layer)
    gate, up = w["gate"][:, kept.units], w["up"][:, kept.units]
    return {**w, "gate": gate, "up": up, "down": kept.weights.astype(np.float32)}, error


def cut_heads(
    w: Weights, gram: np.ndarray, keep: int, plan: Pruning, layer: int = 0
) -> tuple[Weights, float]:
    """A layer's weights with `keep` key/value heads and their query heads, and the relative error of its attention (gram [N H, N H])."""
    width, groups, h = w["k"].shape
    each = w["q"].shape[1] // groups
    kept, error = _reduce(gram, w["o"].reshape(-1, width), keep, each * h, plan, layer)
    q = w["q"].reshape(width, groups, each, h)[:, kept.units].reshape(width, keep * each, h)
    o = kept.weights.astype(np.float32).reshape(keep * each, h, width)
    return {**w, "q": q, "k": w["k"][:, kept.units], "v": w["v"][:, kept.units], "o": o}, error


def _assemble(decoder: Decoder, config: DecoderConfig, layers: dict[str, np.ndarray]) -> Decoder:
    """A decoder of these stacked layers with the embeddings and the final norm of another."""
    smaller = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(smaller, nnx.Param))
    for path, parameter in flat:
        name = str(path[-1])
        inner = "layers" in path
        parameter.set_value(jnp.asarray(layers.pop(name)) if inner else getattr(decoder, name)[...])
    nnx.update(smaller, nnx.from_flat_state(flat))
    return smaller


class Pruned(NamedTuple):
    """A pruned model that is not on disk yet."""

    module: Scorer
    contract: Contract
    layers: list[LayerReport]


def prune_model(
    model: Model,
    data: Dataset,
    plan: Pruning,
    *,
    queries: int,
    candidates: int = 16,
    mesh: Mesh | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Pruned:
    """A ranker or judge made smaller on its own training queries.

    Its contract is the parent's with the new sizes and new golden scores. Calibrators are left out: they were fitted to other scores.
    `training` is the parent's with `pruning` added: the parent's hash, the plan, the calibration data, and each layer's errors.

    Args:
        model: the dense one.
        data: whose training queries calibrate.
        plan: what goes.
        queries: how many calibrate.
        candidates: documents of each, at most.
        mesh: see `calibration.Walk`.
        progress: see `prune_decoder`.

    Raises:
        InputError: the model is neither ranker nor judge, or reads embeddings; the plan does not fit it, or the data has fewer queries.
    """
    check_model(model)
    plan.apply(model.contract.architecture)
    multiple = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    batches = make_batches(
        model, data, choose_queries(data, queries), candidates=candidates, multiple=multiple
    )
    assert isinstance(model.module, Scorer)  # `check_model` refuses anything else
    decoder, reports = prune_decoder(model.module.decoder, batches, plan, mesh=mesh, progress=progress)
    module = nnx.merge(*nnx.split(model.module))  # shares its arrays
    module.decoder = decoder
    told = {
        "parent": model.hash,
        "plan": dataclasses.asdict(plan),
        "calibration": {
            "dataset": data.name,
            "fingerprint": data.fingerprint,
            "queries": queries,
            "candidates": candidates,
        },
        "layers": [report._asdict() for report in reports],
    }
    contract = replace(
        model.contract,
        architecture=decoder.config,
        calibrators={},
        training={**model.contract.training, "pruning": told},
        golden=_golden(module, model),
    )
    return Pruned(module, contract, reports)


def _golden(module: Scorer, model: Model) -> tuple[Golden, ...]:
    """The parent's golden pairs with the module's own scores."""
    golden = model.contract.golden
    if not golden:
        return ()
    scorer = RecordScorer(
        module, model.tokenizer, model.contract.prompts["pair"], [g.document for g in golden]
    )
    found = scorer([g.query for g in golden], [np.array([i], np.int32) for i in range(len(golden))])
    return tuple(
        replace(g, scores=tuple(float(x) for x in scores[0])) for g, scores in zip(golden, found, strict=True)
    )


def save_pruned(output: Path, pruned: Pruned, model: Model) -> str:
    """Write the model folder, whole or not at all; returns the contract's hash."""
    with new_folder(output) as new:
        return save_model(new, pruned.module, pruned.contract, model.tokenizer)
