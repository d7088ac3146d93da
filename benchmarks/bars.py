"""The ranker beside the bars of structured features, LightGBM and DCN-v2: quality and cost over the same candidates.

    python benchmarks/bars.py --workdir runs/demo --dataset job_market:tiny [--seed 0] [--jsonl benchmarks/results/bars.jsonl]

Takes the work folder of a finished `funnel.py`, trains LightGBM and DCN on the training pairs' true grades and on impressions, and ranks
the test searches with every model. The funnel's own models see grades of precedents only, and the judge's labels for the rest, so that the
bars have the better labels. `lightgbm_judge` and `dcn_judge` learn from the judge's labels, as teachers and ranker do. `lightgbm_clicks`
and `dcn_clicks` order by the vertical's first action, as a ranker does that has never seen a judge.

One line per model and test split, then one line with the ranker's differences from the bars (paired bootstrap over queries). The engagement
teacher, which has learned no relevance, is ordered by the vertical's first action. What the columns mean:

- items/s: from records to everything the model predicts, relevance and all actions. LightGBM and DCN: with their features, and the
  query embedding, since the embedding similarity is one of them; LightGBM with one model per action. Document embeddings are made offline.
- parameters: LightGBM: two numbers per split, one per leaf.
- flops_per_item: LightGBM: one per comparison on the mean path through each tree. DCN: the network. Cross-encoders: the decoder without
  padding, the query's prefix shared by its candidates. Features of LightGBM and DCN are not counted, only the query encoder behind one.
- auroc: over the shown documents for which the action was possible, at the serving position. null where a model does not predict the
  action, or it never (or always) happened.

To pool seeds, WORKDIR/bars_SPLIT.npz keeps the values per query: `queries` (ids, [Q] text) and `MODEL/METRIC` (fp64 [Q], NaN where a query
has no value), for the metrics ndcg@10, poor_match@10 and mrr. It holds plain arrays: `numpy.load(path, allow_pickle=False)` reads it.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from funnel import WARM, Evaluation, parameters, timed
from machine import describe
from record import append

from jaxsearch.data.datasets import Dataset, Pairs
from jaxsearch.data.prompts import PromptRoom
from jaxsearch.data.records import Query
from jaxsearch.errors import InputError
from jaxsearch.metrics import auroc, paired_bootstrap
from jaxsearch.models.contract import CONTRACT_FILE, Model, load_model
from jaxsearch.models.decoder import DecoderConfig
from jaxsearch.retrieval.common import pad_candidates
from jaxsearch.retrieval.dcn import DcnConfig, DcnModel, train_dcn
from jaxsearch.retrieval.traditional import (
    BoostingParams,
    FeatureMatrix,
    Features,
    FeatureSpec,
    TraditionalModel,
    train_click_model,
    train_ranker,
)
from jaxsearch.scoring.records import JUDGE_LABELS, RecordScorer, action_log_odds, relevance_log_odds
from jaxsearch.serving.bundle import make_embedder, make_scorer
from jaxsearch.tasks.base import DataConfig, open_data, ranking_metrics
from jaxsearch.tasks.cross_encoder import store_targets
from jaxsearch.tasks.engagement_teacher import action_values

METRICS = ("ndcg@10", "poor_match@10", "mrr")
Labelled = tuple[FeatureMatrix, np.ndarray]


@dataclass
class Bar:
    """What one model says of one test split, and what it costs."""

    scores: list[np.ndarray]
    """What candidates are ordered by, one [L] per query."""
    items_per_s: float
    actions: np.ndarray | None = None
    """Scores of the impressions, [N, A], NaN for an action without a model; None where nothing is predicted."""
    parameters: int | None = None
    flops: float | None = None
    """Per item."""


class Bars(Evaluation):
    """The funnel's evaluation with every action of the vertical, and cost."""

    def __init__(self, data: Dataset, split: str, retriever: Model, limit: int):
        super().__init__(data, split, retriever, limit)
        self.action_names = data.actions
        self.truth = np.concatenate(
            [action_values(page, data.actions) for page in self.pages if page] or [[]]
        )
        room = PromptRoom(retriever.tokenizer, retriever.contract.prompts["query"])
        lengths = [len(ids) for ids in room.prefixes(self.queries)]
        config = retriever.contract.architecture
        self.embed_flops = sum(decoder_flops(config, 0, n) for n in lengths) / self.count
        """Of encoding the query, per candidate."""

    def bm25_bar(self) -> Bar:
        """BM25."""
        row = self.lexical()
        return Bar(row.scores, row.items_per_s)

    def retriever_bar(self, retriever: Model) -> Bar:
        """Cosine."""
        row = self.semantic(retriever)
        width = retriever.contract.architecture.width
        return Bar(row.scores, row.items_per_s, None, row.parameters, self.embed_flops + 2 * width)

    def feature_bar(
        self,
        features: Features,
        predict: Callable[[FeatureMatrix], np.ndarray],
        parameters: int,
        flops: float,
    ) -> Bar:
        """A model on features; `predict` gives relevance and every action, [B, L, 1 + A]."""
        found, seconds = timed(
            lambda: predict(self.features(features, self.candidates, self.queries, self.queries_emb)),
            # On all candidates, so that every shape is compiled.
            lambda: predict(self.features(features, self.candidates, self.queries, self.queries_emb)),
        )
        items_per_s = self.count / (seconds + self._embed_seconds)
        actions = None
        if self.action_names:
            shown = self.features(features, self.page_rows, self.queries, self.queries_emb)
            actions = predict(shown)[shown.where][:, 1:]
        return Bar(self.lists(found[..., 0]), items_per_s, actions, parameters, flops + self.embed_flops)

    def by_clicks(self, bar: Bar, features: Features, predict: Callable[[FeatureMatrix], np.ndarray]) -> Bar:
        """The same model, candidates ordered by the vertical's first action alone."""
        found = predict(self.features(features, self.candidates, self.queries, self.queries_emb))
        return dataclasses.replace(bar, scores=self.lists(found[..., 1]))

    def decoder_bar(self, model: Model) -> Bar:
        """A teacher or the ranker through the prefill function."""
        scorer: RecordScorer = make_scorer(model, self.data.documents)
        scorer.settle(self.queries, self.candidates)
        logits, seconds = timed(
            lambda: scorer(self.queries, self.candidates),
            lambda: scorer(self.queries[:WARM], self.candidates[:WARM]),
        )
        actions = None
        if model.contract.actions:
            found = action_log_odds(np.concatenate(scorer(self.queries, self.page_rows)))
            places = [model.contract.actions.index(name) for name in self.action_names]
            actions = found[:, places]
        order: Callable[[np.ndarray], np.ndarray] = relevance_log_odds
        if model.contract.training["name"] == "engagement_teacher":  # has learned no relevance
            order = lambda x: action_log_odds(x)[:, 0]  # noqa: E731
        return Bar(
            [order(x) for x in logits],
            self.count / seconds,
            actions,
            parameters(model),
            self._scorer_flops(model, scorer),
        )

    def _scorer_flops(self, model: Model, scorer: RecordScorer) -> float:
        config = model.contract.architecture
        labels = len(model.contract.labels) + len(model.contract.actions)
        total = 0.0
        prefixes = scorer.room.prefixes(self.queries)
        for query, prefix, rows in zip(self.queries, prefixes, self.candidates, strict=True):
            lengths = [len(ids) for ids in scorer.items(query, rows)]
            total += decoder_flops(config, 0, len(prefix))
            total += sum(decoder_flops(config, len(prefix), n) for n in lengths)
        return total / self.count + 2 * labels * config.width

    def per_query(self, bar: Bar) -> dict[str, np.ndarray]:
        """The ranking metrics, fp64 [Q] each."""
        found = ranking_metrics(self.data, self.queries, self.candidates, bar.scores)
        return {name: np.asarray(found[name], np.float64) for name in METRICS}

    def auroc(self, bar: Bar) -> dict[str, float | None]:
        """Of each action."""
        result: dict[str, float | None] = {}
        for i, name in enumerate(self.action_names):
            where = ~np.isnan(self.truth[:, i])
            scores = None if bar.actions is None else bar.actions[:, i]
            value = np.nan
            if scores is not None and not np.isnan(scores[where]).any():
                value = auroc(np.where(where, scores, 0), np.where(where, self.truth[:, i], 0), where=where)
            result[name] = None if np.isnan(value) else round(value, 4)
        return result

    def figures(self, bar: Bar) -> dict[str, Any]:  # type: ignore[override]
        """The columns of a line."""
        return {
            **{name: round(float(np.nanmean(values)), 4) for name, values in self.per_query(bar).items()},
            "auroc": self.auroc(bar),
            "items_per_s": round(bar.items_per_s, 1),
            "parameters": bar.parameters,
            "flops_per_item": None if bar.flops is None else round(bar.flops),
        }


def decoder_flops(config: DecoderConfig, before: int, tokens: int) -> float:
    """Of `tokens` tokens behind `before` others: two per number of each matrix, and causal attention."""
    c = config
    linear = 4 * c.width * (c.heads + c.kv_heads) * c.head_dim + 6 * c.width * c.mlp_width
    keys = tokens * before + tokens * (tokens + 1) / 2
    return float(c.layers * (tokens * linear + 4 * c.heads * c.head_dim * keys))


@dataclass
class Training:
    """Features and true labels of the training queries; the first tenth of them validates."""

    spec: FeatureSpec
    features: Features
    ranked: tuple[Labelled, Labelled]
    """Training and validation: grades [B, L]."""
    pages: tuple[Labelled, Labelled] | None
    """Training and validation: actions [B, L, A], NaN where not eligible; None without impressions."""


Labels = dict[tuple[int, int], int]
"""(query row, document row) -> grade."""


def judged(folder: Path, data: Dataset) -> Labels:
    """The likeliest grades of a judge's store."""
    return {
        pair: int(logits.argmax())
        for pair, logits in store_targets(str(folder), data, "judge", JUDGE_LABELS).items()
    }


def make_training(
    data: Dataset, retriever: Model, evaluation: Evaluation, limit: int, labels: Labels | None = None
) -> Training:
    """The same pairs, split and features as the LightGBM of `funnel.py`; grades are the true ones, or these labels."""
    train = list(data.pairs[:limit])
    held = max(len(train) // 10, 1)
    queries = [data.queries["train"][p.query] for p in train]
    spec = FeatureSpec.from_records(queries, data.documents, similarity=True)
    features = Features(data.documents, spec, bm25=evaluation.bm25)
    emb = make_embedder(retriever).queries(queries)

    def matrix(rows: list[np.ndarray], part: slice) -> FeatureMatrix:
        found: FeatureMatrix = evaluation.features(features, rows, queries[part], emb[part])
        return found

    def known(pairs: Pairs) -> list[tuple[int, int]]:
        if labels is not None:
            return [
                (row, labels[pairs.query, row])
                for row in pairs.documents.tolist()
                if (pairs.query, row) in labels
            ]
        return [
            (row, g) for row, g in zip(pairs.documents.tolist(), pairs.grades.tolist(), strict=True) if g >= 0
        ]

    def ranked(part: slice) -> Labelled:
        found = [known(pairs) for pairs in train[part]]
        rows = [np.array([row for row, _ in pairs], np.int32) for pairs in found]
        return matrix(rows, part), pad_candidates([[grade for _, grade in pairs] for pairs in found])

    def pages(part: slice) -> Labelled:
        shown = [list(data.impressions.get(query.id, ())) for query in queries[part]]
        rows = [np.array([data.document_row[i.document_id] for i in page], np.int32) for page in shown]
        found = matrix(rows, part)
        values = np.full((*found.where.shape, len(data.actions)), np.nan, np.float32)
        values[found.where] = np.concatenate([action_values(page, data.actions) for page in shown if page])
        return found, values

    parts = slice(held, None), slice(0, held)
    both = (pages(parts[0]), pages(parts[1])) if data.impressions else None
    return Training(spec, features, (ranked(parts[0]), ranked(parts[1])), both)


@dataclass
class Boosted:
    """LightGBM: a ranker and one model per action, None where an action never (or always) happened in training."""

    ranker: TraditionalModel
    actions: list[TraditionalModel | None]

    def __call__(self, features: FeatureMatrix) -> np.ndarray:
        """Relevance, then each action: [B, L, 1 + A], NaN for an action without a model."""
        columns = [self.ranker.score(features)]
        for model in self.actions:
            columns.append(np.full(columns[0].shape, np.nan) if model is None else model.score(features))
        return np.stack(columns, axis=-1)

    def _trees(self) -> list[dict[str, Any]]:
        models = [self.ranker, *(model for model in self.actions if model is not None)]
        return [
            tree["tree_structure"] for model in models for tree in model.booster.dump_model()["tree_info"]
        ]

    @property
    def parameters(self) -> int:
        """Two numbers per split, one per leaf."""
        return sum(3 * leaves(tree)[0] - 2 for tree in self._trees())

    @property
    def flops(self) -> float:
        """Comparisons of one item like those of the training data."""
        return float(sum(leaves(tree)[1] for tree in self._trees()))


def leaves(tree: dict[str, Any]) -> tuple[int, float]:
    """How many leaves a tree has, and the mean depth at which its training data arrive."""
    found: list[tuple[int, int]] = []
    todo = [(tree, 0)]
    while todo:
        node, depth = todo.pop()
        if "split_index" in node:
            todo += [(node["left_child"], depth + 1), (node["right_child"], depth + 1)]
        else:
            found.append((depth, node.get("leaf_count", 1)))
    return len(found), sum(d * n for d, n in found) / max(sum(n for _, n in found), 1)


def train_boosted(training: Training, actions: tuple[str, ...], seed: int) -> Boosted:
    """LambdaMART on grades, and a binary model of each action on the impressions where it was possible."""
    params = BoostingParams(seed=seed)
    ranker = train_ranker(training.spec, *training.ranked, params)
    models: list[TraditionalModel | None] = []
    for i in range(len(actions) if training.pages else 0):
        assert training.pages is not None
        train, valid = (
            (part._replace(where=part.where & ~np.isnan(values[..., i])), values[..., i])
            for part, values in training.pages
        )
        both = len(np.unique(train[1][train[0].where])) == 2 and valid[0].where.any()
        models.append(train_click_model(training.spec, train, valid, params) if both else None)
    return Boosted(ranker, models)


def fit_dcn(training: Training, actions: tuple[str, ...], config: DcnConfig) -> DcnModel:
    """DCN on the same labels."""
    pages = training.pages or (None, None)
    return train_dcn(training.spec, *training.ranked, *pages, config, action_names=actions)


def differences(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean of first - second with its 95% interval and p, by paired bootstrap over queries."""
    result = {}
    for name in ("ndcg@10", "poor_match@10"):
        found = paired_bootstrap(first[name], second[name])
        result[name] = {
            "mean": round(found.mean, 4),
            "low": round(found.low, 4),
            "high": round(found.high, 4),
            "p": round(float(found.p), 5),
            "relative": round(found.mean / max(float(np.nanmean(second[name])), 1e-9), 4),
        }
    return result


def save_values(path: Path, queries: list[Query], values: dict[str, dict[str, np.ndarray]]) -> None:
    """The values per query, as the docstring says."""
    arrays: dict[str, Any] = {"queries": np.array([query.id for query in queries])}
    arrays |= {f"{model}/{metric}": v for model, found in values.items() for metric, v in found.items()}
    temporary = path.with_name(path.stem + ".tmp.npz")
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, path)


def print_table(title: str, rows: dict[str, dict[str, Any]], actions: tuple[str, ...]) -> None:
    """One line per model."""
    print(
        f"\n{title}\n{'model':20} {'NDCG@10':>8} {'poor@10':>8} {'MRR g4':>8} "
        + " ".join(f"{name:>10}" for name in actions)
        + f" {'items/s':>10} {'parameters':>11} {'FLOPs/item':>12}"
    )
    for name, row in rows.items():
        shown = ["-" if v is None else f"{v:.4f}" for v in row["auroc"].values()]
        size, flops = (
            "-" if row[key] is None else f"{row[key]:,}" for key in ("parameters", "flops_per_item")
        )
        print(
            f"{name:20} {row['ndcg@10']:8.4f} {row['poor_match@10']:8.4f} {row['mrr']:8.4f} "
            + " ".join(f"{value:>10}" for value in shown)
            + f" {row['items_per_s']:10,.0f} {size:>11} {flops:>12}"
        )
    print(f"{', '.join(actions) or 'no actions'}: AUROC. FLOPs without the features of LightGBM and DCN.")


def load_stages(workdir: Path, engagement: str = "") -> dict[str, Model]:
    """The funnel's models, by stage.

    Raises:
      InputError: the funnel has not finished here.
    """
    models = {}
    for name in ("retriever", "relevance_teacher", "engagement_teacher", "ranker"):
        folder = workdir / name / "model"
        if name == "engagement_teacher" and engagement:
            folder = Path(engagement)
        if (folder / CONTRACT_FILE).is_file():
            models[name] = load_model(folder)
        elif name != "engagement_teacher":
            raise InputError(
                f"--workdir is {str(workdir)!r}, without a {name}: run benchmarks/funnel.py there first"
            )
    return models


def evaluate(
    data: Dataset, split: str, models: dict[str, Model], options: argparse.Namespace, config: DcnConfig
) -> tuple[Bars, dict[str, Bar], dict[str, float]]:
    """Every model on one split, and the seconds of the bars' training."""
    evaluation = Bars(data, split, models["retriever"], options.test_queries)
    training, feature_seconds = timed(
        lambda: make_training(data, models["retriever"], evaluation, options.max_queries)
    )
    seconds = {"features": feature_seconds}
    bars = {"bm25": evaluation.bm25_bar()}
    judge = Path(options.workdir) / "judge_labels"
    supervision = {"": training}
    if judge.is_dir():
        labels = judged(judge, data)
        supervision["_judge"] = make_training(
            data, models["retriever"], evaluation, options.max_queries, labels
        )
    for suffix, of in supervision.items():
        boosted, seconds[f"lightgbm{suffix}"] = timed(lambda: train_boosted(of, data.actions, options.seed))  # noqa: B023
        dcn, seconds[f"dcn{suffix}"] = timed(lambda: fit_dcn(of, data.actions, config))  # noqa: B023
        bars[f"lightgbm{suffix}"] = evaluation.feature_bar(
            of.features, boosted, boosted.parameters, boosted.flops
        )
        bars[f"dcn{suffix}"] = evaluation.feature_bar(of.features, dcn, dcn.parameters, dcn.flops)
        if data.actions and not suffix:
            bars["lightgbm_clicks"] = evaluation.by_clicks(bars["lightgbm"], of.features, boosted)
            bars["dcn_clicks"] = evaluation.by_clicks(bars["dcn"], of.features, dcn)
    bars["retriever"] = evaluation.retriever_bar(models["retriever"])
    bars |= {name: evaluation.decoder_bar(model) for name, model in models.items() if name != "retriever"}
    return evaluation, bars, {name: round(value, 2) for name, value in seconds.items()}


def main() -> int:
    """Train the bars and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", default="runs/demo", help="folder of a finished funnel")
    parser.add_argument("--dataset", default="job_market:tiny", help="the one that the funnel was run on")
    parser.add_argument("--data-dir", default="", help="folder of prepared data (default: WORKDIR/data)")
    parser.add_argument("--out", default="", help="folder of the .npz files (default: WORKDIR)")
    parser.add_argument("--engagement-teacher", default="", help="a model folder to take in its place")
    parser.add_argument("--seed", type=int, default=0, help="of LightGBM and DCN")
    parser.add_argument("--max-queries", type=int, default=4_500, help="most training queries of the bars")
    parser.add_argument("--test-queries", type=int, default=800, help="most queries of a test split")
    parser.add_argument("--jsonl", default="", help="append the lines to this file")
    options = parser.parse_args()
    workdir = Path(options.workdir)
    out = Path(options.out or workdir)
    models = load_stages(workdir, options.engagement_teacher)
    out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str((out / "compiled").resolve()))
    data = open_data(DataConfig(options.dataset, options.data_dir or str(workdir / "data")))
    if expected := {model.contract.actions for model in models.values()} - {(), data.actions}:
        raise InputError(
            f"--dataset is {options.dataset!r}, the models of {workdir} predict {expected.pop()}"
        )
    about = {"command": "python " + " ".join(sys.argv), "dataset": data.name, "seed": options.seed}
    lines: list[dict[str, Any]] = []
    for split in data.test_splits:
        config = DcnConfig(seed=options.seed)
        evaluation, bars, seconds = evaluate(data, split, models, options, config)
        rows = {name: evaluation.figures(bar) for name, bar in bars.items()}
        values = {name: evaluation.per_query(bar) for name, bar in bars.items()}
        found = {
            name: differences(values["ranker"], values[name])
            for name in values
            if name.startswith(("lightgbm", "dcn"))
        }
        save_values(out / f"bars_{split}.npz", evaluation.queries, values)
        queries = len(evaluation.queries)
        print_table(f"{data.name}, {split}: {queries} queries", rows, data.actions)
        for name, difference in found.items():
            print(f"ranker - {name}: {difference}")
        print(f"seconds to train: {seconds}")
        where = {**about, "split": split, "queries": queries}
        lines += [
            {**where, "model": name, **row, **({"train_s": seconds[name]} if name in seconds else {})}
            for name, row in rows.items()
        ]
        lines.append({**where, "difference": "ranker minus", **found, "machine": describe()})
    append(options.jsonl, lines)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"bars.py: {error}")
