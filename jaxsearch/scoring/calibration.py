"""Calibration: from a ranker's log-odds to probabilities that mean what they say, by isotonic regression per objective.

(Zadrozny and Elkan, KDD 2002.) A trained head is off for reasons of its own: loss masking, task weights, a teacher's temperature.
Held-out impressions, all of them and unmasked, say how often an action really follows. Maps of actions know the position too,
p(action | score, position): the model scores everything at its serving position, and what is shown first is acted on more often.

Fit on one split, measure on another: on the pairs that it was fitted on, a map is calibrated by construction.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from sklearn.isotonic import isotonic_regression

from jaxsearch.data.datasets import Dataset
from jaxsearch.errors import InputError
from jaxsearch.metrics import auroc, ece
from jaxsearch.models.contract import MAX_KNOTS, RELEVANCE, Contract, ContractError, Model, check_calibrator
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.mixed import Fetch, make_mixed_scorer
from jaxsearch.scoring.records import RecordScorer, action_log_odds, relevance_log_odds

RELEVANT = 2
"""A pair with a grade above this is relevant."""
POSITIVES = 50
"""Least number of positives in a bucket of positions: the spread of a rate of 50 in n is about a seventh of it."""
CALIBRATED_ON = "calibrated_on"
"""Of a calibrated MixLM ranker's `training`: "text" or "embeddings", whose scores the calibrators were fitted to."""
PER_QUERY = 64
"""Judged pairs of a query that relevance is fitted on at most."""
BINS = 15

Floats = NDArray[np.float64]


class Knots(NamedTuple):
    """A map: linear between its knots, flat beyond them."""

    log_odds: tuple[float, ...]
    """Strictly ascending."""
    probability: tuple[float, ...]
    """Never descending, each between 0 and 1 and neither of them."""


@dataclass(frozen=True)
class Calibrator:
    """From log-odds, and positions where they count, to probabilities."""

    positions: tuple[int, ...]
    """The last position of each bucket, ascending; what lies beyond the last one belongs to it. Empty: positions do not count."""
    maps: tuple[Knots, ...]
    """One per bucket."""

    def __call__(self, log_odds: ArrayLike, positions: ArrayLike | None = None) -> Floats:
        """float64 [...], never descending in the log-odds of one position.

        Args:
          log_odds: [...], no NaN.
          positions: int, of a shape that broadcasts to that of the log-odds; may be left out where there is one map.

        Raises:
          ValueError: there are several maps and no positions.
        """
        x = np.asarray(log_odds, np.float64)
        if len(self.maps) == 1:
            return _interpolate(self.maps[0], x)
        if positions is None:
            raise ValueError(f"positions is None: this calibrator has {len(self.maps)} buckets of positions")
        bucket = np.minimum(np.searchsorted(self.positions, positions), len(self.maps) - 1)
        bucket = np.broadcast_to(bucket, x.shape)
        result = np.empty(x.shape)
        for number in np.unique(bucket):
            result[bucket == number] = _interpolate(self.maps[number], x[bucket == number])
        return result

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as they stand in a contract; `from_dict` gives the same bits back."""
        return {
            "positions": list(self.positions),
            "maps": [
                {"log_odds": list(knots.log_odds), "probability": list(knots.probability)}
                for knots in self.maps
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], name: str = "calibrator") -> "Calibrator":
        """A calibrator from plain JSON values; `name` is what messages call it.

        Raises:
          ContractError: the values are not those of a calibrator.
        """
        check_calibrator(name, values)
        maps = (
            Knots(tuple(map(float, item["log_odds"])), tuple(map(float, item["probability"])))
            for item in values["maps"]
        )
        return cls(tuple(values["positions"]), tuple(maps))


def _interpolate(knots: Knots, x: Floats) -> Floats:
    """Linear between knots; rounding never lifts a value above the next knot, so that the order stays."""
    at, value = np.array(knots.log_odds), np.array(knots.probability)
    right = np.searchsorted(at, x)
    low, high = value[np.maximum(right - 1, 0)], value[np.minimum(right, len(at) - 1)]
    return np.clip(np.interp(x, at, value), low, high)


# --- fitting ---------------------------------------------------------------------------------------------------------


def position_buckets(positions: ArrayLike, outcomes: ArrayLike, least: int = POSITIVES) -> tuple[int, ...]:
    """The last position of each bucket: contiguous, from the top, each with `least` positives or more; one bucket where there are too few.

    Args:
      positions: int [n], at least one.
      outcomes: bool [n].
      least: positives that a bucket needs.

    >>> position_buckets([1, 1, 2, 2, 3, 4], [1, 1, 1, 0, 1, 1], 2)
    (1, 4)
    """
    place, outcome = np.asarray(positions), np.asarray(outcomes, bool)
    ends: list[int] = []
    count = 0
    for position in np.unique(place):
        count += int(outcome[place == position].sum())
        if count >= least:
            ends.append(int(position))
            count = 0
    last = int(place.max())
    # What is left over is too little for a bucket of its own.
    return (*ends[:-1], last)


def fit(
    log_odds: ArrayLike, outcomes: ArrayLike, positions: ArrayLike | None = None, *, least: int = POSITIVES
) -> Calibrator:
    """Isotonic regression of outcomes on log-odds, in each bucket of positions, centred: linear between the middles of its steps.

    Steps would make ties of documents that the model tells apart (Oron and Flournoy, Statistics in Biopharmaceutical Research 2017).
    One positive is imagined at a bucket's lowest log-odds and one negative at its highest, which is Laplace's rule at both ends: no
    probability is 0 or 1, and how near it comes depends on how much was seen there.

    Args:
      log_odds: [n], at least one.
      outcomes: bool [n].
      positions: int [n]; left out: positions do not count.
      least: positives that a bucket of positions needs.

    Raises:
      ValueError: nothing to fit on, log-odds that are no numbers, or shapes disagree.
    """
    x, y = np.asarray(log_odds, np.float64), np.asarray(outcomes, bool)
    if x.ndim != 1 or not x.size or x.shape != y.shape or not np.isfinite(x).all():
        raise ValueError(
            f"log_odds {x.shape} and outcomes {y.shape}: give as many finite numbers as outcomes, at least 1"
        )
    if positions is None:
        return Calibrator((), (_isotonic(x, y),))
    place = np.asarray(positions)
    if place.shape != x.shape:
        raise ValueError(f"positions has shape {place.shape}: it must be {x.shape} to match log_odds")
    ends = position_buckets(place, y, least)
    bucket = np.searchsorted(ends, place)
    return Calibrator(ends, tuple(_isotonic(x[bucket == i], y[bucket == i]) for i in range(len(ends))))


def _isotonic(x: Floats, y: NDArray[np.bool_]) -> Knots:
    scores, outcomes = np.concatenate([[x.min()], x, [x.max()]]), np.concatenate([[1.0], y, [0.0]])
    at, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rates = np.bincount(place, weights=outcomes) / count
    value, block = np.unique(isotonic_regression(rates, sample_weight=count), return_inverse=True)
    first = np.searchsorted(block, np.arange(len(value)))
    last = np.append(first[1:], len(at)) - 1
    centre = np.bincount(block, weights=count * at) / np.bincount(block, weights=count)
    centre = np.clip(centre, at[first], at[last])  # against rounding: centres ascend strictly
    keep = np.unique(np.linspace(0, len(value) - 1, min(len(value), MAX_KNOTS)).round().astype(int))
    return Knots(tuple(centre[keep].tolist()), tuple(value[keep].tolist()))


# --- a model on a data set -------------------------------------------------------------------------------------------


class Observations(NamedTuple):
    """What was scored and what happened, for one objective."""

    log_odds: Floats
    """[n], scored at the serving position."""
    outcomes: NDArray[np.bool_]
    """[n], the action was done; for relevance: the grade is above 2."""
    positions: NDArray[np.int64] | None
    """[n], where it was shown; None for relevance."""


def objective_log_odds(logits: np.ndarray, actions: Sequence[str]) -> dict[str, np.ndarray]:
    """Objective -> log-odds [L] of a ranker's logits [L, 2 + A]: relevance, then each action."""
    values = action_log_odds(logits)
    return {RELEVANCE: relevance_log_odds(logits)} | {name: values[:, i] for i, name in enumerate(actions)}


def probabilities(
    log_odds: Mapping[str, np.ndarray], calibrators: Mapping[str, Calibrator], position: int
) -> dict[str, Floats]:
    """Objective -> probabilities [L] at one position; where there is no calibrator, the sigmoid."""
    return {
        name: calibrators[name](x, position) if name in calibrators else expit(x.astype(np.float64))
        for name, x in log_odds.items()
    }


def load_calibrators(contract: Contract) -> dict[str, Calibrator]:
    """Objective -> calibrator of a contract.

    Raises:
      ContractError: one of them is none.
    """
    return {
        name: Calibrator.from_dict(values, f"calibrators.{name}")
        for name, values in contract.calibrators.items()
    }


def observe(
    model: Model, data: Dataset, split: str, *, per_query: int = PER_QUERY, fetch: Fetch | None = None
) -> dict[str, Observations]:
    """Score a split's impressions and judged pairs through the served prefill path; an objective without any is left out.

    Judged are the pairs that `Dataset.graded` lists and fixed rerank lists, of which the rest is grade 0. Impressions count for an action
    where it was possible, all of them.

    Args:
      model: a ranker.
      data: its queries, impressions and grades.
      split: such as "dev".
      per_query: judged pairs of a query at most, drawn by its number; 0 for all.
      fetch: the documents' embeddings, which a MixLM ranker reads; None: it reads the text.

    Raises:
      ContractError: the model is no ranker, or there are embeddings and it reads none.
      InputError: no such split, or `per_query` is negative.
    """
    if model.contract.kind != "ranker" or not isinstance(model.module, Scorer):
        raise ContractError(
            f"a {model.contract.kind} cannot be calibrated: give the model folder of a ranker"
        )
    if split not in data.queries:
        raise InputError(f"split is {split!r}: {data.name} has {', '.join(data.queries)}")
    if per_query < 0:
        raise InputError(f"per_query is {per_query}: use at least 0")
    if fetch is not None:
        scorer: RecordScorer = make_mixed_scorer(model, data.documents, fetch)
    else:
        scorer = RecordScorer(model.module, model.tokenizer, model.contract.prompts["pair"], data.documents)
    queries = list(data.queries[split])
    judged = [_judged_rows(data, query.id, number, per_query) for number, query in enumerate(queries)]
    pages = [list(data.impressions.get(query.id, ())) for query in queries]
    shown = [np.array([data.document_row[item.document_id] for item in page], np.int32) for page in pages]
    rows = [np.union1d(*both).astype(np.int32) for both in zip(judged, shown, strict=True)]
    logits = scorer(queries, rows)  # each pair once
    odds = [
        relevance_log_odds(x[np.searchsorted(row, some)])
        for x, row, some in zip(logits, rows, judged, strict=True)
    ]
    grades = [data.grades(query, some) for query, some in zip(queries, judged, strict=True) if len(some)]
    found = {}
    if grades:
        relevant = np.concatenate(grades) > RELEVANT
        found[RELEVANCE] = Observations(np.concatenate(odds).astype(np.float64), relevant, None)
    on_pages = [x[np.searchsorted(row, some)] for x, row, some in zip(logits, rows, shown, strict=True)]
    impressions = [item for page in pages for item in page]
    for i, name in enumerate(model.contract.actions):
        possible = np.array([item.actions.get(name) is not None for item in impressions], bool)
        if possible.any():
            found[name] = Observations(
                action_log_odds(np.concatenate(on_pages))[possible, i].astype(np.float64),
                np.array([bool(item.actions.get(name)) for item in impressions])[possible],
                np.array([item.position for item in impressions])[possible],
            )
    return found


def _judged_rows(data: Dataset, query_id: str, number: int, limit: int) -> np.ndarray:
    listed = np.fromiter(data.graded.get(query_id, {}), np.int32)
    rows = np.union1d(listed, data.rerank.get(query_id, np.zeros(0, np.int32))).astype(np.int32)
    if not limit or len(rows) <= limit:
        return rows
    return np.sort(np.random.default_rng(number).permutation(rows)[:limit])


def calibrate(
    model: Model,
    data: Dataset,
    split: str = "dev",
    *,
    least: int = POSITIVES,
    per_query: int = PER_QUERY,
    fetch: Fetch | None = None,
) -> dict[str, Calibrator]:
    """Fit a calibrator for each objective that the split tells of.

    Args:
      model: a ranker.
      data: held-out impressions and grades.
      split: one that the model has not learned from and that it is not measured on.
      least: positives that a bucket of positions needs.
      per_query: as in `observe`.
      fetch: likewise.

    Raises:
      ContractError: the model is no ranker.
      InputError: the split is "train", unknown, or has neither judged pairs nor impressions; a number is out of range.
    """
    if split == "train":
        raise InputError(
            "split is 'train', which the model has learned from: calibrate on another, such as dev"
        )
    if least < 1:
        raise InputError(f"least is {least}: use at least 1")
    seen = observe(model, data, split, per_query=per_query, fetch=fetch)
    if not seen:
        raise InputError(
            f"split {split!r} of {data.name} has neither judged pairs nor impressions: use another"
        )
    return {
        name: fit(item.log_odds, item.outcomes, item.positions, least=least) for name, item in seen.items()
    }


# --- measuring -------------------------------------------------------------------------------------------------------


class Reliability(NamedTuple):
    """A reliability diagram: bins of equal width over [0, 1]."""

    predicted: Floats
    """[bins], mean probability; NaN in an empty bin."""
    observed: Floats
    """[bins], share of outcomes that came true; NaN in an empty bin."""
    pairs: NDArray[np.int64]
    """[bins], how many."""


def reliability(
    probability: ArrayLike, outcomes: ArrayLike, *, where: ArrayLike, bins: int = BINS
) -> Reliability:
    """What was predicted beside what happened, in the bins of `metrics.ece`: that is the mean gap of the two, weighted by pairs.

    Args:
      probability: [...], in [0, 1].
      outcomes: [...], came true (1) or not (0).
      where: bool [...], the pairs that count.
      bins: how many, at least 1.
    """
    mask = np.asarray(where, bool)
    p, y = np.asarray(probability, np.float64)[mask], np.asarray(outcomes, np.float64)[mask]
    bin_of = np.minimum((p * bins).astype(int), bins - 1)
    count = np.bincount(bin_of, minlength=bins)

    def mean(values: Floats) -> Floats:
        total = np.bincount(bin_of, weights=values, minlength=bins)
        return np.divide(total, count, out=np.full(bins, np.nan), where=count > 0)

    return Reliability(mean(p), mean(y), count)


class Comparison(NamedTuple):
    """One objective before and after calibration, at the positions where things were shown."""

    pairs: int
    positives: int
    ece_before: float
    ece_after: float
    auroc_before: float
    """By log-odds; NaN where only one class occurs, as the next one."""
    auroc_after: float
    """By calibrated probability, with the position."""
    before: Reliability
    after: Reliability


def compare(calibrator: Calibrator, seen: Observations, *, bins: int = BINS) -> Comparison:
    """Measure a calibrator on pairs that it was not fitted on."""
    before, after = expit(seen.log_odds), calibrator(seen.log_odds, seen.positions)
    every, y = np.ones(len(before), bool), seen.outcomes
    return Comparison(
        pairs=len(before),
        positives=int(y.sum()),
        ece_before=ece(before, y, where=every, bins=bins),
        ece_after=ece(after, y, where=every, bins=bins),
        auroc_before=auroc(seen.log_odds, y, where=every),
        auroc_after=auroc(after, y, where=every),
        before=reliability(before, y, where=every, bins=bins),
        after=reliability(after, y, where=every, bins=bins),
    )


def draw_reliability(path: str | os.PathLike[str], comparisons: Mapping[str, Comparison]) -> None:
    """A reliability diagram for each objective, before and after, as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(comparisons), 3)
    rows = math.ceil(len(comparisons) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 4 * rows), squeeze=False)
    for axis in axes.flat[len(comparisons) :]:
        axis.set_axis_off()
    for axis, (name, found) in zip(axes.flat, comparisons.items(), strict=False):
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for label, diagram, error in (
            ("before", found.before, found.ece_before),
            ("after", found.after, found.ece_after),
        ):
            some = diagram.pairs > 0
            x, y = diagram.predicted[some], diagram.observed[some]
            (line,) = axis.plot(x, y, linewidth=1, label=f"{label}, ECE {error:.4f}")
            # A bin of three pairs proves nothing: the area of a point is its share of the pairs.
            area = 8 + 300 * diagram.pairs[some] / diagram.pairs.sum()
            axis.scatter(x, y, s=area, color=line.get_color(), alpha=0.6)
        axis.set(xlabel="predicted", ylabel="observed", title=name, xlim=(0, 1), ylim=(0, 1))
        axis.legend()
    figure.tight_layout()
    target = Path(path)
    temporary = target.with_name(target.name + ".tmp")
    figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
    os.replace(temporary, target)
