"""The figures of the funnel: numpy in, numpy out, masked, float64.

What holds for every ranking metric here:

- One value per query. A query with nothing to measure (no item at all, or no document that a perfect
  ranking could gain from) has none: the value is NaN, to be left out with `np.nanmean`, never taken for 0.
- `where` (bool) is required, and padding never changes a value, whatever stands there.
- Ties break by the item's place in the arrays, first wins: deterministic, and the caller's to choose. Give
  items in an order that knows nothing of the grades.
- A NaN score is refused with its query named, and so is a grade that is NaN or negative.

Axes: Q queries, L items per query, M judged documents per query.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap
from sklearn.metrics import cohen_kappa_score, roc_auc_score

Gain = Literal["exponential", "linear"]
GRADES = (0, 1, 2, 3, 4)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def ndcg(
    scores: ArrayLike,
    grades: ArrayLike,
    *,
    where: ArrayLike,
    k: int,
    gain: Gain = "exponential",
    ideal_grades: ArrayLike | None = None,
    ideal_where: ArrayLike | None = None,
) -> Floats:
    r"""Normalised discounted cumulative gain of the first k.

    .. math::
        \text{DCG@}k = \sum_{r=1}^{k} \frac{g(y_r)}{\log_2(1 + r)},
        \quad \text{NDCG} = \text{DCG} / \text{DCG}^*

    Järvelin and Kekäläinen (TOIS 2002); the exponential gain g = 2^y - 1 (Burges et al., ICML 2005) is the
    papers' and rax's, the linear gain g = y is trec_eval's and scikit-learn's. They differ much on one
    ranking: always name the one used.

    Args:
        scores: [Q, L], higher is better.
        grades: [Q, L], non-negative.
        where: bool [Q, L], the items that exist.
        k: depth, at least 1.
        gain: "exponential" or "linear".
        ideal_grades: [Q, M], the grades of all judged documents, the list's among them, where the perfect
            ranking DCG* may draw on more than the list: a list that lacks good documents then has a ceiling
            below 1. Default: the list.
        ideal_where: bool [Q, M], required with `ideal_grades`.

    Returns:
        [Q], NaN where DCG* is 0.

    >>> print(ndcg([[0.1, 0.9]], [[3, 1]], where=[[True, True]], k=2).round(4))
    [0.7098]
    """
    scores, grades, where = _ranking(scores, grades, where, k)
    if (ideal_grades is None) != (ideal_where is None):
        raise ValueError("ideal_grades and ideal_where belong together: give both or neither")
    ideal = np.where(where, grades, 0.0)
    if ideal_grades is not None:
        ideal, mask = np.asarray(ideal_grades, np.float64), _mask("ideal_where", ideal_where)
        _same_shape("ideal_where", mask, ideal.shape)
        if len(ideal) != len(scores):
            raise ValueError(f"ideal_grades has {len(ideal)} queries: scores has {len(scores)}")
        _check_grades("ideal_grades", ideal, mask)
        ideal = np.where(mask, ideal, 0.0)
    best = _dcg(-np.sort(-ideal, axis=1), k, gain)
    found = _dcg(_top(np.where(where, grades, 0.0), scores, where, k), k, gain)
    return _divide(found, best)


def precision_at_k(
    scores: ArrayLike, grades: ArrayLike, *, where: ArrayLike, k: int, threshold: float = 3
) -> Floats:
    """Share of the first k places that hold a document graded `threshold` or more; empty places are misses.

    Args:
        scores: [Q, L], higher is better.
        grades: [Q, L].
        where: bool [Q, L], the items that exist.
        k: depth, at least 1.
        threshold: the lowest grade that is relevant.

    Returns:
        [Q], NaN for a query without items.
    """
    scores, grades, where = _ranking(scores, grades, where, k)
    hits = _top(where & (grades >= threshold), scores, where, k).sum(axis=1)
    return _divide(hits, k * where.any(axis=1))


def poor_match_rate_at_k(
    scores: ArrayLike, grades: ArrayLike, *, where: ArrayLike, k: int, threshold: float = 1
) -> Floats:
    """Share of the documents shown in the first k places that are graded `threshold` or less: low is good.

    Args:
        scores: [Q, L], higher is better.
        grades: [Q, L].
        where: bool [Q, L], the items that exist.
        k: depth, at least 1.
        threshold: the highest grade that is a poor match.

    Returns:
        [Q], NaN for a query without items.
    """
    scores, grades, where = _ranking(scores, grades, where, k)
    poor = _top(where & (grades <= threshold), scores, where, k).sum(axis=1)
    return _divide(poor, np.minimum(where.sum(axis=1), k))


def mrr(scores: ArrayLike, grades: ArrayLike, *, where: ArrayLike, threshold: float = 4) -> Floats:
    """Reciprocal rank of the first document graded `threshold` or more; 0 where the list holds none.

    Args:
        scores: [Q, L], higher is better.
        grades: [Q, L].
        where: bool [Q, L], the items that exist.
        threshold: the lowest grade that is searched for.

    Returns:
        [Q], NaN for a query without items.
    """
    scores, grades, where = _ranking(scores, grades, where, 1)
    hits = _top(where & (grades >= threshold), scores, where, where.shape[1])
    reciprocal = hits / (1 + np.arange(hits.shape[1]))
    return _divide(reciprocal.max(axis=1, initial=0.0), where.any(axis=1))


def recall_at_k(retrieved: ArrayLike, relevant: ArrayLike, *, where: ArrayLike, k: int) -> Floats:
    """Share of a query's relevant documents that are among its first k retrieved ones.

    Measures an index as well: `relevant` is then the exhaustive search's own first k.

    Args:
        retrieved: ids [Q, R] in rank order; places that hold nothing carry an id that no document has.
        relevant: ids [Q, M], without repetition.
        where: bool [Q, M], the relevant ids that exist.
        k: depth, at least 1.

    Returns:
        [Q], NaN for a query without relevant documents.
    """
    _check_k(k)
    retrieved, relevant, where = np.asarray(retrieved), np.asarray(relevant), _mask("where", where)
    _same_shape("where", where, relevant.shape)
    if retrieved.ndim != 2 or len(retrieved) != len(relevant):
        raise ValueError(f"retrieved has shape {retrieved.shape}: give [Q={len(relevant)}, R]")
    found = [
        np.isin(wanted[exists], ids[:k]).sum()
        for ids, wanted, exists in zip(retrieved, relevant, where, strict=True)
    ]
    return _divide(np.asarray(found), where.sum(axis=1))


def auroc(scores: ArrayLike, labels: ArrayLike, *, where: ArrayLike) -> float:
    """Area under the ROC curve over all pairs that count; ties count half. NaN where only one class occurs.

    Args:
        scores: [...], higher means more likely.
        labels: [...], done (true, 1) or not (false, 0).
        where: bool [...], the pairs that count.
    """
    scores, labels = _flat(scores, labels, where)
    _refuse_nan(scores)
    if np.all(labels == labels[:1]):
        return float("nan")
    return float(roc_auc_score(labels, scores))


def ece(probabilities: ArrayLike, labels: ArrayLike, *, where: ArrayLike, bins: int = 15) -> float:
    r"""Expected calibration error over bins of equal width (Guo et al., "On Calibration", ICML 2017).

    .. math::
        \text{ECE} = \sum_b \frac{n_b}{n} \left| \bar{y}_b - \bar{p}_b \right|

    Args:
        probabilities: [...], in [0, 1].
        labels: [...], done (1) or not (0).
        where: bool [...], the pairs that count.
        bins: how many.

    Returns:
        In [0, 1]; NaN where nothing counts.

    Raises:
        ValueError: a probability lies outside [0, 1], or shapes disagree.
    """
    probabilities, labels = _flat(probabilities, labels, where)
    if not np.all((probabilities >= 0) & (probabilities <= 1)):
        bad = probabilities[~((probabilities >= 0) & (probabilities <= 1))][0]
        raise ValueError(f"probabilities contains {bad}: give numbers from 0 to 1 (a sigmoid of log-odds)")
    if not probabilities.size:
        return float("nan")
    bin_of = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_of, weights=labels - probabilities, minlength=bins)
    return float(np.abs(gaps).sum() / probabilities.size)


def kappa(
    first: ArrayLike,
    second: ArrayLike,
    *,
    where: ArrayLike,
    labels: tuple[int, ...] = GRADES,
    weights: Literal["linear", "quadratic"] | None = "linear",
) -> float:
    """Cohen's kappa of two raters' grades, linear-weighted as in SAGE (arXiv 2602.07309, section 1).

    Args:
        first: int [...], one rater's grades.
        second: int [...], the other's.
        where: bool [...], the pairs that both have graded.
        labels: all grades there are, in order, so that the weights do not depend on which occur.
        weights: "linear", "quadratic", or None for plain agreement.

    Returns:
        At most 1; NaN where nothing counts, or both raters gave one and the same grade throughout.

    Raises:
        ValueError: a grade is not among the labels, or shapes disagree.
    """
    one, two = _flat(first, second, where)
    _check_labels(one, two, labels)
    if not one.size or (np.all(one == one[0]) and np.all(two == one[0])):
        return float("nan")
    return float(cohen_kappa_score(one.astype(int), two.astype(int), labels=labels, weights=weights))


class Difference(NamedTuple):
    """A difference of two means over the same queries, its 95% interval, and how likely chance is."""

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    first: ArrayLike, second: ArrayLike, *, samples: int = 10_000, seed: int = 0
) -> Difference:
    """Whether `first` is better than `second` on the same queries: paired percentile bootstrap over queries.

    Args:
        first: [Q], one value per query; NaN where the query has none, which must then hold for both.
        second: [Q].
        samples: how many resamples.
        seed: of the resampling.

    Returns:
        The mean of first - second, its 95% interval, and the two-sided p-value: twice the smaller share of
        resampled means on one side of 0, counting the sample itself, so never 0.

    Raises:
        ValueError: shapes disagree, a value is NaN on one side only, or fewer than two queries are left.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 1:
        raise ValueError(f"first has shape {a.shape}: give one value per query, [Q]")
    _same_shape("second", b, a.shape)
    lone = np.flatnonzero(np.isnan(a) != np.isnan(b))
    if lone.size:
        raise ValueError(f"query {lone[0]} has a value on one side only: compare both on the same queries")
    difference = (a - b)[~np.isnan(a)]
    if difference.size < 2:
        raise ValueError(f"first has {difference.size} queries with a value: give at least 2")
    result = bootstrap(
        (difference,),
        np.mean,
        n_resamples=samples,
        batch=max(1, 4_000_000 // difference.size),  # bounds memory to about 32 MB
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    means = result.bootstrap_distribution
    tail = min((means <= 0).sum(), (means >= 0).sum())
    interval = result.confidence_interval
    p = min(1.0, 2 * (tail + 1) / (samples + 1))
    return Difference(float(difference.mean()), float(interval.low), float(interval.high), p)


class Interval(NamedTuple):
    """An estimate with its 95% interval; NaN for what cannot be said."""

    value: float
    low: float
    high: float


MIN_CLUSTERS = 10
"""Queries below which no interval is given: a bootstrap of so few is narrower than the truth."""
_MOST_UNDEFINED = 0.01
"""Share of resamples without a value above which there is no interval."""


def grade_tables(
    first: ArrayLike, second: ArrayLike, clusters: ArrayLike, *, labels: tuple[int, ...] = GRADES
) -> NDArray[np.int64]:
    """How often two raters gave which grades, in each cluster (query) of pairs.

    Args:
        first: int [n], one rater's grades.
        second: int [n], the other's.
        clusters: [n], what a pair belongs to: numbers or names.
        labels: the K grades there are, in order.

    Returns:
        [C, K, K], rows the first rater's grades, columns the second's; clusters in the order of `np.unique`.

    Raises:
        ValueError: a grade is not among the labels, or shapes disagree.
    """
    one, two, names = np.asarray(first), np.asarray(second), np.asarray(clusters)
    if one.ndim != 1:
        raise ValueError(f"first has shape {one.shape}: give one grade per pair, [n]")
    _same_shape("second", two, one.shape)
    _same_shape("clusters", names, one.shape)
    _check_labels(one, two, labels)
    found, cluster = np.unique(names, return_inverse=True)
    size = len(labels)
    cell = (cluster * size + _index(one, labels)) * size + _index(two, labels)
    return np.bincount(cell, minlength=len(found) * size * size).reshape(-1, size, size)


def table_kappa(tables: ArrayLike, weights: Literal["linear", "quadratic"] | None = "linear") -> Floats:
    """Cohen's kappa of tables of counts: `kappa` for many at once.

    Args:
        tables: [..., K, K], how often the raters gave which grades.
        weights: as in `kappa`.

    Returns:
        [...], NaN where a table is empty, or both raters gave one and the same grade throughout.

    >>> print(table_kappa([[2, 1], [0, 3]]).round(4))
    0.6667
    """
    counts = np.asarray(tables, np.float64)
    apart = np.abs(np.subtract.outer(np.arange(counts.shape[-1]), np.arange(counts.shape[-1])))
    cost = {None: np.sign(apart), "linear": apart, "quadratic": apart**2}[weights].astype(np.float64)
    total = counts.sum((-2, -1))
    seen = np.einsum("...ij,ij->...", counts, cost) * total
    chance = np.einsum("...i,...j,ij->...", counts.sum(-1), counts.sum(-2), cost)
    return 1 - _divide(seen, chance)


def table_agreement(tables: ArrayLike, within: int = 0) -> Floats:
    """Share of pairs whose grades are at most `within` apart.

    Args:
        tables: [..., K, K], how often the raters gave which grades.
        within: 0 for exact agreement.

    Returns:
        [...], NaN where a table is empty.
    """
    counts = np.asarray(tables, np.float64)
    apart = np.abs(np.subtract.outer(np.arange(counts.shape[-1]), np.arange(counts.shape[-1])))
    return _divide(counts[..., apart <= within].sum(-1), counts.sum((-2, -1)))


def resamples(clusters: int, samples: int, seed: int = 0) -> NDArray[np.int64]:
    """A bootstrap over clusters: how often each is drawn, [samples, clusters]; every row sums to `clusters`."""
    if clusters < 1 or samples < 1:
        raise ValueError(f"clusters is {clusters}, samples is {samples}: give at least 1 of each")
    rng = np.random.default_rng(seed)
    return np.stack(
        [np.bincount(rng.integers(clusters, size=clusters), minlength=clusters) for _ in range(samples)]
    )


def bootstrap_tables(
    tables: ArrayLike,
    statistic: Callable[[NDArray], Floats],
    *,
    samples: int = 1000,
    seed: int = 0,
    least: int = MIN_CLUSTERS,
) -> Interval:
    """A figure of all clusters together, with the percentile interval of a bootstrap over clusters.

    Pairs of one query share its difficulties: they are drawn together, or the interval would be too narrow.

    Args:
        tables: [C, ...], one table of counts a cluster.
        statistic: from summed tables [S, ...] to values [S], such as `table_kappa`.
        samples: how many resamples.
        seed: of the resampling.
        least: clusters below which there is no interval.

    Returns:
        The figure; the interval is NaN for fewer than `least` clusters, where the figure is NaN, or where it has no
        value in more than 1% of the resamples.
    """
    counts = np.asarray(tables, np.float64)
    value = float(statistic(counts.sum(0)[None])[0])
    if len(counts) < least or np.isnan(value):
        return Interval(value, float("nan"), float("nan"))
    flat = resamples(len(counts), samples, seed).astype(np.float64) @ counts.reshape(len(counts), -1)
    return _interval(value, statistic(flat.reshape(samples, *counts.shape[1:])))


def bootstrap_mean(
    values: ArrayLike, *, samples: int = 1000, seed: int = 0, least: int = MIN_CLUSTERS
) -> Interval:
    """The mean over queries with its percentile interval.

    Args:
        values: [Q], NaN for a query without a value, which is left out.
        samples: how many resamples.
        seed: of the resampling.
        least: queries with a value below which there is no interval.
    """
    found = np.asarray(values, np.float64)
    found = found[~np.isnan(found)]
    if not found.size:
        return Interval(float("nan"), float("nan"), float("nan"))
    if found.size < least:
        return Interval(float(found.mean()), float("nan"), float("nan"))
    return _interval(float(found.mean()), resamples(found.size, samples, seed) @ found / found.size)


def _interval(value: float, resampled: Floats) -> Interval:
    if np.isnan(resampled).mean() > _MOST_UNDEFINED:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def _index(grades: NDArray, labels: tuple[int, ...]) -> NDArray[np.intp]:
    """Each grade's place in `labels`, whatever their order."""
    order = np.argsort(labels)
    return order[np.searchsorted(np.asarray(labels)[order], grades)]


def _check_labels(first: NDArray, second: NDArray, labels: tuple[int, ...]) -> None:
    for name, values in (("first", first), ("second", second)):
        unknown = values[~np.isin(values, labels)]
        if unknown.size:
            raise ValueError(f"{name} contains {unknown[0]}: grades are {', '.join(map(str, labels))}")


def _ranking(scores: ArrayLike, grades: ArrayLike, where: ArrayLike, k: int) -> tuple[Floats, Floats, Bools]:
    """The three arrays of a ranking metric, checked."""
    _check_k(k)
    scores, grades = np.asarray(scores, np.float64), np.asarray(grades, np.float64)
    mask = _mask("where", where)
    if scores.ndim != 2:
        raise ValueError(f"scores has shape {scores.shape}: give [Q, L]")
    _same_shape("grades", grades, scores.shape)
    _same_shape("where", mask, scores.shape)
    _refuse_nan(np.where(mask, scores, 0.0))
    _check_grades("grades", grades, mask)
    return scores, grades, mask


def _check_grades(name: str, grades: Floats, mask: Bools) -> None:
    bad = np.argwhere(~(grades >= 0) & mask)
    if bad.size:
        query, item = bad[0]
        fix = "grades are 0 or more; mask documents without one"
        raise ValueError(f"{name} is {grades[query, item]} for query {query}, item {item}: {fix}")


def _top(values: NDArray, scores: Floats, where: Bools, k: int) -> NDArray:
    """Values [Q, L] in rank order, cut to the first k: existing items first, higher scores first, stable."""
    order = np.lexsort((np.where(where, -scores, 0.0), ~where), axis=1)
    return np.take_along_axis(values, order[:, :k], axis=1)


def _dcg(ranked: Floats, k: int, gain: Gain) -> Floats:
    """Discounted gain [Q] of grades [Q, L] in rank order."""
    if gain not in ("exponential", "linear"):
        raise ValueError(f"gain is {gain!r}: use exponential (2^grade - 1) or linear (grade)")
    ranked = ranked[:, :k]
    gains = np.exp2(ranked) - 1 if gain == "exponential" else ranked
    return gains @ (1 / np.log2(2 + np.arange(ranked.shape[1])))


def _divide(part: NDArray, whole: ArrayLike) -> Floats:
    """part / whole, NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole) > 0)


def _flat(values: ArrayLike, labels: ArrayLike, where: ArrayLike) -> tuple[Floats, Floats]:
    """The values and labels that count, flat."""
    values, labels = np.asarray(values, np.float64), np.asarray(labels, np.float64)
    mask = _mask("where", where)
    _same_shape("labels", labels, values.shape)
    _same_shape("where", mask, values.shape)
    return values[mask], labels[mask]


def _mask(name: str, where: ArrayLike | None) -> Bools:
    mask = np.asarray(where)
    if mask.dtype != bool:
        raise ValueError(f"{name} has dtype {mask.dtype}: give a boolean mask, True for what counts")
    return mask


def _same_shape(name: str, value: NDArray, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} has shape {value.shape}: it must be {shape} to match the other arguments")


def _refuse_nan(scores: Floats) -> None:
    bad = np.argwhere(np.isnan(scores))
    if bad.size:
        raise ValueError(f"scores is NaN at {tuple(map(int, bad[0]))} (query first): a NaN has no rank")


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}: give at least 1")
