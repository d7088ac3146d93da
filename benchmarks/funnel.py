"""The whole funnel from records to ranked results, with a table of quality and speed: what `make demo` runs.

    python benchmarks/funnel.py --workdir runs/demo [--dataset job_market:tiny] [--seed 0] [--jsonl benchmarks/results/funnel.jsonl]

Trains base models, judge, retriever, two teachers and the ranker by the configs of this repository, builds the bundle, ranks the held-out
searches, and writes `report.json` and `report.png` into the work folder. Stages that a former run finished are not trained again. With
`--dataset onet_jobs` (set ONET_DIR) the documents are real occupations; there are no impressions there, so that the engagement columns
are empty.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from machine import describe
from record import append
from stages import finished

from jaxsearch.config import load_config
from jaxsearch.data.datasets import Dataset
from jaxsearch.data.job_market.generator import VARIANTS, JobMarket
from jaxsearch.data.jsonl import write_lines
from jaxsearch.data.records import Query, to_dict
from jaxsearch.errors import InputError
from jaxsearch.measurement.gate import gate_of, require_agreement
from jaxsearch.metrics import auroc, kappa
from jaxsearch.models.contract import Model, load_model
from jaxsearch.retrieval.bm25 import Bm25, document_text
from jaxsearch.retrieval.common import pad_candidates
from jaxsearch.retrieval.exhaustive import ExhaustiveIndex
from jaxsearch.retrieval.index import IndexParams, ScannIndex, recall
from jaxsearch.retrieval.traditional import (
    Features,
    FeatureSpec,
    TraditionalModel,
    train_click_model,
    train_ranker,
)
from jaxsearch.scoring.label import label
from jaxsearch.scoring.records import RecordScorer, action_log_odds, relevance_log_odds
from jaxsearch.serving.batch import RANKINGS, rank_file
from jaxsearch.serving.bundle import Bundle, build_bundle, make_embedder, make_scorer
from jaxsearch.serving.first_stage import FirstStage
from jaxsearch.tasks.base import DataConfig, open_data, precedent_count, ranking_metrics
from jaxsearch.training.loop import run

AUROC = "click_auroc"
"""Of the vertical's first action: click in job search, long dwell in people search."""
DEPTH = 30
"""Candidates that BM25 and the retriever contribute each."""
WARM = 256
"""Searches that are ranked before the clock starts, so that every shape is compiled."""
LONG_FIELDS = ("description", "tasks", "technologies")
REAL_KAPPA = 0.3
"""What a judge from scratch must reach on real occupations before it labels."""
REAL_TOKENS = 48
"""Tokens of a real occupation that models from scratch read: title, description, the first tasks."""


@dataclass
class Demo:
    """Folder, data and clock of one run."""

    workdir: Path
    dataset: str
    data_dir: str
    seed: int
    steps: float
    max_queries: int
    real: bool
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and say that it runs."""
        print(f"\n== {name}", flush=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 2)

    def train(self, name: str, config: str, *overrides: str) -> Model:
        """Train by a config file, unless a former run did; returns the exported model."""
        folder = self.workdir / name
        data = ["--task.data.name", self.dataset, "--task.data.dir", self.data_dir]
        data += ["--task.data.max-queries", str(self.max_queries), "--seed", str(self.seed)]
        if self.real:
            part = "document-prompt" if config.startswith("retriever") else "prompt"
            data += [f"--task.{part}.max-document-tokens", str(REAL_TOKENS)]
        loaded = load_config(f"configs/{config}", [*data, *overrides])
        if self.steps != 1:
            steps = max(round(loaded.steps * self.steps), 60)
            loaded = load_config(f"configs/{config}", [*data, *overrides, "--steps", str(steps)])
        if not finished(folder, loaded):
            with self.stage(name):
                for metric, value in run(loaded, folder).items():
                    print(f"{metric} {value:.4f}")
        return load_model(folder / "model")

    @staticmethod
    def reads_as(model: Model) -> list[str]:
        """Options of a ranker that reads what `model` reads."""
        prompt = to_dict(model.contract.prompts["pair"])
        words: list[str] = []
        for name, value in prompt.items():
            given = [str(part) for part in value] if isinstance(value, list | tuple) else [str(value)]
            words += [f"--task.prompt.{name.replace('_', '-')}", *given]
        return words

    def taught_by(self, teacher: Model, scores: str) -> list[str]:
        """Options of a ranker that learns what `teacher` says, from a store of its scores, and reads what it reads."""
        objectives = ["relevance", "engagement"] if teacher.contract.actions else ["relevance"]
        stores = [word for name in objectives for word in (f"--task.{name}-teachers", scores)]
        return [*stores, *self.reads_as(teacher)]

    def label(
        self, name: str, model: Model, data: Dataset, per_query: int, first: FirstStage | None = None
    ) -> str:
        """Score the training pairs, or what first stages find, into a store; a finished one is kept."""
        with self.stage(name):
            found = first.pairs(data)[: self.max_queries or None] if first else ()
            folder = self.workdir / name
            report = label(
                model, data, folder, per_query=per_query, pairs=found, source=first.source if first else ""
            )
        return report.store


@dataclass
class Row:
    """One line of the table."""

    scores: list[np.ndarray]
    """What candidates are ordered by, one [L] per query."""
    items_per_s: float
    clicks: np.ndarray | None = None
    """Scores of the first action on the impressions, flat; None where the model predicts no clicks."""
    parameters: int | None = None


def timed(function: Callable[[], Any], warm: Callable[[], Any] | None = None) -> tuple[Any, float]:
    """The result and the seconds of a call, after `warm` (compilation) has run."""
    if warm is not None:
        warm()
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def parameters(model: Model) -> int:
    """Numbers in the decoder and heads."""
    heads = len(model.contract.actions) * model.contract.architecture.width
    return model.contract.architecture.parameters + heads


def unseen_postings(data: Dataset, variant: str, count: int) -> Dataset:
    """The test searches that have a good answer among so many more postings of the same market, which the data set does not hold.

    Raises:
      InputError: no such market.
    """
    if variant not in VARIANTS:
        raise InputError(f"the market is {variant!r}: unseen postings are made for {', '.join(VARIANTS)}")
    documents, graded = JobMarket(variant).unseen(count)
    queries = [query for query in data.queries["test"] if max(graded[query.id].values(), default=0) > 2]
    return dataclasses.replace(
        data, name=f"{data.name}_unseen", documents=documents, queries={**data.queries, "test": queries}, graded=graded,
        pairs=[], impressions={},
    )  # fmt: skip


class Evaluation:
    """Ranks one test split with every model over the same candidates."""

    def __init__(self, data: Dataset, split: str, retriever: Model, limit: int):
        self.data = data
        self.queries: list[Query] = list(data.queries[split])[:limit]
        self.texts = [query.text for query in self.queries]
        self.bm25 = Bm25.build([document_text(document) for document in data.documents])
        embedder = make_embedder(retriever)
        self.documents_emb = embedder.documents(data.documents)
        self.queries_emb, self._embed_seconds = timed(
            lambda: embedder.queries(self.queries), lambda: embedder.queries(self.queries)
        )
        if data.rerank:
            self.candidates = [data.rerank[query.id] for query in self.queries]
        else:
            self.candidates = self._union()
        self.count = sum(map(len, self.candidates))
        self.pages = [list(data.impressions.get(query.id, ())) for query in self.queries]
        self.page_rows = [
            np.array([data.document_row[i.document_id] for i in page], np.int32) for page in self.pages
        ]
        self.action = data.actions[0] if data.actions else ""
        """What the table shows AUROC of: the click of job search, the long dwell of people search."""
        self.clicks = np.array([bool(i.actions.get(self.action)) for page in self.pages for i in page])

    def _union(self) -> list[np.ndarray]:
        """BM25's and the retriever's first documents; nothing is injected."""
        lexical, _ = self.bm25.search(self.texts, DEPTH)
        semantic, _ = ExhaustiveIndex(self.documents_emb).search(self.queries_emb, DEPTH)
        return [
            np.unique(np.r_[a[a >= 0], b]).astype(np.int32) for a, b in zip(lexical, semantic, strict=True)
        ]

    def lists(self, values: np.ndarray) -> list[np.ndarray]:
        """Padded scores [Q, L] as one array per query."""
        return [row[: len(rows)] for row, rows in zip(values, self.candidates, strict=True)]

    def lexical(self) -> Row:
        """BM25."""
        padded = pad_candidates(self.candidates)
        values, seconds = timed(lambda: self.bm25.score(self.texts, padded))
        return Row(self.lists(values), self.count / seconds)

    def semantic(self, retriever: Model) -> Row:
        """Cosine; the time includes encoding the query, not the documents, which are encoded offline."""
        values, seconds = timed(
            lambda: [
                self.documents_emb[rows] @ q
                for rows, q in zip(self.candidates, self.queries_emb, strict=True)
            ]
        )
        return Row(values, self.count / (seconds + self._embed_seconds), parameters=parameters(retriever))

    def features(
        self, features: Features, rows: list[np.ndarray], queries: list[Query], emb: np.ndarray
    ) -> Any:
        """LightGBM's feature matrix of candidate lists."""
        padded = pad_candidates(rows)
        similarity = np.einsum("QLD,QD->QL", self.documents_emb[np.maximum(padded, 0)], emb)
        return features(queries, padded, similarity)

    def traditional(
        self, features: Features, ranker: TraditionalModel, clicks: TraditionalModel | None
    ) -> Row:
        """LightGBM; the time includes the features."""
        values, seconds = timed(
            lambda: ranker.score(self.features(features, self.candidates, self.queries, self.queries_emb))
        )
        found = None
        if clicks is not None:
            matrix = self.features(features, self.page_rows, self.queries, self.queries_emb)
            found = np.concatenate(
                [v[: len(r)] for v, r in zip(clicks.score(matrix), self.page_rows, strict=True)]
            )
        return Row(self.lists(values), self.count / seconds, found)

    def cross_encoder(self, model: Model) -> Row:
        """A teacher or the ranker through the prefill function."""
        scorer: RecordScorer = make_scorer(model, self.data.documents)
        # Settled on its lists, a scorer compiles the same shapes for a part of them as for all.
        scorer.settle(self.queries, self.candidates)
        logits, seconds = timed(
            lambda: scorer(self.queries, self.candidates),
            lambda: scorer(self.queries[:WARM], self.candidates[:WARM]),
        )
        clicks = None
        if self.action in model.contract.actions:
            place = model.contract.actions.index(self.action)
            clicks = action_log_odds(np.concatenate(scorer(self.queries, self.page_rows)))[:, place]
        order = relevance_log_odds
        if model.contract.training["name"] == "engagement_teacher":  # has learned no relevance
            order = lambda x: action_log_odds(x)[:, place]  # noqa: E731
        return Row([order(x) for x in logits], self.count / seconds, clicks, parameters(model))

    def figures(self, row: Row) -> dict[str, float | int | None]:
        """The columns of the table."""
        found = ranking_metrics(self.data, self.queries, self.candidates, row.scores)
        click = (
            None
            if row.clicks is None
            else auroc(row.clicks, self.clicks, where=np.ones(self.clicks.shape, bool))
        )
        return {
            **{name: round(float(np.nanmean(values)), 4) for name, values in found.items()},
            AUROC: None if click is None else round(click, 4),
            "items_per_s": round(row.items_per_s, 1),
            "parameters": row.parameters,
        }

    def ceiling(self) -> float:
        """NDCG@10 of the best order of the candidates."""
        best = [self.data.grades(q, rows) for q, rows in zip(self.queries, self.candidates, strict=True)]
        found = ranking_metrics(self.data, self.queries, self.candidates, [g.astype(float) for g in best])
        return float(np.nanmean(found["ndcg@10"]))


def train_traditional(
    data: Dataset, retriever: Model, evaluation: Evaluation, limit: int, seed: int
) -> tuple[Features, TraditionalModel, TraditionalModel | None]:
    """LightGBM on the training pairs' true grades and, where there are impressions, on clicks."""
    embedder = make_embedder(retriever)
    train = list(data.pairs[:limit])
    held = max(len(train) // 10, 1)
    queries = [data.queries["train"][p.query] for p in train]
    spec = FeatureSpec.from_records(queries, data.documents, similarity=True)
    features = Features(data.documents, spec, bm25=evaluation.bm25)
    emb = embedder.queries(queries)

    def ranked(part: slice) -> tuple[Any, np.ndarray]:
        rows = [p.documents[p.grades >= 0] for p in train[part]]
        grades = [p.grades[p.grades >= 0] for p in train[part]]
        padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for i, values in enumerate(grades):
            padded[i, : len(values)] = values
        return evaluation.features(features, rows, queries[part], emb[part]), padded

    ranker = train_ranker(spec, ranked(slice(held, None)), ranked(slice(0, held)))
    if not data.impressions:
        return features, ranker, None

    def clicked(part: slice) -> tuple[Any, np.ndarray]:
        pages = [data.impressions.get(query.id, ()) for query in queries[part]]
        rows = [np.array([data.document_row[i.document_id] for i in page], np.int32) for page in pages]
        values = np.array([[float(bool(i.actions.get(evaluation.action))) for i in page] for page in pages])
        return evaluation.features(features, rows, queries[part], emb[part]), values

    return features, ranker, train_click_model(spec, clicked(slice(held, None)), clicked(slice(0, held)))


def examples(
    data: Dataset, bundle: Bundle, queries: list[Query], folder: Path, count: int = 3
) -> list[dict[str, Any]]:
    """Batch-rank the test queries, as `serve.py batch` would, and show the first few."""
    shutil.rmtree(folder, ignore_errors=True)  # of a former run, perhaps of another bundle
    folder.mkdir(parents=True)
    write_lines(folder / "queries.jsonl", map(to_dict, queries))
    rank_file(bundle, folder / "queries.jsonl", folder, depth=2 * DEPTH, top=10)
    by_id = {query.id: query for query in queries}
    shown = []
    with open(folder / RANKINGS, encoding="utf-8") as lines:
        for line, _ in zip(lines, range(count), strict=False):
            row = json.loads(line)
            query = by_id[row["query_id"]]
            results = []
            for result in row["results"][:5]:
                number = data.document_row[result["document_id"]]
                fields = data.documents[number].fields
                results.append(
                    {
                        "document": "; ".join(
                            text for name, text in fields.items() if name not in LONG_FIELDS
                        ),
                        "relevance": round(result["relevance"], 3),
                        "grade": int(data.grades(query, np.array([number]))[0]),
                        **{
                            name: round(p, 3)
                            for name, p in result["actions"].items()
                            if name in data.actions[:2]
                        },
                    }
                )
            shown.append({"query": query.text, "results": results})
    return shown


def kept(models: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How much of its teachers the ranker kept."""
    bm25, teacher, ranker = (models[name]["ndcg@10"] for name in ("bm25", "relevance_teacher", "ranker"))
    result = {
        "ndcg_ratio": ranker / teacher,
        "gain_over_bm25": (ranker - bm25) / (teacher - bm25),
        "parameters": models["ranker"]["parameters"] / models["relevance_teacher"]["parameters"],
    }
    if "engagement_teacher" in models:
        above = [models[name][AUROC] - 0.5 for name in ("ranker", "engagement_teacher")]
        result["click_auroc_above_half"] = above[0] / above[1]
    return {name: round(value, 4) for name, value in result.items()}


def print_table(title: str, models: dict[str, dict[str, Any]], engagement: bool) -> None:
    """One line per model."""
    print(
        f"\n{title}\n{'model':20} {'NDCG@10':>8} {'poor@10':>8} {'MRR g4':>8} {'click AUROC':>12} {'items/s':>10} {'parameters':>11}"
    )
    for name, row in models.items():
        click = "-" if engagement else "no clicks here"
        if row[AUROC] is not None:
            click = f"{row[AUROC]:.4f}"
        size = f"{row['parameters']:,}" if row["parameters"] else "-"
        print(
            f"{name:20} {row['ndcg@10']:8.4f} {row['poor_match@10']:8.4f} {row['mrr']:8.4f}"
            f" {click:>12} {row['items_per_s']:10,.0f} {size:>11}"
        )
    print(
        "NDCG@10 with gain 2^grade - 1, ideal over all graded documents; poor@10: share of the first 10 graded 0 or 1."
    )


def draw(path: Path, splits: dict[str, dict[str, dict[str, Any]]], seconds: dict[str, float]) -> None:
    """Quality against speed, and where the time went."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(splits) + 1, figsize=(6 * (len(splits) + 1), 4.5))
    for axis, (split, models) in zip(axes, splits.items(), strict=False):
        for name, row in models.items():
            axis.scatter(row["items_per_s"], row["ndcg@10"])
            axis.annotate(
                name, (row["items_per_s"], row["ndcg@10"]), xytext=(4, 4), textcoords="offset points"
            )
        axis.set(xscale="log", xlabel="items/s", ylabel="NDCG@10 (gain 2^g - 1)", title=split)
    axes[-1].barh(list(seconds), list(seconds.values()))
    axes[-1].invert_yaxis()
    axes[-1].set(xlabel="seconds", title="where the time went")
    figure.tight_layout()
    temporary = path.with_name("report.tmp.png")
    figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
    os.replace(temporary, path)


def scann_recall(evaluation: Evaluation) -> dict[str, float]:
    """Recall@100 of ScaNN's tree index and of the one the bundle would use, against the exhaustive search."""
    k = min(100, len(evaluation.documents_emb))
    truth, _ = ExhaustiveIndex(evaluation.documents_emb).search(evaluation.queries_emb, k)
    found = {}
    for kind in ("auto", "tree_ah"):
        params = IndexParams.for_corpus(len(evaluation.documents_emb), kind=kind)
        ids, _ = ScannIndex.build(evaluation.documents_emb, params).search(evaluation.queries_emb, k)
        found[kind] = round(recall(ids, truth), 4)
    return found


def judge_kappa(data: Dataset, judge: Model, limit: int) -> float:
    """Linear-weighted kappa on training pairs that are no precedents of the judge."""
    share = judge.contract.training["task"]["precedents"]
    pairs = data.pairs[precedent_count(share, data) :][:limit]
    logits = make_scorer(judge, data.documents)(
        [data.queries["train"][p.query] for p in pairs], [p.documents for p in pairs]
    )
    grades = np.concatenate([p.grades for p in pairs])
    return kappa(np.maximum(grades, 0), np.concatenate(logits).argmax(-1), where=grades >= 0)


def main() -> int:
    """Run the funnel."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workdir", default="runs/demo", help="folder of the run; a former one is gone on with"
    )
    parser.add_argument("--dataset", default="job_market:tiny")
    parser.add_argument("--data-dir", default="", help="folder of prepared data (default: WORKDIR/data)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=float, default=1.0, help="multiplies every stage's steps, for a quick look"
    )
    parser.add_argument(
        "--max-queries", type=int, default=0, help="training queries in use; 0 for the data set's default"
    )
    parser.add_argument(
        "--test-queries", type=int, default=800, help="most queries of a test split that are ranked"
    )
    parser.add_argument("--jsonl", default="", help="append the report as one line to this file")
    options = parser.parse_args()
    started = time.perf_counter()
    workdir = Path(options.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    # A stage's evaluation, its labelling and the last evaluation score with the same program: it is compiled once.
    jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").resolve()))
    real = options.dataset == "onet_jobs"
    demo = Demo(
        workdir,
        options.dataset,
        options.data_dir or str(workdir / "data"),
        options.seed,
        options.steps,
        options.max_queries or (4_500 if real else 0),
        real,
    )
    with demo.stage("data"):
        data = open_data(DataConfig(demo.dataset, demo.data_dir, max_queries=demo.max_queries))
        sizes = {split: len(queries) for split, queries in data.queries.items()}
        print(f"{data.name}: {len(data.documents)} documents, {sizes} queries")

    # Real occupations are longer than what is read of them: in another order their titles would be cut off.
    order = ["--task.shuffle-fields", "False"] if real else []
    people = "_people" if demo.dataset.endswith("people") else ""  # names take longer to learn
    base = demo.train("base", f"base.py:tiny{people}", *order)
    tokenizer = ["--task.model.tokenizer", str(workdir / "base" / "model")]
    demo.train("base_student", f"base.py:tiny_student{people}", *tokenizer, *order)
    # A judge of a few steps agrees with nobody; one from scratch knows of real work what it read in a few thousand titles.
    gate = ["--task.minimum-kappa", "-1"] if options.steps < 0.5 else []
    gate = gate or (["--task.minimum-kappa", str(REAL_KAPPA)] if real else [])
    judge = demo.train(
        "judge", f"judge.py:tiny{people}", "--task.model.init-from", str(workdir / "base/model"), *gate
    )
    require_agreement(workdir / "judge/model", judge, data, gate_of(judge))
    labels = demo.label("judge_labels", judge, data, per_query=16)
    retriever = demo.train(
        "retriever",
        "retriever.py:tiny",
        "--task.model.init-from",
        str(workdir / "base_student/model"),
        "--task.labels",
        labels,
        # A judge of a few steps commits itself to no high grade.
        *(("--task.threshold", "1.0") if options.steps < 0.5 else ()),
    )
    from_judge = ["--task.model.init-from", str(workdir / "judge/model")]
    relevance = demo.train(
        "relevance_teacher", "relevance_teacher.py:tiny", *from_judge, "--task.labels", labels
    )
    scores = ["--task.relevance-teachers", demo.label("relevance_scores", relevance, data, per_query=16)]
    engagement = None
    if data.impressions:
        engagement = demo.train("engagement_teacher", "engagement_teacher.py:tiny", *from_judge)
        scores += [
            "--task.engagement-teachers",
            demo.label("engagement_scores", engagement, data, per_query=16),
        ]
    ranker = demo.train(
        "ranker",
        f"ranker.py:tiny{people}",
        "--task.model.init-from",
        str(workdir / "retriever/model"),
        *scores,
    )
    del base

    with demo.stage("bundle"):
        build_bundle(workdir / "bundle", ranker, retriever, data.documents)
        bundle = Bundle.open(workdir / "bundle")
    splits: dict[str, dict[str, dict[str, Any]]] = {}
    about: dict[str, Any] = {}
    with demo.stage("evaluation"):
        for split in data.test_splits:
            evaluation = Evaluation(data, split, retriever, options.test_queries)
            features, lambdamart, clicks = train_traditional(data, retriever, evaluation, 4_500, options.seed)
            rows = {
                "bm25": evaluation.lexical(),
                "lightgbm": evaluation.traditional(features, lambdamart, clicks),
                "retriever": evaluation.semantic(retriever),
                "relevance_teacher": evaluation.cross_encoder(relevance),
            }
            if engagement is not None:
                rows["engagement_teacher"] = evaluation.cross_encoder(engagement)
            rows["ranker"] = evaluation.cross_encoder(ranker)
            splits[split] = {name: evaluation.figures(row) for name, row in rows.items()}
            about[split] = {
                "queries": len(evaluation.queries),
                "candidates_per_query": round(evaluation.count / len(evaluation.queries), 1),
                "ceiling_ndcg@10": round(evaluation.ceiling(), 4),
                "recall@100": scann_recall(evaluation),
                "kept": kept(splits[split]),
            }
        agreement = judge_kappa(data, judge, 300)
    with demo.stage("batch ranking"):
        shown = examples(
            data, bundle, list(data.queries[data.test_splits[0]])[: options.test_queries], workdir / "batch"
        )

    for split, models in splits.items():
        print_table(
            f"{data.name}, {split}: {about[split]['queries']} queries", models, bool(data.impressions)
        )
        print(
            f"ceiling of the candidate lists {about[split]['ceiling_ndcg@10']}; kept by the ranker: {about[split]['kept']}"
        )
    print(f"judge: linear-weighted kappa {agreement:.3f} on pairs it was not trained on")
    for example in shown:
        print(f"\n{example['query']}")
        for rank, result in enumerate(example["results"], start=1):
            print(f"  {rank}. {result.pop('document')}  {result}")
    total = time.perf_counter() - started
    report = {
        "command": "python " + " ".join(sys.argv),
        "dataset": data.name,
        "seed": options.seed,
        "seconds": {**demo.seconds, "total": round(total, 1)},
        "models": splits[data.test_splits[0]],
        "splits": {split: {"models": models, **about[split]} for split, models in splits.items()},
        "judge_kappa": round(agreement, 4),
        "machine": describe(),
    }
    temporary = workdir / "report.tmp"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, workdir / "report.json")
    draw(workdir / "report.png", splits, demo.seconds)
    append(options.jsonl, [report])
    print(f"\n{total / 60:.1f} minutes; report: {workdir / 'report.json'}, figure: {workdir / 'report.png'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"funnel.py: {error}")
