"""Continuous measurement: a judge grades the top results of sampled queries, and the figures are compared with the last run's.

Queries are sampled per bucket. Figures are means over the sampled queries (so that each bucket weighs what was sampled of it) with 95%
intervals by a bootstrap over queries:

- NDCG@10, gain 2^g - 1 of the judge's grades. The perfect ranking draws on all documents that the judge has graded for the query so far,
  in this run and in earlier ones that share the folder of grades: a good document that no system ever returned is not missed. It can only
  fall as more becomes known; a query without any document graded above 0 has none.
- P@10: share of the first ten places with a grade of 3 or 4; a place that is empty is a miss.
- Poor-match rate@10: share of the documents shown that are graded 0 or 1; a query without results has none.

Two runs are compared over the same queries, both by the same, united pool of graded documents.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxsearch.data.records import Document, Query, to_dict, unique_ids
from jaxsearch.measurement.agreement import NO_BUCKET
from jaxsearch.measurement.files import ReportError, read_json, write_json, write_text
from jaxsearch.measurement.grade_cache import GradeCache, document_key, query_key
from jaxsearch.measurement.judging import Judge, Reading, check_judge, check_reading, draw, read_grades
from jaxsearch.metrics import (
    MIN_CLUSTERS,
    Interval,
    bootstrap_mean,
    ndcg,
    paired_bootstrap,
    poor_match_rate_at_k,
    precision_at_k,
)
from jaxsearch.models.contract import Model
from jaxsearch.serving.bundle import Bundle

FORMAT = 1
FILE, PAGE = "measurement.json", "measurement.html"
K = 10
METRICS = ("ndcg", "precision", "poor_match")
"""Names of the figures, each @10."""
PART = 64
"""Queries graded between two writes of the cache."""


@dataclass(frozen=True)
class Figures:
    """Means over queries with 95% intervals; NaN: cannot be said."""

    queries: int
    without_results: int
    """Queries that were answered with nothing."""
    ndcg: Interval
    precision: Interval
    poor_match: Interval
    note: str
    """Why figures or intervals are missing; empty where none is."""


@dataclass(frozen=True)
class Ranked:
    """One sampled query, its results and what the judge knows for it."""

    query_id: str
    query: str
    bucket: str
    results: tuple[str, ...]
    """Document ids, best first."""
    pool: dict[str, int]
    """Document id -> grade, of every document graded for the query, the results among them."""


@dataclass(frozen=True)
class Change:
    """A figure now and before, over the queries that have it in both runs."""

    queries: int
    before: float
    now: float
    difference: Interval
    """now - before."""
    p: float
    """Two-sided, paired bootstrap over queries; NaN for too few."""


@dataclass(frozen=True)
class Comparison:
    """This run against an earlier one: group ("overall" or a bucket) -> figure -> change."""

    system: str
    """What the earlier run measured."""
    changes: dict[str, dict[str, Change]]


@dataclass(frozen=True)
class MeasurementReport:
    """One run. `judge`, `reading`, `queries` and `documents` must agree for two runs to be compared."""

    format: int
    system: str
    """SHA-256 of the bundle or of the TREC run."""
    judge: str
    """`Model.hash`."""
    reading: str
    queries: str
    """SHA-256 over the sampled queries."""
    documents: str
    """SHA-256 over the documents, in any order."""
    per_bucket: int
    seed: int
    population: dict[str, int]
    """Queries there were to sample from, by bucket."""
    graded: int
    """Pairs graded by this run."""
    remembered: int
    """Pairs whose grade was known."""
    overall: Figures
    buckets: dict[str, Figures]
    ranked: tuple[Ranked, ...]
    comparison: Comparison | None


# --- sampling and ranking --------------------------------------------------------------------------------------------


def sample_queries(queries: Sequence[Query], per_bucket: int, seed: int = 0) -> list[Query]:
    """At most `per_bucket` queries of each bucket, the same ones for the same seed, in the order of the file.

    Raises:
      ReportError: a number is out of range.
      RecordError: two queries share an id.
    """
    if per_bucket < 1:
        raise ReportError(f"per_bucket is {per_bucket}: use at least 1")
    unique_ids(queries)
    chosen = {
        query.id
        for bucket in {query.bucket for query in queries}
        for query in draw([q for q in queries if q.bucket == bucket], per_bucket, seed)
    }
    return [query for query in queries if query.id in chosen]


def rank_with_bundle(
    bundle: Bundle,
    queries: Sequence[Query],
    *,
    depth: int = 50,
    top: int = K,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[str]]:
    """Document ids per query id, best first.

    Args:
      bundle: an opened bundle.
      queries: what is asked.
      depth: candidates retrieved and ranked per query.
      top: results kept per query.
      progress: called with the number of queries done since the last call.
    """
    ranked = bundle.rank(queries, depth=depth, progress=progress)
    return {
        query.id: [bundle.documents[result.row].id for result in results[:top]]
        for query, results in zip(queries, ranked, strict=True)
    }


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(
    model: Model,
    queries: Sequence[Query],
    documents: Sequence[Document],
    rankings: Mapping[str, Sequence[str]],
    *,
    system: str,
    grades: str | os.PathLike[str],
    population: Mapping[str, int],
    per_bucket: int,
    seed: int = 0,
    top: int = K,
    reading: Reading = "argmax",
    previous: MeasurementReport | None = None,
    progress: Callable[[int], None] | None = None,
) -> MeasurementReport:
    """Grade the first `top` results of each query, compute the figures, and compare with an earlier run.

    Args:
      model: the judge.
      queries: the sampled ones.
      documents: the corpus.
      rankings: query id -> document ids, best first; a query without an entry was answered with nothing.
      system: what made the rankings, such as `Bundle.hash`.
      grades: folder of grades given before; share it between runs.
      population: queries there were to sample from, by bucket.
      per_bucket: as the queries were sampled.
      seed: as the queries were sampled.
      top: results graded per query, at least 10. More than 10 make the pool larger that the perfect ranking draws on.
      reading: how a grade is read from the judge's probabilities.
      previous: an earlier run's report.
      progress: called with the number of queries done since the last call.

    Raises:
      ContractError: the model is no judge.
      ReportError: no queries, `top` is below 10, or the earlier run is of another judge or of other data.
      RecordError: two documents share an id.
    """
    check_judge(model)
    check_reading(reading)
    if not queries:
        raise ReportError("there are no queries: give at least one")
    if top < K:
        raise ReportError(f"top is {top}: use at least {K}, the depth of the figures")
    unique_ids(documents)
    identity = {
        "judge": model.hash,
        "reading": reading,
        "queries": _fingerprint(queries),
        "documents": _fingerprint(documents),
    }
    if previous is not None:
        check_comparable(identity, previous)
    row = {document.id: i for i, document in enumerate(documents)}
    shown = [list(rankings.get(query.id, ()))[:top] for query in queries]
    cache = GradeCache(grades, model.hash)
    candidates = [np.array([row[name] for name in names], np.int32) for names in shown]
    graded = _grade_new(model, queries, documents, candidates, cache, progress)
    here = {document_key(document): document.id for document in documents}
    ranked = tuple(
        Ranked(
            query.id,
            query.text,
            query.bucket or NO_BUCKET,
            tuple(names),
            _pool(cache.known(query_key(query)), here, reading),
        )
        for query, names in zip(queries, shown, strict=True)
    )
    return MeasurementReport(
        format=FORMAT,
        system=system,
        **identity,
        per_bucket=per_bucket,
        seed=seed,
        population=dict(population),
        graded=graded,
        remembered=sum(map(len, shown)) - graded,
        overall=figures(ranked),
        buckets={bucket: figures(part) for bucket, part in _by_bucket(ranked).items()},
        ranked=ranked,
        comparison=None if previous is None else compare(ranked, previous),
    )


def _grade_new(
    model: Model,
    queries: Sequence[Query],
    documents: Sequence[Document],
    candidates: Sequence[np.ndarray],
    cache: GradeCache,
    progress: Callable[[int], None] | None,
) -> int:
    """Grade what the cache lacks, part by part; returns the number of pairs."""
    keys = [document_key(document) for document in documents]
    wanted = []
    for query, rows in zip(queries, candidates, strict=True):
        known = cache.known(query_key(query))
        new = np.array([row for row in rows if keys[row] not in known], np.int32)
        if new.size:
            wanted.append((query, new))
    judge = Judge(model, documents, [rows for _, rows in wanted])
    for start in range(0, len(wanted), PART):
        part = wanted[start : start + PART]
        found = judge([query for query, _ in part], [rows for _, rows in part], progress)
        cache.add(
            (query_key(query), keys[row], p)
            for (query, rows), probabilities in zip(part, found, strict=True)
            for row, p in zip(rows, probabilities, strict=True)
        )
    return sum(len(rows) for _, rows in wanted)


def _pool(known: Mapping[str, np.ndarray], here: Mapping[str, str], reading: Reading) -> dict[str, int]:
    """Document id -> grade, of the documents that still exist as they were graded, in order of their ids."""
    found = sorted((here[key], int(read_grades(p, reading))) for key, p in known.items() if key in here)
    return dict(found)


def _fingerprint(records: Sequence[Query] | Sequence[Document]) -> str:
    lines = sorted(json.dumps(to_dict(record), sort_keys=True) for record in records)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _by_bucket(ranked: Sequence[Ranked]) -> dict[str, list[Ranked]]:
    found: dict[str, list[Ranked]] = {}
    for item in sorted(ranked, key=lambda item: item.bucket):
        found.setdefault(item.bucket, []).append(item)
    return found


def query_metrics(ranked: Sequence[Ranked]) -> dict[str, np.ndarray]:
    """The figures of each query [Q], by name; NaN where a query has none."""
    width = max([K, *(len(item.results) for item in ranked)])
    pools = [sorted(item.pool.values(), reverse=True)[:K] for item in ranked]
    grades, where = np.zeros((len(ranked), width)), np.zeros((len(ranked), width), bool)
    ideal, ideal_where = np.zeros((len(ranked), K)), np.zeros((len(ranked), K), bool)
    for i, (item, best) in enumerate(zip(ranked, pools, strict=True)):
        grades[i, : len(item.results)] = [item.pool[name] for name in item.results]
        where[i, : len(item.results)] = True
        ideal[i, : len(best)] = best
        ideal_where[i, : len(best)] = True
    scores = np.broadcast_to(-np.arange(width), grades.shape)
    precision = precision_at_k(scores, grades, where=where, k=K)
    return {
        "ndcg": ndcg(scores, grades, where=where, k=K, ideal_grades=ideal, ideal_where=ideal_where),
        # Ten empty places are ten misses, or a system could gain by returning nothing.
        "precision": np.where(where.any(axis=1), precision, 0.0),
        "poor_match": poor_match_rate_at_k(scores, grades, where=where, k=K),
    }


def figures(ranked: Sequence[Ranked]) -> Figures:
    """Means with intervals of some queries."""
    found = query_metrics(ranked)
    return Figures(
        queries=len(ranked),
        without_results=sum(not item.results for item in ranked),
        note=_note(len(ranked), int(np.isnan(found["ndcg"]).sum())),
        **{name: bootstrap_mean(found[name]) for name in METRICS},
    )


def _note(queries: int, without_good: int) -> str:
    notes = []
    if queries < MIN_CLUSTERS:
        notes.append(f"too few queries for intervals: {queries} of at least {MIN_CLUSTERS}")
    if without_good:
        notes.append(f"{without_good} without NDCG: no document graded above 0 is known")
    return "; ".join(notes)


# --- against an earlier run ------------------------------------------------------------------------------------------


def check_comparable(identity: Mapping[str, str], previous: MeasurementReport) -> None:
    """Raise `ReportError` unless both runs have the same judge, reading, queries and documents."""
    differing = [name for name, value in identity.items() if getattr(previous, name) != value]
    if differing:
        raise ReportError(
            f"the earlier run differs in {', '.join(differing)}: only runs of one judge on the same queries and documents can be "
            "compared; measure the earlier system anew, or leave out --previous"
        )


def compare(ranked: Sequence[Ranked], previous: MeasurementReport) -> Comparison:
    """The changes since an earlier run of the same queries; both runs are computed anew over the union of their pools."""
    earlier = {item.query_id: item for item in previous.ranked}
    before, now = [], []
    for item in ranked:
        old = earlier.get(item.query_id)
        if old is None:
            raise ReportError(f"the earlier run lacks query {item.query_id[:80]!r}: its report was changed")
        pool = {**old.pool, **item.pool}
        before.append(Ranked(item.query_id, item.query, item.bucket, old.results, pool))
        now.append(Ranked(item.query_id, item.query, item.bucket, item.results, pool))
    bucket = np.array([item.bucket for item in ranked])
    groups = {"overall": np.ones(len(ranked), bool)}
    groups |= {name: bucket == name for name in _by_bucket(ranked)}
    ours, theirs = query_metrics(now), query_metrics(before)
    return Comparison(
        previous.system,
        {
            group: {name: _change(ours[name][chosen], theirs[name][chosen]) for name in METRICS}
            for group, chosen in groups.items()
        },
    )


def _change(now: np.ndarray, before: np.ndarray) -> Change:
    both = ~np.isnan(now) & ~np.isnan(before)
    now, before, nan = now[both], before[both], float("nan")
    if not now.size:
        return Change(0, nan, nan, Interval(nan, nan, nan), nan)
    means = float(before.mean()), float(now.mean())
    if now.size < MIN_CLUSTERS:
        return Change(now.size, *means, Interval(means[1] - means[0], nan, nan), nan)
    found = paired_bootstrap(now, before)
    return Change(now.size, *means, Interval(found.mean, found.low, found.high), float(found.p))


# --- files -----------------------------------------------------------------------------------------------------------


def write_report(
    report: MeasurementReport, documents: Sequence[Document], folder: str | os.PathLike[str]
) -> None:
    """Write `measurement.json` and `measurement.html` (documents: their texts are shown on the page)."""
    from jaxsearch.measurement.report import measurement_page

    write_text(Path(folder) / PAGE, measurement_page(report, documents))
    write_json(Path(folder) / FILE, report)


def read_report(folder: str | os.PathLike[str]) -> MeasurementReport:
    """The report in a folder.

    Raises:
      ReportError: there is none, or it is damaged or of another format.
    """
    path = Path(folder) / FILE
    report = read_json(path, MeasurementReport)
    if report.format != FORMAT:
        raise ReportError(f"{path}: format is {report.format}, this version reads {FORMAT}: measure anew")
    for item in report.ranked:
        if not set(item.results) <= set(item.pool) or not set(item.pool.values()) <= set(range(5)):
            raise ReportError(f"{path}: the grades of query {item.query_id[:80]!r} are damaged: measure anew")
    return report
