"""The neural bar beside LightGBM: DCN-v2 on the same features, one model for relevance and every action.

Wang et al., "DCN V2: Improved Deep & Cross Network" (arXiv 2008.13535): cross layers multiply features explicitly, a deep tower stands
beside them, and linear heads read both. `train_dcn` fits a `DcnModel` to true grades and impressions; it carries its spec and refuses
features of other names, like `TraditionalModel`.
"""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxsearch.data.records import GRADES
from jaxsearch.errors import InputError
from jaxsearch.losses import action_loss, softmax_listwise
from jaxsearch.models.contract import load_weights
from jaxsearch.retrieval.bm25 import Bm25Params
from jaxsearch.retrieval.common import new_folder
from jaxsearch.retrieval.traditional import FeatureMatrix, FeatureSpec, _check_names, _labels, _tuples

_FORMAT = 1
_SETTINGS, _WEIGHTS = "dcn.json", "model.safetensors"
_ROWS = 4096
"""Items of one call; a smaller rest is padded to a power of two, so that few shapes are compiled."""
_LEAST_ROWS = 64
_SKEW = 2.0
"""From this skewness on a feature that is never negative goes through log1p."""
_LIMIT = 10.0
"""Standardised features end here: an outlier to the power of the cross layers is a catastrophe."""


@dataclass(frozen=True)
class DcnConfig:
    """Sizes and training. The same seed and data give the same model.

    Raises:
      InputError: a field is out of range.
    """

    cross_layers: int = 3
    """0 with an empty `deep` is a linear model."""
    rank: int = 0
    """Of the cross layers' matrices; 0: full."""
    deep: tuple[int, ...] = (128, 64)
    """Widths of the deep tower; empty: none."""
    epochs: int = 60
    early_stopping: int = 8
    """Epochs without a lower validation loss after which training stops."""
    batch_queries: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    action_weight: float = 1.0
    """Of the actions' loss, summed over actions; relevance has 1."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("cross_layers", 0),
            ("rank", 0),
            ("epochs", 1),
            ("early_stopping", 1),
            ("batch_queries", 1),
            ("weight_decay", 0),
            ("action_weight", 0),
            ("seed", 0),
        ):
            if not getattr(self, name) >= least:
                raise InputError(f"DcnConfig.{name} is {getattr(self, name)}: use at least {least}")
        if not self.learning_rate > 0:
            raise InputError(f"DcnConfig.learning_rate is {self.learning_rate}: use a number above 0")
        if any(width < 1 for width in self.deep):
            raise InputError(f"DcnConfig.deep is {self.deep}: use widths of at least 1")


class CrossLayer(nnx.Module):
    r"""One explicit feature cross (arXiv 2008.13535, equations 1 and 2).

    .. math::
        x_{l+1} = x_0 \odot (W_l x_l + b_l) + x_l, \quad W_l = U_l V_l^T \text{ if a rank is given}
    """

    def __init__(self, width: int, rank: int, *, rngs: nnx.Rngs):
        self.down = nnx.Linear(width, rank, use_bias=False, rngs=rngs) if rank else None
        self.up = nnx.Linear(rank or width, width, rngs=rngs)

    def __call__(self, first: Array, x: Array) -> Array:
        """x_{l+1} [N, D] of x_0 `first` [N, D] and x_l `x` [N, D]."""
        return first * self.up(x if self.down is None else self.down(x)) + x


class Dcn(nnx.Module):
    """Cross and deep tower in parallel, and their heads.

    Args:
      width: D, of the input.
      actions: A, how many action heads stand beside that of relevance.
      config: the other sizes.
      rngs: of the initial parameters.
    """

    def __init__(self, width: int, actions: int, config: DcnConfig, *, rngs: nnx.Rngs):
        self.cross = nnx.List([CrossLayer(width, config.rank, rngs=rngs) for _ in range(config.cross_layers)])
        sizes = (width, *config.deep)
        self.deep = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(sizes)])
        self.heads = nnx.Linear(width + sum(config.deep[-1:]), 1 + actions, rngs=rngs)

    def __call__(self, first: Array) -> Array:
        """fp32 [N, 1 + A], relevance and the log-odds of each action (input fp32 [N, D])."""
        crossed = deep = first
        for cross in self.cross:
            crossed = cross(first, crossed)
        for layer in self.deep:
            deep = jax.nn.relu(layer(deep))
        return self.heads(jnp.concatenate([crossed, deep] if self.deep else [crossed], axis=-1))


@dataclass(frozen=True)
class Scaling:
    """From features to network inputs, by statistics of the training features."""

    mean: np.ndarray
    """fp32 [F], after the logarithm."""
    deviation: np.ndarray
    """fp32 [F], above 0."""
    log: np.ndarray
    """bool [F]: through log1p first."""
    indicators: np.ndarray
    """int32 [I], the features that were missing on some training pairs and not on others; each has an input that says so."""

    @classmethod
    def fit(cls, values: np.ndarray) -> "Scaling":
        """Statistics of features [N, F], NaN where missing."""
        known = ~np.isnan(values)
        count = np.maximum(known.sum(axis=0), 1)

        def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            x = np.where(known, x, 0).astype(np.float64)
            mean = x.sum(axis=0) / count
            centred = np.where(known, x - mean, 0)
            deviation = np.sqrt((centred**2).sum(axis=0) / count)
            deviation = np.where(deviation > 1e-6 * np.maximum(abs(mean), 1e-6), deviation, 1)  # constant
            return mean, deviation, (centred**3).sum(axis=0) / count / deviation**3

        positive = np.where(known, values, 0).min(axis=0) >= 0
        log = positive & (moments(values)[2] > _SKEW)
        mean, deviation, _ = moments(np.where(log, np.log1p(np.maximum(values, 0)), values))
        some = known.any(axis=0) & ~known.all(axis=0)
        return cls(
            mean.astype(np.float32),
            deviation.astype(np.float32),
            log,
            np.flatnonzero(some).astype(np.int32),
        )

    @property
    def width(self) -> int:
        """D, how many inputs the network has."""
        return len(self.mean) + len(self.indicators)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Network inputs fp32 [N, D] of features [N, F]: standardised, 0 where missing, then the indicators."""
        missing = np.isnan(values)
        values = values.astype(np.float32)  # a copy
        values[:, self.log] = np.log1p(np.maximum(values[:, self.log], 0))
        inputs = np.clip((values - self.mean) / self.deviation, -_LIMIT, _LIMIT)
        inputs[missing] = 0
        return np.concatenate([inputs, missing[:, self.indicators].astype(np.float32)], axis=-1)


@dataclass(frozen=True)
class DcnModel:
    """A trained network with the spec of the features it was trained on."""

    spec: FeatureSpec
    action_names: tuple[str, ...]
    config: DcnConfig
    scaling: Scaling
    network: Dcn

    def score(self, features: FeatureMatrix) -> np.ndarray:
        """What to rank by: fp32 [B, L], -inf where no candidate stands.

        Raises:
          ValueError: the features have other names than the model's, or are infinite.
        """
        return self(features)[..., 0]

    def actions(self, features: FeatureMatrix) -> np.ndarray:
        """Log-odds of each action: fp32 [B, L, A], -inf where no candidate stands. Errors as `score`."""
        return self(features)[..., 1:]

    def __call__(self, features: FeatureMatrix) -> np.ndarray:
        """Relevance, then each action: fp32 [B, L, 1 + A], -inf where no candidate stands. Errors as `score`."""
        _check_names(features.names, self.spec.names)
        _check_finite(features)
        found = np.full((*features.where.shape, 1 + len(self.action_names)), -np.inf, np.float32)
        inputs = self.scaling(features.values[features.where])
        graphdef, state = nnx.split(self.network)
        parts = []
        for start in range(0, len(inputs), _ROWS):
            chunk = inputs[start : start + _ROWS]
            size = max(_LEAST_ROWS, 1 << (len(chunk) - 1).bit_length())
            padded = np.pad(chunk, ((0, size - len(chunk)), (0, 0)))
            parts.append(
                (_forward(graphdef, state, padded), len(chunk))
            )  # all are under way before one is read
        if parts:
            found[features.where] = np.concatenate([np.asarray(out)[:count] for out, count in parts])
        return found

    @property
    def parameters(self) -> int:
        """Numbers that were learned."""
        return sum(value.size for value in _tensors(self.network).values())

    @property
    def flops(self) -> int:
        """FLOPs of one item: two for each number of a matrix, three for each input of a cross layer; without the features."""
        matrices = sum(value.size for value in _tensors(self.network).values() if value.ndim == 2)
        return 2 * matrices + 3 * self.scaling.width * self.config.cross_layers

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write model.safetensors and dcn.json to `folder`, whole or not at all."""
        settings = {
            "format": _FORMAT,
            "features": self.spec.names,
            "actions": self.action_names,
            "spec": dataclasses.asdict(self.spec),
            "config": dataclasses.asdict(self.config),
        }
        tensors = {f"network.{name}": value for name, value in _tensors(self.network).items()}
        tensors |= {f"scaling.{name}": value for name, value in vars(self.scaling).items()}
        with new_folder(folder) as new:
            save_file(tensors, new / _WEIGHTS)
            (new / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "DcnModel":
        """The model that `save` wrote.

        Raises:
          FileNotFoundError: there is no model in `folder`.
          ValueError: its format or feature names differ from what this version derives from its spec, a file is
            damaged, or the two files do not fit each other.
        """
        path = Path(folder) / _SETTINGS
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("format") != _FORMAT:
            raise InputError(f"{path}: format {settings.get('format')!r}; this version reads {_FORMAT}")
        try:
            values = {name: _tuples(value) for name, value in settings["spec"].items() if name != "bm25"}
            spec = FeatureSpec(**values, bm25=Bm25Params(**settings["spec"]["bm25"]))
            config = DcnConfig(**{name: _tuples(value) for name, value in settings["config"].items()})
            features, actions = tuple(settings["features"]), tuple(settings["actions"])
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} cannot be used ({error!r}): save the model anew") from error
        _check_names(features, spec.names)
        scaling, network = _load_tensors(Path(folder) / _WEIGHTS, len(features), len(actions), config)
        return cls(spec, actions, config, scaling, network)


def train_dcn(
    spec: FeatureSpec,
    ranked_train: tuple[FeatureMatrix, np.ndarray],
    ranked_valid: tuple[FeatureMatrix, np.ndarray],
    actions_train: tuple[FeatureMatrix, np.ndarray] | None = None,
    actions_valid: tuple[FeatureMatrix, np.ndarray] | None = None,
    config: DcnConfig = DcnConfig(),
    *,
    action_names: tuple[str, ...] = (),
) -> DcnModel:
    """Relevance by the listwise softmax loss on gains 2^grade - 1, actions by cross entropy, together; stopped early by the same loss.

    Args:
      spec: of the features.
      ranked_train: features [B, L, F] and grades [B, L], whole numbers 0 to 4 (ignored where no candidate stands).
      ranked_valid: the same for other queries.
      actions_train: features of the shown documents [P, L, F] and actions [P, L, A], 1 done, 0 not done, NaN not eligible; None
        where there are no impressions.
      actions_valid: the same for other queries.
      config: sizes and training.
      action_names: of the A actions, in order.

    Raises:
      ValueError: feature names differ from the spec's, a feature is infinite, a label is none, or impressions and
        action names do not fit each other.
    """
    if (actions_train is None) != (actions_valid is None) or (actions_train is None) == bool(action_names):
        raise InputError(
            f"action_names is {action_names}: give them with actions_train and actions_valid, or none of the three"
        )
    for name, (features, grades) in (("ranked_train", ranked_train), ("ranked_valid", ranked_valid)):
        _labels(features, grades, spec, name, GRADES)  # for its checks
        _check_finite(features)
    shown = [ranked_train[0].values[ranked_train[0].where]]
    if actions_train is not None and actions_valid is not None:
        for name, (features, done) in (("actions_train", actions_train), ("actions_valid", actions_valid)):
            _check_actions(name, features, done, spec, action_names)
        shown.append(actions_train[0].values[actions_train[0].where])
    scaling = Scaling.fit(np.concatenate(shown))
    network = Dcn(scaling.width, len(action_names), config, rngs=nnx.Rngs(config.seed))
    graphdef, state = nnx.split(network)
    train = _examples(scaling, ranked_train), actions_train and _examples(scaling, actions_train)
    valid = _examples(scaling, ranked_valid), actions_valid and _examples(scaling, actions_valid)
    best = _fit(graphdef, state, train, valid, config)
    return DcnModel(spec, action_names, config, scaling, nnx.merge(graphdef, best))


class _Examples(NamedTuple):
    """Lists with their labels."""

    inputs: Array
    """fp32 [B, L, D], 0 where no candidate stands."""
    where: Array
    """bool [B, L]."""
    labels: Array
    """Grades fp32 [B, L] or actions fp32 [B, L, A]; 0 (actions: NaN) where no candidate stands."""


_Data = tuple[_Examples, _Examples | None]
"""Ranked lists and, where there are some, impressions."""


def _examples(scaling: Scaling, labelled: tuple[FeatureMatrix, np.ndarray]) -> _Examples:
    features, labels = labelled
    inputs = np.zeros((*features.where.shape, scaling.width), np.float32)
    inputs[features.where] = scaling(features.values[features.where])
    kept = np.full(labels.shape, 0 if labels.ndim == 2 else np.nan, np.float32)
    kept[features.where] = labels[features.where]
    return _Examples(jnp.asarray(inputs), jnp.asarray(features.where), jnp.asarray(kept))


def _fit(graphdef: Any, state: Any, train: _Data, valid: _Data, config: DcnConfig) -> Any:
    """The parameters of the epoch with the lowest validation loss."""
    rng = np.random.default_rng(config.seed)
    optimizer_state = _optimizer(config).init(state)
    sizes = [None if part is None else len(part.inputs) for part in train]
    batches = [None if size is None else min(config.batch_queries, size) for size in sizes]
    steps = max(-(-size // batch) for size, batch in zip(sizes, batches, strict=True) if size and batch)
    best, lowest, waited = state, float("inf"), 0
    for _ in range(config.epochs):
        order = tuple(
            None if size is None or batch is None else _order(rng, size, steps, batch)
            for size, batch in zip(sizes, batches, strict=True)
        )
        state, optimizer_state = _epoch(graphdef, config, state, optimizer_state, train, order)
        loss = float(_evaluate(graphdef, config, state, valid))
        waited += 1
        if loss < lowest:
            best, lowest, waited = state, loss, 0
        if waited >= config.early_stopping:
            break
    return best


def _order(rng: np.random.Generator, size: int, steps: int, batch: int) -> Array:
    """int [S, B]: every row once before any comes again."""
    rounds = -(-steps * batch // size)
    rows = np.concatenate([rng.permutation(size) for _ in range(rounds)])
    return jnp.asarray(rows[: steps * batch].reshape(steps, batch))


@functools.lru_cache(maxsize=8)
def _optimizer(config: DcnConfig) -> optax.GradientTransformation:
    return optax.adamw(config.learning_rate, weight_decay=config.weight_decay)


def _loss(graphdef: Any, config: DcnConfig, state: Any, data: _Data) -> Array:
    network, (ranked, pages) = nnx.merge(graphdef, state), data
    # One list's candidates after the other's: the network sees items alone.
    scores = jax.vmap(network)(ranked.inputs)[..., 0]
    loss = softmax_listwise(scores, 2**ranked.labels - 1, where=ranked.where)
    if pages is None:
        return loss
    log_odds = jax.vmap(network)(pages.inputs)[..., 1:]
    where = pages.where[..., None] & ~jnp.isnan(pages.labels)
    weights = (1.0,) * pages.labels.shape[-1]
    return loss + config.action_weight * action_loss(
        log_odds, pages.labels, where=where, task_weights=weights
    )


_evaluate = jax.jit(_loss, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _epoch(
    graphdef: Any, config: DcnConfig, state: Any, optimizer_state: Any, data: _Data, order: Any
) -> tuple[Any, Any]:
    """All steps of an epoch in one program; order is int [S, B] rows of each part of the data."""

    def step(carry: tuple[Any, Any], rows: Any) -> tuple[tuple[Any, Any], None]:
        state, optimizer_state = carry
        batch = jax.tree.map(
            lambda part, chosen: jax.tree.map(lambda x: x[chosen], part), data, rows, is_leaf=_is_part
        )
        gradients = jax.grad(lambda state: _loss(graphdef, config, state, batch))(state)
        updates, optimizer_state = _optimizer(config).update(gradients, optimizer_state, state)
        return (optax.apply_updates(state, updates), optimizer_state), None

    return jax.lax.scan(step, (state, optimizer_state), order)[0]


def _is_part(node: Any) -> bool:
    return isinstance(node, _Examples)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: Any, state: Any, inputs: Array) -> Array:
    return nnx.merge(graphdef, state)(inputs)


def _tensors(network: Dcn) -> dict[str, np.ndarray]:
    return {
        ".".join(map(str, path)): np.ascontiguousarray(np.asarray(variable[...]))
        for path, variable in nnx.to_flat_state(nnx.state(network, nnx.Param))
    }


def _load_tensors(path: Path, features: int, actions: int, config: DcnConfig) -> tuple[Scaling, Dcn]:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}): copy it again") from error
    scaling = Scaling(**_scaling(path, tensors, features))
    network = nnx.eval_shape(lambda: Dcn(scaling.width, actions, config, rngs=nnx.Rngs(0)))
    given = {
        name.removeprefix("network."): value for name, value in tensors.items() if name[:8] == "network."
    }
    load_weights(network, given)
    return scaling, network


def _scaling(path: Path, tensors: Mapping[str, np.ndarray], features: int) -> dict[str, np.ndarray]:
    found = {}
    for field, kind in (
        ("mean", "float32"),
        ("deviation", "float32"),
        ("log", "bool"),
        ("indicators", "int32"),
    ):
        value = tensors.get(f"scaling.{field}")
        if value is None or value.dtype != kind or value.ndim != 1:
            raise InputError(f"{path}: scaling.{field} is missing or not {kind} [n]; save the model anew")
        if field != "indicators" and len(value) != features:
            raise InputError(
                f"{path}: scaling.{field} has {len(value)} features and {_SETTINGS} {features}: "
                "the two files are of different models"
            )
        found[field] = value
    if not np.isin(found["indicators"], np.arange(features)).all():
        raise InputError(f"{path}: scaling.indicators names a feature that is not there; save the model anew")
    return found


def _check_finite(features: FeatureMatrix) -> None:
    bad = np.isinf(features.values[features.where]).any(axis=0)
    if bad.any():
        raise InputError(
            f"feature {features.names[int(np.argmax(bad))]!r} is infinite; NaN says that it is missing"
        )


def _check_actions(
    name: str, features: FeatureMatrix, actions: np.ndarray, spec: FeatureSpec, names: tuple[str, ...]
) -> None:
    _check_names(features.names, spec.names)
    _check_finite(features)
    if np.shape(actions) != (*features.where.shape, len(names)):
        raise InputError(
            f"{name}: actions have shape {np.shape(actions)}: give {(*features.where.shape, len(names))}, one for each of {names}"
        )
    known = actions[features.where]
    bad = known[~np.isin(known, (0, 1)) & ~np.isnan(known)]
    if bad.size:
        raise InputError(f"{name}: action {bad[0]} is none of 1 (done), 0 (not done) and NaN (not eligible)")
