"""Whether the generated market is honest: what a document or a query alone tells of a grade, the range of rankings, the click model.

    python benchmarks/market_honesty.py --jsonl benchmarks/results/market_honesty.jsonl --figure benchmarks/results/market_honesty.png
    python benchmarks/market_honesty.py --datasets job_market:tiny --relevance-scores STORE --engagement-scores STORE

Rows, one JSON object each, by `kind`:
- probe: AUROC of grade > 2 from the words of the document (and which it is) or of the query alone, on training pairs of searches that the
  probe did not see. Honest data: 0.5.
- range: NDCG@10 (gain 2^g - 1) on test searches over the whole corpus: oracle, LightGBM without embeddings, BM25, a random order.
- rate: how often an action was done where it was possible, by grade, position and fifth of popularity.
- fit: AUROC on test impressions of logistic fits of the first action on relevance, on what grades do not know, and on both.
- teachers: mean Spearman correlation per query of two teachers' scores (relevance log-odds, log-odds of the first action).

Intervals are 95%, from a bootstrap over searches.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import append
from scipy.sparse import hstack, identity
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jaxsearch.data.datasets import Dataset, load_dataset
from jaxsearch.data.prompts import FEATURES, Value
from jaxsearch.data.score_store import read_scores
from jaxsearch.metrics import bootstrap_mean, resamples
from jaxsearch.retrieval.bm25 import Bm25, document_text
from jaxsearch.retrieval.traditional import BoostingParams, FeatureMatrix, Features, FeatureSpec, train_ranker
from jaxsearch.scoring.records import RANKER_LABELS
from jaxsearch.tasks.base import ranking_metrics

Row = dict[str, Any]
POPULARITY = {"jobs": "company_ctr", "people": "connect_rate"}
UNGRADED = {
    "jobs": ("company_ctr", "age_days", "pays"),
    "people": ("connect_rate", "active_days", "distance"),
}
"""Pair features that actions depend on and grades do not know."""


def auroc_with_interval(
    labels: np.ndarray, scores: np.ndarray, search: np.ndarray, samples: int = 200
) -> dict[str, float]:
    """AUROC of pairs [n] with its interval from a bootstrap over the searches [n] that they belong to."""
    _, cluster = np.unique(search, return_inverse=True)
    weights = resamples(cluster.max() + 1, samples)[:, cluster]
    found = [roc_auc_score(labels, scores, sample_weight=weight) for weight in weights]
    low, high = np.quantile(found, [0.025, 0.975])
    return {"auroc": round(roc_auc_score(labels, scores), 4), "low": round(low, 4), "high": round(high, 4)}


def probes(data: Dataset) -> Iterator[Row]:
    """Logistic regression on hashed words and word pairs."""
    words = HashingVectorizer(n_features=2**14, alternate_sign=False, ngram_range=(1, 2)).transform
    documents = hstack([words(map(document_text, data.documents)), identity(len(data.documents))]).tocsr()
    queries = words(" ".join([query.text, query.bucket]) for query in data.queries["train"])
    pairs = np.array(
        [
            (p.query, document, grade > 2)
            for p in data.pairs
            for document, grade in zip(p.documents, p.grades, strict=True)
            if grade >= 0
        ]
    )
    seen = pairs[:, 0] < 0.7 * queries.shape[0]
    for name, features, column in (("document only", documents, 1), ("query only", queries, 0)):
        model = LogisticRegression(max_iter=200).fit(features[pairs[seen, column]], pairs[seen, 2])
        scores = model.decision_function(features[pairs[~seen, column]])
        found = auroc_with_interval(pairs[~seen, 2], scores, pairs[~seen, 0])
        yield {"kind": "probe", "probe": name, **found, "pairs": int((~seen).sum())}


def ranked_pairs(data: Dataset, features: Features, part: slice) -> tuple[FeatureMatrix, np.ndarray]:
    """Features [B, L, F] and grades [B, L] of graded training pairs."""
    chosen = [(p, p.documents[p.grades >= 0], p.grades[p.grades >= 0]) for p in data.pairs[part]]
    rows = np.full((len(chosen), max(len(d) for _, d, _ in chosen)), -1, np.int32)
    grades = np.zeros(rows.shape, np.int32)
    for i, (_, found, known) in enumerate(chosen):
        rows[i, : len(found)], grades[i, : len(found)] = found, known
    return features([data.queries["train"][p.query] for p, _, _ in chosen], rows), grades


def ranges(data: Dataset, searches: int, training: int) -> Iterator[Row]:
    """Every document is a candidate, so that nothing is lost before ranking."""
    queries = list(data.queries["test"])[:searches]
    every = np.arange(len(data.documents), dtype=np.int32)
    spec = FeatureSpec.from_records(data.queries["train"][:training], data.documents, similarity=False)
    features = Features(data.documents, spec)
    params = BoostingParams(rounds=200, learning_rate=0.1)
    held = training // 10
    model = train_ranker(
        spec,
        ranked_pairs(data, features, slice(held, training)),
        ranked_pairs(data, features, slice(0, held)),
        params,
    )
    lists = np.tile(every, (len(queries), 1))
    bm25 = Bm25.build([document_text(document) for document in data.documents])
    rng = np.random.default_rng(0)
    rankings = {
        "oracle": [data.grades(query, every).astype(float) for query in queries],
        "lightgbm": np.concatenate(
            [
                model.score(features(queries[i : i + 50], lists[i : i + 50]))
                for i in range(0, len(queries), 50)
            ]
        ),
        "bm25": bm25.score([query.text for query in queries], lists),
        "random": rng.random(lists.shape),
    }
    for name, scores in rankings.items():
        values = ranking_metrics(data, queries, list(lists), list(scores))["ndcg@10"]
        found = bootstrap_mean(values)
        rounded = [round(x, 4) for x in found]
        yield {
            "kind": "range", "ranker": name, "ndcg@10": rounded[0], "low": rounded[1], "high": rounded[2],
            "queries": len(queries),
        }  # fmt: skip


class Impressions:
    """Shown documents of one split, flat [n], with what their actions may depend on."""

    def __init__(self, data: Dataset, split: str, searches: int):
        queries = list(data.queries[split])[:searches]
        shown = [(i, query, item) for i, query in enumerate(queries) for item in data.impressions[query.id]]
        rows = [data.document_row[item.document_id] for _, _, item in shown]
        documents = [data.documents[row] for row in rows]
        vertical = documents[0].vertical
        self.search = np.array([i for i, _, _ in shown])
        self.grade = np.array(
            [data.graded[query.id].get(row, 0) for (_, query, _), row in zip(shown, rows, strict=True)]
        )
        self.position = np.array([item.position for _, _, item in shown])
        popularity = np.array([document.numeric[POPULARITY[vertical]] for document in documents])
        self.fifth = 1 + np.searchsorted(np.quantile(popularity, [0.2, 0.4, 0.6, 0.8]), popularity)
        self.ungraded = np.array(
            [
                [
                    _as_number(FEATURES[name].value(query, document, item.position))
                    for name in UNGRADED[vertical]
                ]
                for (_, query, item), document in zip(shown, documents, strict=True)
            ]
        )
        self.actions = {
            name: np.array(
                [np.nan if item.actions[name] is None else item.actions[name] for _, _, item in shown], float
            )
            for name in data.actions
        }


def _as_number(value: Value) -> float:
    return 0.0 if value is None else float(value)


def rates(shown: Impressions) -> Iterator[Row]:
    """Share of eligible impressions on which an action was done, with the standard error of a proportion."""
    for by, values in (("grade", shown.grade), ("position", shown.position), ("popularity", shown.fifth)):
        for action, done in shown.actions.items():
            for value in np.unique(values):
                chosen = done[(values == value) & ~np.isnan(done)]
                if not chosen.size:
                    continue
                mean = float(chosen.mean())
                error = float(np.sqrt(mean * (1 - mean) / chosen.size))
                yield {
                    "kind": "rate", "action": action, "by": by, "value": int(value), "rate": round(mean, 5),
                    "standard_error": round(error, 5), "eligible": int(chosen.size),
                }  # fmt: skip


def fits(train: Impressions, test: Impressions) -> Iterator[Row]:
    """Relevance is the grade, one column a grade: nothing is lost by a wrong scale."""

    def columns(shown: Impressions, name: str) -> np.ndarray:
        relevance = np.eye(5)[shown.grade]
        return {
            "relevance": relevance,
            "popularity": shown.ungraded,
            "both": np.c_[relevance, shown.ungraded],
        }[name]

    action = next(iter(train.actions))
    for name in ("relevance", "popularity", "both"):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
        model.fit(columns(train, name), train.actions[action])
        found = auroc_with_interval(
            test.actions[action], model.decision_function(columns(test, name)), test.search
        )
        yield {
            "kind": "fit",
            "action": action,
            "features": name,
            **found,
            "impressions": int(test.search.size),
        }


def teachers(data: Dataset, relevance: str, engagement: str) -> Iterator[Row]:
    """Both stores must be of this data."""
    meta, first = read_scores(relevance, data.fingerprint)
    yes, no = (meta.columns.index(name) for name in RANKER_LABELS)
    meta, second = read_scores(engagement, data.fingerprint)
    place = meta.columns.index(data.actions[0])
    by_query: dict[int, list[tuple[float, float]]] = {}
    for pair, scores in first.items():
        if pair in second:
            by_query.setdefault(pair[0], []).append((scores[yes] - scores[no], second[pair][place]))
    values = [spearmanr(np.array(found)).statistic for found in by_query.values() if len(found) >= 5]
    found = bootstrap_mean(values)
    yield {
        "kind": "teachers", "action": data.actions[0], "spearman": round(found.value, 4),
        "low": round(found.low, 4), "high": round(found.high, 4), "queries": len(values),
    }  # fmt: skip


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Action rates by grade, position and popularity: one line of panels per data set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["dataset"] for row in rows))
    sides = ("grade", "position", "popularity")
    figure, axes = pyplot.subplots(len(names), 3, figsize=(13, 3.6 * len(names)), squeeze=False)
    for line, name in zip(axes, names, strict=True):
        for axis, by in zip(line, sides, strict=True):
            chosen = [row for row in rows if row["dataset"] == name and row.get("by") == by]
            for action in dict.fromkeys(row["action"] for row in chosen):
                points = [row for row in chosen if row["action"] == action]
                x, y, error = zip(
                    *((p["value"], p["rate"], p["standard_error"]) for p in points), strict=True
                )
                axis.errorbar(x, y, 2 * np.array(error), label=action, marker="o", markersize=3)
            label = "popularity, fifths" if by == "popularity" else by
            axis.set(xlabel=label, yscale="log", title=name if by == "position" else "")
        line[0].set_ylabel("done, of those eligible")
        line[2].legend(fontsize=8)
    figure.tight_layout()
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
    os.replace(temporary, path)


def main() -> None:
    """Measure, print, and append to the JSON lines file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datasets", nargs="+", default=["job_market:tiny", "job_market:tiny_people"])
    parser.add_argument("--data-dir", default="", help="folder of prepared data (default: TFDS's own)")
    parser.add_argument("--searches", type=int, default=200, help="test searches that are ranked")
    parser.add_argument("--training", type=int, default=1_500, help="training searches of LightGBM")
    parser.add_argument("--relevance-scores", default="", help="a relevance teacher's store, of one data set")
    parser.add_argument("--engagement-scores", default="", help="an engagement teacher's store of the same")
    parser.add_argument("--jsonl", type=Path, help="append the rows to this file")
    parser.add_argument("--figure", type=Path, help="write the figure of action rates here (PNG)")
    options = parser.parse_args()
    if bool(options.relevance_scores) != bool(options.engagement_scores):
        parser.error("--relevance-scores and --engagement-scores belong together")
    if options.relevance_scores and len(options.datasets) != 1:
        parser.error("score stores are of one data set: give it with --datasets")
    command = shlex.join(["python", *sys.argv])
    rows = []
    for name in options.datasets:
        data = load_dataset(name, options.data_dir or None)
        train = Impressions(data, "train", len(data.queries["train"]))
        test = Impressions(data, "test", len(data.queries["test"]))
        parts = [
            probes(data),
            ranges(data, options.searches, options.training),
            rates(test),
            fits(train, test),
        ]
        if options.relevance_scores:
            parts.append(teachers(data, options.relevance_scores, options.engagement_scores))
        for part in parts:
            for row in part:
                rows.append({"command": command, "dataset": data.name, **row})
                if row["kind"] != "rate":
                    print(json.dumps({"dataset": data.name, **row}), flush=True)
    append(options.jsonl, rows)
    if options.figure:
        draw(options.figure, rows)


if __name__ == "__main__":
    main()
